"""What each of several ranks does in `test_ranks`: functions of (rank, size) that return plain values, and a pool that runs them."""

import copy
import os
import queue
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from shampoo import AdamWShampoo

TIMEOUT = 60  # seconds of a check
COMMON = {"lr": 1e-3, "eps": 1e-4, "block_size": 16, "precondition_frequency": 20, "start_preconditioning_step": 40}


class Pool:
    """Processes that wait for the names of checks, one pool for all checks of a number of ranks."""

    def __init__(self, size):
        context = mp.get_context("spawn")
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
        """What the check returns on each rank; an exception as its text. Fails if a rank does not answer in time."""
        for task in self.tasks:
            task.put((check.__name__, arguments))
        deadline, answers = time.time() + TIMEOUT, {}
        while len(answers) < len(self.tasks):
            try:
                rank, answer = self.results.get(timeout=max(0.1, deadline - time.time()))
            except queue.Empty:
                self.close()
                raise TimeoutError(f"{check.__name__}: only ranks {sorted(answers)} answered in {TIMEOUT} s") from None
            answers[rank] = answer
        return [answers[rank] for rank in range(len(self.tasks))]

    def close(self):
        for process in self.processes:
            process.kill()
        self.folder.cleanup()


def serve(rank, size, folder, tasks, results):
    """Answer tasks for ever."""
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT // 2)
    )
    while True:
        name, arguments = tasks.get()
        try:
            answer = globals()[name](rank, size, **arguments)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        results.put((rank, answer))


class Net(nn.Module):
    """Convolution, embedding, attention, a scalar, a linear layer, and one that only some steps use."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 20, 3)
        self.embedding = nn.Embedding(37, 24)
        self.attention = nn.MultiheadAttention(
            24, 3, bias=False, batch_first=True
        )  # no bias of keys: its gradient is rounding noise
        self.mix = nn.Linear(20, 24)
        self.sometimes = nn.Linear(24, 24)
        self.output = nn.Linear(24, 7)
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, images, words, t):
        x = self.embedding(words) + self.mix(self.conv(images).relu().mean(dim=(2, 3)))[:, None]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.sometimes(x).tanh() if t % 3 else x
        return self.scale * self.output(x.mean(dim=1))


def build(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Net().to(dtype)


def batch(t):
    """Inputs and targets of step t."""
    draw = torch.Generator().manual_seed(t)
    images = torch.randn(8, 3, 6, 6, generator=draw)
    return images, torch.randint(37, (8, 5), generator=draw), torch.randn(8, 7, generator=draw)


def train(model, optimizer, steps, scheduler=None):
    """The same batches on all ranks."""
    dtype = next(model.parameters()).dtype
    for t in steps:
        images, words, targets = batch(t)
        optimizer.zero_grad(set_to_none=True)
        (model(images.to(dtype), words, t) - targets).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def groups_of(model):
    """Two groups of other options."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "betas": (0.8, 0.95), "block_size": 8}]


def whole_weights(model):
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]


def weights_after(rank, size, steps=50, **options):
    """The weights after some steps."""
    model = build()
    optimizer = AdamWShampoo(groups_of(model), **{**COMMON, **options})
    train(model, optimizer, range(steps))
    return whole_weights(model)


def single_process(steps=50, **options):
    """The same in this process."""
    assert not dist.is_initialized()
    return weights_after(0, 1, steps, **options)
