"""Merge a parameter's dimensions, cut it into blocks, and stack blocks of one shape; which blocks have factors. No tensors.

Each block is preconditioned separately. A grid is the blocks of one parameter that have one shape: cutting each of k dimensions
into full chunks and a remainder gives at most 2^k grids, however many blocks there are. A layout collects all blocks of one
shape that a rank owns in a stack (B, d1, ..., dk), and concatenates the stacks in one flat vector, so that elementwise work is
one call for all parameters and a matrix product is one call for all blocks of a shape.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, product
from math import prod
from typing import Any, NamedTuple

Shape = tuple[int, ...]
AUTO = {"exponents": 0.5, "max_factor_ratio": 2.0}
Exponents = tuple[float, ...]  # of the inverse roots of a block's dimensions; 0 where there is no factor


class Grid(NamedTuple):
    """Blocks of one shape in a parameter: along dimension d, `counts[d]` blocks of size `block[d]`, starting at `start[d]`."""

    start: Shape
    counts: Shape
    block: Shape
    param: int = 0  # index of the parameter in the layout
    number: int = 0  # index of the grid among the parameter's grids
    total: int = 0  # number of blocks in the grid before `split`
    first: int = 0  # row-major index of the first block in that grid
    row: int = 0  # row of the first block in its stack

    @property
    def size(self) -> int:
        """Number of blocks, prod(counts)."""
        return prod(self.counts)


class View(NamedTuple):
    """Arguments of `as_strided` that view a grid's blocks in a contiguous parameter, as (*counts, *block)."""

    param: int
    shape: Shape
    stride: Shape
    offset: int


class Layout(NamedTuple):
    """Where one rank's blocks are in its flat vector."""

    shapes: list[Shape]  # merged shape of each parameter
    stacks: tuple[Shape, ...]  # (B, d1, ..., dk) of each stack, in the order of the flat vector
    grids: list[list[Grid]]  # of each stack, in row order
    views: list[View]  # of each grid, in the order of the flat vector
    lengths: list[int]  # elements of each grid, in the same order
    numel: int  # elements of the flat vector
    params: list[list[int]]  # index of the parameter that each block belongs to: [stack][row]


def merge_dims(shape: Shape, block_size: int, max_factor_ratio: float | None = None) -> Shape:
    """Drop dimensions of size 1, then merge each dimension into the one before it while their product is <= block_size.

    With max_factor_ratio c, begin at the last dimension instead, and merge while the product d also satisfies d^2 <= c n, where
    n is the number of elements of a full block, so that a merged dimension is never too large for a factor. Return (1,) if no
    dimension is left. With block_size 1024: (64, 64, 3, 3) -> (64, 576), with c = 1 (64, 64, 9); (512, 512, 3, 3) ->
    (512, 512, 9). Source: the Shampoo submission to the AlgoPerf competition, which has no c.
    """
    limit, sizes = float(block_size), [size for size in shape if size != 1]
    if max_factor_ratio is not None:
        numel = prod(min(size, block_size) for size in shape)  # merging does not change it
        limit, sizes = min(limit, (max_factor_ratio * numel) ** 0.5), sizes[::-1]
    merged: list[int] = []
    for size in sizes:
        if merged and merged[-1] * size <= limit:
            merged[-1] *= size
        else:
            merged.append(size)
    return tuple(merged if max_factor_ratio is None else merged[::-1]) or (1,)


def cut(shape: Shape, block_size: int, param: int = 0) -> list[Grid]:
    """Cut every dimension into chunks of block_size; the last chunk is the remainder (1280 -> 1024 + 256).

    Return the grids in row-major order of their starts, or [] for a shape without elements.
    """
    chunks = []  # for each dimension: (start, number of chunks, size of a chunk)
    for size in shape:
        full, rest = divmod(size, block_size)
        chunks.append([(0, full, block_size)] * (full > 0) + [(full * block_size, 1, rest)] * (rest > 0))
    choices = (zip(*choice, strict=True) for choice in product(*chunks))
    return [Grid(start, counts, block, param, i, total=prod(counts)) for i, (start, counts, block) in enumerate(choices)]


