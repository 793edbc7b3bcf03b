"""Assign blocks to ranks: a pure function of block costs, so that every rank computes the same assignment."""

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

from .blocks import Layout, Shape, cut, split, stack

SLACK = 0.03  # how far a rank's operations may exceed the mean if that evens out what ranks send


class Cost(NamedTuple):
    """Cost of one block, or of all blocks of a rank: floating-point operations per step, and elements to send."""

    flops: float
    numel: int


def share_blocks(
    shapes: Sequence[Shape], block_size: int, flops: Callable[[Shape], float] = prod, loads: Sequence[Cost] = (Cost(0.0, 0),)
) -> tuple[list[Layout], list[Cost]]:
    """Cut parameters of these merged shapes into blocks and assign the blocks; return each rank's layout and load.

    `loads` is each rank's cost so far; `flops` maps a block's shape to its operations per step.
    """
    grids = [grid for i, shape in enumerate(shapes) for grid in cut(shape, block_size, param=i)]
    if len(loads) > 1:
        grids = [block for grid in grids for block in split(grid)]
    costs = [Cost(flops(grid.block), prod(grid.counts + grid.block)) for grid in grids]
    owners, loads = assign(costs, loads)
    own = [[grid for grid, owner in zip(grids, owners, strict=True) if owner == rank] for rank in range(len(loads))]
    return [stack(shapes, of_rank) for of_rank in own], loads


def assign(costs: Sequence[Cost], loads: Sequence[Cost]) -> tuple[list[int], list[Cost]]:
    """Return the rank that owns each item, and each rank's load.

    First balance operations: the most expensive item first, each to the rank with the smallest load (from zero loads, at most
    4/3 of the optimum; Graham 1969). Then balance elements, since the all-gather pads every rank to the largest: assign again,
    to the rank with the fewest elements, up to that maximum or (1 + SLACK) times the mean, whichever is larger.
    """
    owners, found = greedy(costs, loads, most=0.0)
    most = max(max(load.flops for load in found), (1 + SLACK) * sum(load.flops for load in found) / len(found))
    again, balanced = greedy(costs, loads, most)
    return (again, balanced) if max(load.flops for load in balanced) <= most else (owners, found)


def greedy(costs: Sequence[Cost], loads: Sequence[Cost], most: float) -> tuple[list[int], list[Cost]]:
    """Return the rank for each item, and each rank's load, taking the most expensive item first.

    Among ranks that stay under `most`, pick the one with the fewest elements; if there is none, the one with the fewest
    operations. Ties go to the earlier item and the lower rank, so that every rank gets the same result.
    """
    loads, owners = list(loads), [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i].flops):
        under = [r for r, load in enumerate(loads) if load.flops + costs[i].flops <= most]
        owner = min(under, key=lambda r: loads[r].numel) if under else min(range(len(loads)), key=lambda r: loads[r].flops)
        owners[i] = owner
        loads[owner] = Cost(loads[owner].flops + costs[i].flops, loads[owner].numel + costs[i].numel)
    return owners, loads
