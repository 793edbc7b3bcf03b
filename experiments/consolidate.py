"""What `consolidate()` costs: `python -m experiments.consolidate --workload=ogbg --ranks=2`.

Processes of this machine, connected by gloo, hold the state for the shapes of an AlgoPerf model, and gather it to the first,
as `prepare_for_eval` does before a checkpoint. The median of several runs, beside a copy of as many bytes.
"""

import os
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from absl import app, flags

from shampoo import AdamWShampoo

from .balance import OPTIONS, load_shapes

FLAGS = flags.FLAGS


def measure(rank: int, ranks: int, shapes: list[tuple[int, ...]], repeats: int, folder: str) -> None:
    """One process: print, on the first, the bytes that are gathered, and seconds."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    optimizer = AdamWShampoo([torch.nn.Parameter(torch.empty(shape)) for shape in shapes], **OPTIONS)
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        optimizer.consolidate()
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        gathered = [x for of_parameter in optimizer.state_dict()["state"].values() for x in of_parameter.values()]
        start = time.perf_counter()
        for x in gathered:
            x.clone()
        copied = time.perf_counter() - start
        size = sum(x.nbytes for x in gathered) / 1e9
        print(f"{size:.2f} GB gathered in {statistics.median(seconds):.2f} s; copied in {copied:.2f} s")
    dist.barrier()
    dist.destroy_process_group()


def main(_: Any) -> None:
    """Start the processes."""
    shapes = load_shapes()[FLAGS.workload]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (FLAGS.ranks, shapes, FLAGS.repeats, folder), nprocs=FLAGS.ranks)


if __name__ == "__main__":
    flags.DEFINE_enum("workload", "ogbg", sorted(load_shapes()), "whose shapes")
    flags.DEFINE_integer("ranks", 2, "how many processes", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "of which the median counts", lower_bound=1)
    app.run(main)
