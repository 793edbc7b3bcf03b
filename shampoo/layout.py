"""Parameters <-> flat vector <-> stacks.

All blocks of one shape form a stack, and all stacks lie end to end in one flat vector, so that elementwise work is one call for
every parameter and a matrix product one call for every shape. A parameter's tiles (see `blocking`) are contiguous pieces of it.
"""

from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .blocking import Tile, cut, merge_dims


class Piece(NamedTuple):
    """One tile of one parameter, a contiguous piece of the flat vector."""

    param: int
    number: int  # among the parameter's tiles
    tile: Tile
    first: int  # where its blocks begin in their stack


class Layout(NamedTuple):
    """Where every block lies."""

    shapes: list[tuple[int, ...]]  # of each parameter, merged
    pieces: list[list[Piece]]  # of each stack, in the order of its blocks
    stacks: list[tuple[int, ...]]  # (B, d1, ..., dk) of each stack, in the order of the flat vector

    @property
    def numel(self) -> int:
        """The length of the flat vector."""
        return sum(map(prod, self.stacks))


def build_layout(shapes: Sequence[tuple[int, ...]], block_size: int, merge: bool) -> Layout:
    """The layout for parameters of these shapes, a pure function of its arguments."""
    merged = [merge_dims(shape, block_size) if merge else tuple(shape) or (1,) for shape in shapes]
    stacks: dict[tuple[int, ...], list[Piece]] = {}  # by the shape of a block
    count: dict[tuple[int, ...], int] = {}
    for i, shape in enumerate(merged):
        for number, tile in enumerate(cut(shape, block_size)):
            first = count.get(tile.block, 0)
            stacks.setdefault(tile.block, []).append(Piece(i, number, tile, first))
            count[tile.block] = first + tile.num_blocks
    return Layout(merged, list(stacks.values()), [(count[block], *block) for block in stacks])


def stack_views(layout: Layout, flat: Tensor) -> list[Tensor]:
    """The flat vector seen as its stacks, each (B, d1, ..., dk)."""
    return [part.view(shape) for part, shape in zip(flat.split([prod(s) for s in layout.stacks]), layout.stacks, strict=True)]


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


def apply(layout: Layout, tensors: Sequence[Tensor | None], P: Tensor, scale: float) -> None:
    """X <- X + scale P in place, for each parameter's tensor X and its part of the flat vector P; a None is left out."""
    merged = merged_views(layout, tensors)
    parts, views = matched_views(layout, P, merged)
    if parts:
        torch._foreach_add_(views, parts, alpha=scale)
    for x, y in zip(tensors, merged, strict=True):
        if x is not None and y is not None and y.data_ptr() != x.data_ptr():  # a copy
            x.copy_(y.view(x.shape))


def gather(layout: Layout, flat: Tensor) -> list[Tensor]:
    """The inverse of `load`: for each parameter a new tensor of its merged shape."""
    whole = [flat.new_empty(shape) for shape in layout.shapes]
    for piece, part in piece_views(layout, flat):
        tile_view(whole[piece.param], piece.tile).copy_(part)
    return whole