def split(grid: Grid) -> list[Grid]:
    """Return each block of a grid as its own grid, in row-major order."""
    starts = product(*(range(x, x + n * b, b) for x, n, b in zip(grid.start, grid.counts, grid.block, strict=True)))
    ones = (1,) * len(grid.block)
    return [grid._replace(start=start, counts=ones, first=i) for i, start in enumerate(starts)]


def stack(shapes: Sequence[Shape], grids: Iterable[Grid]) -> Layout:
    """Return the layout of grids cut from parameters of these merged shapes, with one stack per block shape."""
    stacks: dict[Shape, list[Grid]] = {}
    for grid in grids:
        before = stacks.setdefault(grid.block, [])
        before.append(grid._replace(row=before[-1].row + before[-1].size if before else 0))
    views = [view(grid, shapes[grid.param]) for of_stack in stacks.values() for grid in of_stack]
    lengths = [prod(each.shape) for each in views]
    params = [[grid.param for grid in of_stack for _ in range(grid.size)] for of_stack in stacks.values()]
    shapes_of_stacks = tuple((sum(grid.size for grid in of_stack), *block) for block, of_stack in stacks.items())
    return Layout(list(shapes), shapes_of_stacks, list(stacks.values()), views, lengths, sum(lengths), params)


def view(grid: Grid, shape: Shape) -> View:
    """Return the `View` of a grid's blocks in a contiguous parameter of this merged shape."""
    stride = strides(shape)
    between = tuple(size * step for size, step in zip(grid.block, stride, strict=True))  # strides between blocks
    offset = sum(first * step for first, step in zip(grid.start, stride, strict=True))
    return View(grid.param, grid.counts + grid.block, between + stride, offset)


def strides(shape: Shape) -> Shape:
    """Return the strides of a contiguous tensor."""
    return tuple(accumulate(reversed(shape[1:]), int.__mul__, initial=1))[: len(shape)][::-1]


def resolve(options: Mapping[str, Any], name: str) -> Any:
    """Return an option; for "auto", its value in AUTO, or None with grafting "none", which does not set lengths anew."""
    return options[name] if options[name] != "auto" else None if options["grafting"] == "none" else AUTO[name]


def merged_shape(shape: Shape, options: Mapping[str, Any]) -> Shape:
    """Return the shape that is cut into blocks: `merge_dims` of this shape if the option is on; (1,) for a scalar."""
    ratio = resolve(options, "max_factor_ratio")
    return merge_dims(shape, options["block_size"], ratio) if options["merge_dims"] else shape or (1,)


def block_exponents(block: Sequence[int], options: Mapping[str, Any]) -> Exponents | None:
    """Return the exponent of each dimension's inverse root, in the paper 1/p and 1/q, or None for a block without factors.

    A dimension d of a block of n elements has a factor if d^2 <= max_factor_ratio n; those without have the exponent 0. A
    vector has none if precondition_vectors is False, or with preconditioner "soap". If `exponents` is None, each is 1/(2k) for
    k factors; if it is a number, each is that number. For a pair (left, right), the first of k dimensions gets left and each
    other one right/(k-1); a vector gets left + right. All are times `exponent_multiplier`.
    """
    order, exponents, ratio = len(block), resolve(options, "exponents"), resolve(options, "max_factor_ratio")
    kept = [ratio is None or d * d <= ratio * prod(block) for d in block]
    if not any(kept) or (order == 1 and (not options["precondition_vectors"] or options["preconditioner"] == "soap")):
        return None
    if isinstance(exponents, (tuple, list)):
        left, right = exponents
        each = [left] + [right / (order - 1)] * (order - 1) if order > 1 else [left + right]
    else:
        each = [1 / (2 * sum(kept)) if exponents is None else exponents] * order
    return tuple(options["exponent_multiplier"] * e if keep else 0.0 for e, keep in zip(each, kept, strict=True))


def parameter_exponents(shape: Shape, options: Mapping[str, Any]) -> list[Exponents]:
    """Return the exponents of each shape of a parameter's blocks that have factors; [] if a dimension is >= max_dim."""
    grids = cut(merged_shape(shape, options), options["block_size"]) if max(shape, default=1) < options["max_dim"] else []
    found = [block_exponents(grid.block, options) for grid in grids]
    return [exponents for exponents in found if exponents is not None]
