"""Shapes of blocks: merge a parameter's dimensions, cut the result into tiles. Integers only.

A *block* is one preconditioning problem. A *tile* is a regular grid of equal blocks of one parameter: cutting every dimension
into full chunks and a remainder gives at most 2^k tiles, whatever the number of blocks.
"""

from itertools import product
from math import prod
from typing import NamedTuple


class Tile(NamedTuple):
    """A grid of equal blocks: along dimension d, `grid[d]` blocks of size `block[d]`, beginning at `start[d]`."""

    start: tuple[int, ...]
    grid: tuple[int, ...]
    block: tuple[int, ...]

    @property
    def num_blocks(self) -> int:
        """The number of blocks, prod(grid)."""
        return prod(self.grid)


def merge_dims(shape: tuple[int, ...], block_size: int) -> tuple[int, ...]:
    """Drop dimensions of size 1, then multiply each dimension into the one before it while the product is <= block_size.

    A shape with nothing left, a scalar's too, is (1,). With block_size 1024: (64, 64, 3, 3) -> (64, 576),
    (512, 512, 3, 3) -> (512, 512, 9). Source: the competition's submission.
    """
    merged: list[int] = []
    for size in shape:
        if size == 1:
            continue
        if merged and merged[-1] * size <= block_size:
            merged[-1] *= size
        else:
            merged.append(size)
    return tuple(merged) or (1,)


def merged_shape(shape: tuple[int, ...], block_size: int, merge: bool) -> tuple[int, ...]:
    """The shape in which a parameter is cut: that of `merge_dims`, or its own; (1,) for a scalar."""
    return merge_dims(shape, block_size) if merge else tuple(shape) or (1,)


def cut(shape: tuple[int, ...], block_size: int) -> list[Tile]:
    """Cut every dimension into chunks of block_size; the last chunk is the remainder (1280 -> 1024 + 256).

    Returns tiles in row-major order of their starts; none for a shape without elements.
    """
    chunks = []  # for each dimension: (start, number of chunks, size of a chunk)
    for size in shape:
        full, rest = divmod(size, block_size)
        chunks.append([(0, full, block_size)] * (full > 0) + [(full * block_size, 1, rest)] * (rest > 0))
    return [Tile(*map(tuple, zip(*choice, strict=True))) for choice in product(*chunks)]
