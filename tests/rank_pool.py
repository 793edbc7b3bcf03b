"""A pool of processes connected by gloo that runs functions of (rank, size)."""

import os
import pickle
import queue
import tempfile
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 1200  # seconds per check; reached only by a check that hangs


class RankPool:
    """One process per rank, kept for all checks that need this number of ranks."""

    def __init__(self, size):
        context, self.closed = mp.get_context("spawn"), False
        self.folder = tempfile.TemporaryDirectory()
        self.tasks = [context.Queue() for _ in range(size)]
        self.results = context.Queue()
        self.processes = [
            context.Process(target=serve, args=(rank, size, self.folder.name, self.tasks[rank], self.results), daemon=True)
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def run(self, check, **arguments):
        """Call check(rank, size, **arguments) on every rank. Return the results in rank order, exceptions as text.

        Close the pool and raise RuntimeError if a process dies or does not answer within TIMEOUT seconds.
        """
        for task in self.tasks:
            task.put(pickle.dumps((check, arguments)))
        deadline, answers = time.monotonic() + TIMEOUT, {}
        while len(answers) < len(self.tasks):
            try:
                rank, answer = self.results.get(timeout=1)
                answers[rank] = pickle.loads(answer)
            except queue.Empty:
                dead = [rank for rank, process in enumerate(self.processes) if not process.is_alive()]
                if dead or time.monotonic() > deadline:
                    self.close()
                    reason = f"ranks {dead} died" if dead else f"gave up after {TIMEOUT} s"
                    raise RuntimeError(f"{check.__name__}: only ranks {sorted(answers)} answered; {reason}") from None
        return [answers[rank] for rank in range(len(self.tasks))]

    def close(self):
        self.closed = True
        for process in self.processes:
            process.kill()
        self.folder.cleanup()


def serve(rank, size, folder, tasks, results):
    """Run checks until the process is killed."""
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT // 2)
    )
    while True:
        task = tasks.get()
        try:
            check, arguments = pickle.loads(task)
            answer = check(rank, size, **arguments)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        results.put((rank, pickle.dumps(answer)))  # pickled here: the queue's own thread drops what it cannot pickle
