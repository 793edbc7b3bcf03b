"""Print how evenly the blocks of AlgoPerf's models are split among ranks: `python -m experiments.balance --ranks=8`.

Costs are `shampoo.state.block_flops` with the competition's options, or with AdamWShampoo's --defaults. For each workload:

    max/mean cost   largest cost of a rank over the mean, when blocks are assigned by cost, most expensive first
    by bytes        the same ratio under the competition's rule: by bytes rounded up to a multiple of 64, largest first
    lower bound     the smallest ratio that any rule could reach with blocks of these sizes

the bytes that all ranks together exchange per step, per parameter, and of the busiest rank, GFLOP per step, refreshes included,
and the number of roots.
"""

import json
from math import prod
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from absl import app, flags

from shampoo import AdamWShampoo
from shampoo.assignment import Cost, greedy
from shampoo.blocks import block_exponents
from shampoo.hyperparameters import COMPETITION
from shampoo.state import block_flops, make_buckets

SHAPES = Path(__file__).with_name("algoperf_parameters.json")
OPTIONS: dict[str, Any] = {**COMPETITION, "exponents": None, "block_size": 1024, "precondition_frequency": 100}

FLAGS = flags.FLAGS


def load_shapes() -> dict[str, list[tuple[int, ...]]]:
    """Return the parameter shapes of AlgoPerf's eight workloads (v0.6), by workload name."""
    return {name: [tuple(shape) for _, _, shape in entries] for name, entries in json.loads(SHAPES.read_text()).items()}


def balance(shapes: list[tuple[int, ...]], ranks: int, options: dict[str, Any] = OPTIONS) -> dict[str, Any]:
    """Return the table row for parameters of these shapes and options of AdamWShampoo."""
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    group: Any = AdamWShampoo(params, **options).param_groups[0]
    blocks = [  # rank, shape, floating-point operations, number of roots
        (rank, tuple(block), block_flops(group, bucket.factored, tuple(block)), sum(p > 0 for p in exponents))
        for bucket in make_buckets([group], 0, ranks)
        for rank, layout in enumerate(bucket.layouts)
        for number, *block in layout.stacks
        for exponents in [(block_exponents(block, group) if bucket.factored else None) or ()]
        for _ in range(number)
    ]
    in_bytes = [Cost(-(-4 * prod(block) // 64) * 64, prod(block)) for _, block, _, _ in blocks]
    bytes_owners, _ = greedy(in_bytes, [Cost(0.0, 0)] * ranks, most=0.0)
    flops = [each for *_, each, _ in blocks]
    by_bytes = [sum(each for each, owner in zip(flops, bytes_owners, strict=True) if owner == r) for r in range(ranks)]
    by_cost = [sum(each for owner, _, each, _ in blocks if owner == r) for r in range(ranks)]
    mean = sum(by_cost) / ranks
    sent = max(sum(prod(block) for owner, block, *_ in blocks if owner == r) for r in range(ranks)) + len(shapes)
    return {
        "blocks": len(blocks),
        "max/mean cost": max(by_cost) / mean,
        "by bytes": max(by_bytes) / mean,
        "lower bound": max(1.0, max(flops) / mean),
        "exchanged bytes per parameter": 4 * ranks * sent / sum(map(prod, shapes)),
        "GFLOP": max(by_cost) / 1e9,
        "roots": max(sum(roots for owner, *_, roots in blocks if owner == r) for r in range(ranks)),
    }


def main(_: Any) -> None:
    """Print the table."""
    options = {} if FLAGS.defaults else OPTIONS
    table = pd.DataFrame({name: balance(shapes, FLAGS.ranks, options) for name, shapes in load_shapes().items()}).T
    print(table.astype({"blocks": int, "roots": int}).round(4).to_string())


if __name__ == "__main__":
    flags.DEFINE_boolean("defaults", False, "use the defaults of AdamWShampoo")
    flags.DEFINE_integer("ranks", 8, "number of ranks", lower_bound=1)
    app.run(main)
