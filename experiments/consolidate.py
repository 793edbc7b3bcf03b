"""Time `consolidate_state_dict()`: `python -m experiments.consolidate --workload=ogbg --ranks=2`.

Local processes connected by gloo hold the optimizer state of an AlgoPerf model and gather it on rank 0, as `prepare_for_eval`
does before a checkpoint. Print the median over several runs and, for comparison, the time to copy the same number of bytes.
"""

import os
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from absl import app, flags
from torch.multiprocessing.spawn import spawn

from shampoo import AdamWShampoo

from .balance import OPTIONS, load_shapes

FLAGS = flags.FLAGS


def measure(rank: int, ranks: int, shapes: list[tuple[int, ...]], repeats: int, folder: str) -> None:
    """Run one process; rank 0 prints the gathered size and the times."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    optimizer = AdamWShampoo([torch.nn.Parameter(torch.empty(shape)) for shape in shapes], **OPTIONS)
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        optimizer.consolidate_state_dict()
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        gathered = [x for state in optimizer.state_dict()["state"].values() for x in state.values()]
        start = time.perf_counter()
        for x in gathered:
            x.clone()
        copy_seconds = time.perf_counter() - start
        gigabytes = sum(x.nbytes for x in gathered) / 1e9
        print(f"{gigabytes:.2f} GB gathered in {statistics.median(seconds):.2f} s; copied in {copy_seconds:.2f} s")
    dist.barrier()
    dist.destroy_process_group()


def main(_: Any) -> None:
    """Start the processes."""
    shapes = load_shapes()[FLAGS.workload]
    with tempfile.TemporaryDirectory() as folder:
        spawn(measure, (FLAGS.ranks, shapes, FLAGS.repeats, folder), nprocs=FLAGS.ranks)


if __name__ == "__main__":
    flags.DEFINE_enum("workload", "ogbg", sorted(load_shapes()), "AlgoPerf workload whose parameter shapes are used")
    flags.DEFINE_integer("ranks", 2, "number of processes", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "number of calls; the median is printed", lower_bound=1)
    app.run(main)
