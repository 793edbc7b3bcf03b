"""Time what sharing blocks among processes costs: `python -m experiments.exchange --workload=ogbg --ranks=2`; a minute.

Local processes of one thread, connected by gloo, step `AdamWShampoo` with its defaults on the parameters of an AlgoPerf model,
with the same gradients. A barrier before each all-gather separates waiting from exchanging. Print a row for ordinary steps and
one for steps that refresh all roots, medians in milliseconds:

    alone     the step of one process with all blocks, while the others rest
    step      the step of the slowest rank
    own       the work of the busiest rank: its own blocks, and applying all directions
    waiting   of the least busy rank, for the busiest: what an uneven share costs
    exchange  the all-gather
    MB        that each rank receives
"""

import os
import tempfile
import time
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from absl import app, flags
from torch.multiprocessing.spawn import spawn

import shampoo.ranks
from shampoo import AdamWShampoo

from .balance import load_shapes

FLAGS = flags.FLAGS

FREQUENCY = 5
ROUNDS = 4  # the first one is not counted


class Stopwatch:
    """Stands in for the all-gather of the optimizer: waits for all ranks, gathers, and keeps the seconds of both."""

    def __init__(self) -> None:
        self.gather = shampoo.ranks.all_gather
        self.waiting = self.exchange = 0.0
        self.nbytes = 0

    def __call__(self, output: torch.Tensor, given: torch.Tensor, **options: Any) -> None:
        """Gather `given` of all ranks in `output`."""
        start = time.perf_counter()
        dist.barrier()
        arrived = time.perf_counter()
        self.gather(output, given, **options)
        self.waiting, self.exchange, self.nbytes = arrived - start, time.perf_counter() - arrived, output.nbytes


def times(optimizer: AdamWShampoo, watch: Stopwatch) -> pd.DataFrame:
    """Return the milliseconds of each step but those of the first round."""
    params = optimizer.param_groups[0]["params"]
    draw, rows = torch.Generator().manual_seed(0), []
    for t in range(1, ROUNDS * FREQUENCY + 1):
        for p in params:
            p.grad = torch.randn(p.shape, generator=draw)
        start = time.perf_counter()
        optimizer.step()
        step = 1e3 * (time.perf_counter() - start)
        waiting, exchange = 1e3 * watch.waiting, 1e3 * watch.exchange
        kind = "refresh" if t % FREQUENCY == 0 else "ordinary"
        row = {"own": step - waiting - exchange, "waiting": waiting, "exchange": exchange, "MB": watch.nbytes / 1e6}
        rows.append({"kind": kind, "t": t, "step": step, **row})
    return pd.DataFrame(rows[FREQUENCY:])


def measure(rank: int, ranks: int, shapes: list[tuple[int, ...]], folder: str) -> None:
    """Run one process; rank 0 prints the table."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    shampoo.ranks.all_gather = watch = Stopwatch()
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    shared = times(AdamWShampoo(params, precondition_frequency=FREQUENCY), watch)
    alone = pd.DataFrame()
    if rank == 0:
        alone = times(AdamWShampoo(params, precondition_frequency=FREQUENCY, shard=False), Stopwatch())
    found: list[Any] = [None] * ranks
    dist.all_gather_object(found, shared)
    if rank == 0:
        by_step = pd.concat(found).groupby(["kind", "t"])
        table = by_step[["step", "own", "waiting", "MB"]].max().assign(exchange=by_step["exchange"].min())
        table = table.groupby("kind").median()
        table.insert(0, "alone", alone.groupby("kind")["step"].median())
        print(table[["alone", "step", "own", "waiting", "exchange", "MB"]].to_markdown(floatfmt=".0f"))
    dist.barrier()
    dist.destroy_process_group()


def main(_: Any) -> None:
    """Start the processes."""
    shapes = load_shapes()[FLAGS.workload]
    with tempfile.TemporaryDirectory() as folder:
        spawn(measure, (FLAGS.ranks, shapes, folder), nprocs=FLAGS.ranks)


if __name__ == "__main__":
    flags.DEFINE_enum("workload", "ogbg", sorted(load_shapes()), "AlgoPerf workload whose parameter shapes are used")
    flags.DEFINE_integer("ranks", 2, "number of processes", lower_bound=2)
    app.run(main)
