"""Print how evenly the blocks of AlgoPerf's models are split among ranks: `python -m experiments.balance --ranks=8`.

Costs are `shampoo.state.block_cost` with the competition's options. For each workload:

    max/mean cost   largest cost of a rank over the mean, when blocks are assigned by cost, most expensive first
    by bytes        the same ratio under the competition's rule: by bytes rounded up to a multiple of 64, largest first
    lower bound     the smallest ratio that any rule could reach with blocks of these sizes

and the bytes that all ranks together exchange per step, per parameter.
"""

import json
from math import prod
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from absl import app, flags

from shampoo import AdamWShampoo
from shampoo.layout import Load, deal
from shampoo.state import Bucket, block_cost, make_buckets, powers

SHAPES = Path(__file__).with_name("algoperf_parameters.json")
OPTIONS: dict[str, Any] = {"block_size": 1024, "precondition_frequency": 100, "grafting": "adam"}

FLAGS = flags.FLAGS


def load_shapes() -> dict[str, list[tuple[int, ...]]]:
    """Return the parameter shapes of AlgoPerf's eight workloads (v0.6), by workload name."""
    return {name: [tuple(shape) for _, _, shape in entries] for name, entries in json.loads(SHAPES.read_text()).items()}


def blocks_of(bucket: Bucket) -> list[tuple[int, ...]]:
    """Return the shape of every block, over all ranks."""
    return [tuple(block) for layout in bucket.layouts for count, *block in layout.stacks for _ in range(count)]


def balance(shapes: list[tuple[int, ...]], ranks: int) -> dict[str, Any]:
    """Return the table row for parameters of these shapes."""
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    group = AdamWShampoo(params, **OPTIONS).param_groups[0]
    loads = [Load(0.0, 0)] * ranks
    buckets = make_buckets(group, 0, loads)
    blocks = [
        (block, block_cost(block, powers(block, group, bucket.factored), group))
        for bucket in buckets
        for block in blocks_of(bucket)
    ]
    in_bytes = [Load(-(-4 * prod(block) // 64) * 64, prod(block)) for block, _ in blocks]
    bytes_owners, _ = deal(in_bytes, [Load(0.0, 0)] * ranks, most=0.0)
    by_bytes = [sum(cost for (_, cost), owner in zip(blocks, bytes_owners, strict=True) if owner == r) for r in range(ranks)]
    mean = sum(rank.cost for rank in loads) / ranks
    sent = max(rank.numel for rank in loads) + len(shapes)
    return {
        "blocks": len(blocks),
        "max/mean cost": max(rank.cost for rank in loads) / mean,
        "by bytes": max(by_bytes) / mean,
        "lower bound": max(1.0, max(cost for _, cost in blocks) / mean),
        "exchanged bytes per parameter": 4 * ranks * sent / sum(map(prod, shapes)),
    }


def main(_: Any) -> None:
    """Print the table."""
    table = pd.DataFrame({name: balance(shapes, FLAGS.ranks) for name, shapes in load_shapes().items()}).T
    print(table.astype({"blocks": int}).round(4).to_string())


if __name__ == "__main__":
    flags.DEFINE_integer("ranks", 8, "number of ranks", lower_bound=1)
    app.run(main)
