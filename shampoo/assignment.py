"""Which rank owns which block: a pure function of costs, which every rank computes alike."""

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

from .blocks import Layout, cut, merged_shape, split, stack

SLACK = 0.03  # by how much a rank's cost may exceed the mean so that ranks send more nearly alike


class Cost(NamedTuple):
    """What a block takes, or all blocks of a rank: floating-point operations per step, and elements to send."""

    flops: float
    numel: int


def share_blocks(
    shapes: Sequence[tuple[int, ...]],
    block_size: int,
    merge: bool,
    flops: Callable[[tuple[int, ...]], float] = prod,
    carried: Sequence[Cost] = (Cost(0.0, 0),),
) -> tuple[list[Layout], list[Cost]]:
    """Return the layout of each rank for parameters of these shapes, and what each rank then carries.

    `carried` is what each rank carries already; `flops` is the cost of a block of a given shape.
    """
    merged = [merged_shape(shape, block_size, merge) for shape in shapes]
    grids = [grid for i, shape in enumerate(merged) for grid in cut(shape, block_size, param=i)]
    if len(carried) > 1:
        grids = [block for grid in grids for block in split(grid)]
    costs = [Cost(flops(grid.block), prod(grid.counts + grid.block)) for grid in grids]
    owners, carried = assign(costs, carried)
    own = [[grid for grid, owner in zip(grids, owners, strict=True) if owner == rank] for rank in range(len(carried))]
    return [stack(merged, of_rank) for of_rank in own], carried


def assign(costs: Sequence[Cost], carried: Sequence[Cost]) -> tuple[list[int], list[Cost]]:
    """Return the rank that owns each item, and what each rank then carries.

    First balance operations: the most expensive item first, each to the rank with the least, so that the maximum is at most 4/3
    of the best possible (Graham 1969). Then balance elements, since in the exchange every rank sends as much as the one with
    the most: assign again by elements, without exceeding that maximum, or (1 + SLACK) times the mean.
    """
    owners, found = greedy(costs, carried, most=0.0)
    most = max(max(rank.flops for rank in found), (1 + SLACK) * sum(rank.flops for rank in found) / len(found))
    again, balanced = greedy(costs, carried, most)
    return (again, balanced) if max(rank.flops for rank in balanced) <= most else (owners, found)


def greedy(costs: Sequence[Cost], carried: Sequence[Cost], most: float) -> tuple[list[int], list[Cost]]:
    """Return the rank for each item, and what each rank then carries, taking the most expensive item first.

    Among ranks that stay under `most`, pick the one with the fewest elements; if there is none, the one with the fewest
    operations. Ties go to the earlier item and the lower rank, so that all ranks find the same.
    """
    ranks, owners = list(carried), [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i].flops):
        under = [r for r, rank in enumerate(ranks) if rank.flops + costs[i].flops <= most]
        owner = min(under, key=lambda r: ranks[r].numel) if under else min(range(len(ranks)), key=lambda r: ranks[r].flops)
        owners[i] = owner
        ranks[owner] = Cost(ranks[owner].flops + costs[i].flops, ranks[owner].numel + costs[i].numel)
    return owners, ranks
