"""Parameters <-> flat vectors of the ranks <-> stacks.

All blocks of one shape that a rank owns form a stack, and all stacks lie end to end in one flat vector, so that elementwise
work is one call for every parameter and a matrix product one call for every shape. A parameter's tiles (see `blocking`) are
contiguous pieces of it; with several ranks, which share the blocks of a tile out, single blocks are.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .blocking import Tile, cut, merged_shape


class Piece(NamedTuple):
    """A tile of a parameter, or one block of a tile: a contiguous piece of the flat vector."""

    param: int
    number: int  # among the parameter's tiles
    offset: int  # of its first block among the tile's blocks
    tile: Tile
    first: int  # where its blocks begin in their stack


class Load(NamedTuple):
    """What a block, or all blocks of a rank, cost a step, and how many numbers they have."""

    cost: float
    numel: int


class Layout(NamedTuple):
    """Where every block of a rank lies."""

    shapes: list[tuple[int, ...]]  # of each parameter, merged
    pieces: list[list[Piece]]  # of each stack, in the order of its blocks
    stacks: list[tuple[int, ...]]  # (B, d1, ..., dk) of each stack, in the order of the flat vector

    @property
    def numel(self) -> int:
        """The length of the flat vector."""
        return sum(map(prod, self.stacks))


def build_layouts(
    shapes: Sequence[tuple[int, ...]],
    block_size: int,
    merge: bool,
    cost: Callable[[tuple[int, ...]], float] = prod,
    loads: list[Load] | None = None,
) -> list[Layout]:
    """The layout of each rank for parameters of these shapes, a pure function of its arguments.

    `loads` has what each rank has to bear already, and grows by the blocks that it gets; `cost` is that of a block of a shape.
    None is one rank.
    """
    loads = [Load(0.0, 0)] if loads is None else loads
    merged = [merged_shape(shape, block_size, merge) for shape in shapes]
    pieces = [
        Piece(i, number, offset, tile, 0)
        for i, shape in enumerate(merged)
        for number, whole in enumerate(cut(shape, block_size))
        for offset, tile in enumerate([whole] if len(loads) == 1 else single_blocks(whole))
    ]
    items = [Load(cost(piece.tile.block), prod(piece.tile.grid + piece.tile.block)) for piece in pieces]
    owners, loads[:] = assign(items, loads)
    return [
        _stacked(merged, [piece for piece, r in zip(pieces, owners, strict=True) if r == rank]) for rank in range(len(loads))
    ]


def _stacked(shapes: list[tuple[int, ...]], pieces: list[Piece]) -> Layout:
    stacks: dict[tuple[int, ...], list[Piece]] = {}  # by the shape of a block
    count: dict[tuple[int, ...], int] = {}
    for piece in pieces:
        block = piece.tile.block
        first = count.get(block, 0)
        stacks.setdefault(block, []).append(piece._replace(first=first))
        count[block] = first + piece.tile.num_blocks
    return Layout(shapes, list(stacks.values()), [(count[block], *block) for block in stacks])


def assign(items: Sequence[Load], loads: Sequence[Load], slack: float = 0.03) -> tuple[list[int], list[Load]]:
    """The rank that owns each item, and the loads of all ranks then, given those that they have already.

    Costs first: the dearest item first, each to the rank with the least cost, so that the largest is at most 4/3 of the best
    possible (Graham). Then numbers, since in the exchange all ranks send as much as the one with most: the same again, but each
    to the rank with the fewest numbers, as long as no cost exceeds the largest so found, or the mean by more than the slack.
    """
    owners, found = deal(items, loads, 0.0)
    most = max(max(rank.cost for rank in found), (1 + slack) * sum(rank.cost for rank in found) / len(found))
    again, balanced = deal(items, loads, most)
    return (again, balanced) if max(rank.cost for rank in balanced) <= most else (owners, found)


def deal(items: Sequence[Load], loads: Sequence[Load], most: float) -> tuple[list[int], list[Load]]:
    """Each item, the dearest first, to the rank with the fewest numbers of those that it brings to at most this cost, or else
    to that with the least cost. Ties go to the earlier item and the lower rank, so that all ranks find the same.
    """
    loads, owners = list(loads), [0] * len(items)
    for i in sorted(range(len(items)), key=lambda i: -items[i].cost):
        within = [r for r, rank in enumerate(loads) if rank.cost + items[i].cost <= most]
        if within:
            owners[i] = min(within, key=lambda r: loads[r].numel)
        else:
            owners[i] = min(range(len(loads)), key=lambda r: loads[r].cost)
        rank = loads[owners[i]]
        loads[owners[i]] = Load(rank.cost + items[i].cost, rank.numel + items[i].numel)
    return owners, loads


def owner(layout: Layout, stack: int, block: int) -> int:
    """The parameter that a block of a stack belongs to."""
    return next(piece.param for piece in reversed(layout.pieces[stack]) if piece.first <= block)


def single_blocks(tile: Tile) -> list[Tile]:
    """Each block of a tile as a tile of its own, in row-major order."""
    starts = product(*(range(x, x + n * b, b) for x, n, b in zip(tile.start, tile.grid, tile.block, strict=True)))
    return [Tile(start, (1,) * len(start), tile.block) for start in starts]


def stack_views(layout: Layout, flat: Tensor) -> list[Tensor]:
    """The flat vector seen as its stacks, each (B, d1, ..., dk)."""
    return [part.view(shape) for part, shape in zip(flat.split([prod(s) for s in layout.stacks]), layout.stacks, strict=True)]


def few_stacks(layout: Layout, numel: int) -> Iterator[tuple[slice, Layout]]:
    """The layout a few consecutive stacks at a time, with at most `numel` numbers together, or one stack: their part of the
    flat vector, and their layout within it.
    """
    ends = list(accumulate(map(prod, layout.stacks), initial=0))
    first = 0
    while first < len(layout.stacks):
        last = max(first + 1, bisect_right(ends, ends[first] + numel) - 1)
        yield slice(ends[first], ends[last]), Layout(layout.shapes, layout.pieces[first:last], layout.stacks[first:last])
        first = last


def flatten(stacks: Iterable[Tensor]) -> Tensor:
    """The inverse of `stack_views`, a new flat vector."""
    return torch.cat([stack.flatten() for stack in stacks])


def piece_views(layout: Layout, flat: Tensor) -> list[tuple[Piece, Tensor]]:
    """The flat vector seen as its pieces, each with its blocks (*grid, *block)."""
    pieces = [piece for stack in layout.pieces for piece in stack]
    views = [piece.tile.grid + piece.tile.block for piece in pieces]
    parts = flat.split([prod(view) for view in views])
    return [(piece, part.view(view)) for piece, part, view in zip(pieces, parts, views, strict=True)]


def tile_view(X: Tensor, tile: Tile) -> Tensor:
    """The tile's blocks within a parameter X of merged shape: a view (*grid, *block)."""
    stride = X.stride()
    offset = sum(first * step for first, step in zip(tile.start, stride, strict=True))
    between = tuple(size * step for size, step in zip(tile.block, stride, strict=True))  # from block to block
    return X.as_strided(tile.grid + tile.block, between + stride, X.storage_offset() + offset)


def merged_views(layout: Layout, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Each parameter's tensor in its merged shape: a view, or a copy where the strides allow none (some channels-last ones)."""
    return [None if x is None else x.reshape(shape) for x, shape in zip(tensors, layout.shapes, strict=True)]


def matched_views(layout: Layout, flat: Tensor, tensors: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """The pieces of the flat vector and, in the same order and shape, of the tensors; without those of a None."""
    pairs = [(part, tile_view(x, p.tile)) for p, part in piece_views(layout, flat) if (x := tensors[p.param]) is not None]
    return [part for part, _ in pairs], [view for _, view in pairs]


def fill(layout: Layout, flat: Tensor, tensors: Sequence[Tensor | None]) -> None:
    """Copy tensors, one for each parameter and of its shape, into the flat vector; a None leaves its part as it is."""
    parts, views = matched_views(layout, flat, merged_views(layout, tensors))
    if parts:
        torch._foreach_copy_(parts, views)


def load(layout: Layout, tensors: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new flat vector of the tensors, one for each parameter and of its shape; zeros where a tensor is None."""
    new = torch.zeros if any(x is None for x in tensors) else torch.empty
    flat = new(layout.numel, dtype=dtype, device=device)
    fill(layout, flat, tensors)
    return flat


def add(layout: Layout, flat: Tensor, tensors: Sequence[Tensor | None], scale: float) -> None:
    """flat <- flat + scale x in place, for the tensors' parts x, as `fill` copies them."""
    parts, views = matched_views(layout, flat, merged_views(layout, tensors))
    if parts:
        torch._foreach_add_(parts, views, alpha=scale)


def apply(layouts: Sequence[Layout], tensors: Sequence[Tensor | None], flats: Sequence[Tensor], scale: float) -> None:
    """X <- X + scale P in place, for each parameter's tensor X and its parts P of the ranks' flat vectors; None is left out."""
    merged = merged_views(layouts[0], tensors)
    matched = [matched_views(layout, P, merged) for layout, P in zip(layouts, flats, strict=True)]
    if views := [view for _, of_rank in matched for view in of_rank]:
        torch._foreach_add_(views, [part for parts, _ in matched for part in parts], alpha=scale)
    for x, y in zip(tensors, merged, strict=True):
        if x is not None and y is not None and y.data_ptr() != x.data_ptr():  # a copy
            x.copy_(y.view(x.shape))


def gather(layouts: Sequence[Layout], flats: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `load` for all ranks' flat vectors together: for each parameter a new tensor of its merged shape."""
    whole = [flats[0].new_empty(shape) for shape in layouts[0].shapes]
    for layout, flat in zip(layouts, flats, strict=True):
        parts, views = matched_views(layout, flat, whole)
        if parts:
            torch._foreach_copy_(views, parts)
    return whole
