"""Send gradients and weights of DTensors from shards to the ranks that own the blocks, and directions back.

A shard is a box of a parameter's elements, and so is a block, since merged dimensions are never cut. For one run of blocks at a
time, an all-to-all sends what shards and blocks have in common. So each rank receives only what it owns, or what it holds.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, chain, pairwise
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .blocks import Layout, Shape, strides
from .copies import Inputs, add, call_all, chunks, copy, flat_views, shard_box, stack_views
from .ranks import Ranks, clamp_half
from .state import Bucket

if dist.is_available():
    all_to_all = dist.all_to_all_single

Box = tuple[range, ...]  # indices of some elements of a tensor, in each dimension
Block = tuple[int, int, int, int, Box]  # parameter, offset there, owner, start in the owner's flat vector, box
# What a shard and a block have in common: parameter, indices in the shard, arguments of `as_strided` in the owner's flat vector
Cut = tuple[int, tuple[slice, ...], tuple[Shape, Shape, int]]
Views = list[list[Tensor]]  # what to send to, or receive from, each rank


def numel(box: Box) -> int:
    """Return the number of elements in a box."""
    return prod(map(len, box))


def meet(a: Box, b: Box) -> Box:
    """Return what two boxes have in common."""
    return tuple(range(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True))


def find_shards(ranks: Ranks, params: Sequence[Any], names: dict[Tensor, str]) -> list[list[Box]]:
    """Return the boxes of the shards of DTensors: [rank][parameter]. A collective.

    Raises ValueError, on all ranks alike, if the ranks do not hold all elements of a parameter.
    """
    shards: list[list[Box]] = [[]] * ranks.size
    dist.all_gather_object(shards, list(map(shard_box, params)), ranks.group)
    for p, *of_ranks in zip(params, *shards, strict=True):
        found = sorted(set(of_ranks), key=lambda box: [each.start for each in box])
        if sum(map(numel, found)) != p.numel() or any(all(meet(a, b)) for a, b in pairwise(found)):
            raise ValueError(f"process_group lacks ranks that hold shards of {names[p]}; pass a group of all of them, or None")
    return shards


def find_blocks(layouts: Sequence[Layout], shapes: Sequence[Shape]) -> list[Block]:
    """Return all blocks of parameters of these shapes, in the same order on all ranks: row by row of each parameter."""
    found = []
    for owner, layout in enumerate(layouts):
        for view, start in zip(layout.views, accumulate(layout.lengths, initial=0), strict=False):
            shape, first = shapes[view.param], view.offset
            last = first + sum((size - 1) * step for size, step in zip(view.shape, view.stride, strict=True))
            ends = ((first // step % size, last // step % size + 1) for size, step in zip(shape, strides(shape), strict=True))
            found.append((view.param, first, owner, start, tuple(range(*each) for each in ends)))
    return sorted(found)


def cut(param: int, start: int, block: Box, shard: Box) -> list[Cut]:
    """Return what a block and a shard have in common, as a list of one cut or none."""
    if not all(box := meet(block, shard)):
        return []
    steps = strides(tuple(map(len, block)))
    indices = tuple(slice(x.start - y.start, x.stop - y.start) for x, y in zip(box, shard, strict=True))
    offset = start + sum((x.start - y.start) * step for x, y, step in zip(box, block, steps, strict=True))
    return [(param, indices, (tuple(map(len, box)), steps, offset))]


def cut_all(blocks: Sequence[Block], shards: Sequence[Sequence[Box]], rank: int) -> tuple[list[list[Cut]], list[list[Cut]]]:
    """Return a rank's cuts: of its shards with the blocks of each rank, and of its blocks with the shards of each rank."""
    of_shards, of_blocks = ([list[Cut]() for _ in shards] for _ in range(2))
    for i, _, owner, start, block in blocks:
        of_shards[owner] += cut(i, start, block, shards[rank][i])
        for holder, of_rank in enumerate(shards) if owner == rank else ():
            of_blocks[holder] += cut(i, start, block, of_rank[i])
    return of_shards, of_blocks


class Shards:
    """A bucket of DTensors on multiple ranks.

    Args:
        names: parameter names for error messages.
        dtype: in which directions are sent; None: that of the state.
        limit: bytes that the buffers of an all-to-all may take; it sends at least one block.
    """

    def __init__(self, ranks: Ranks, bucket: Bucket, names: dict[Tensor, str], dtype: torch.dtype | None, limit: int):
        self._bucket, self._group, self._dtype = bucket, ranks.group, dtype or bucket.dtype
        self._params: list[Any] = bucket.params
        shards, blocks = find_shards(ranks, self._params, names), find_blocks(bucket.layouts, bucket.shapes)
        copies = [sum(map(numel, of_ranks)) // p.numel() for p, *of_ranks in zip(self._params, *shards, strict=True)]
        self._copies = torch.tensor(copies, dtype=bucket.dtype, device=bucket.device)  # of each element, on all ranks
        sizes = tuple((copies[i], *map(len, box)) for i, _, _, _, box in blocks)
        runs = chunks(sizes, (True,) * len(sizes), limit // (2 * bucket.dtype.itemsize))
        self._cuts = [cut_all(blocks[run], shards, ranks.rank) for _, run, _, _ in runs]
        bucket.read = self.read

    def read(self, decay: float) -> Inputs:
        """Return what `copies.read` does, but of gradients and weights only the blocks that this rank owns."""
        bucket, params = self._bucket, self._params
        shards = [p.to_local() for p in params]
        grads = [
            W.new_zeros(()).expand(W.shape) if p.grad is None else p.grad.redistribute(placements=p.placements).to_local()
            for p, W in zip(params, shards, strict=True)
        ]
        squares = torch.stack(torch._foreach_norm(grads, 2, bucket.dtype)).square() / self._copies
        dist.all_reduce(squares, group=self._group)
        norms = [None if p.grad is None else norm for p, norm in zip(params, squares.sqrt(), strict=True)]
        G, *weights = flats = [bucket.zeros() for _ in range(2 if decay else 1)]
        views = chain(*map(self._views, (grads, shards), flats))
        call_all(partial(self._send, copy, bucket.dtype, *of_run) for of_run in views)
        of_ranks: list[list[Tensor]] = [[]] * bucket.rank  # no other rank's weights are needed
        of_ranks += [flat_views(bucket.layout, W, norms) for W in weights]
        return Inputs(norms, of_ranks, in_place=False, flat=G)

    def move(self, P: Tensor) -> None:
        """W <- W - lr P in place for each parameter with a gradient, given the flat vector P of this rank's blocks."""
        params, scale = self._params, -float(self._bucket.group["lr"])
        for X in flat_views(self._bucket.layout, P, [p if p.grad is None else None for p in params]):
            X.zero_()
        send = partial(self._send, partial(add, scale=scale), self._dtype)
        call_all(partial(send, *of_run[::-1]) for of_run in self._views([p.to_local() for p in params], P))

    def _views(self, shards: Sequence[Tensor], flat: Tensor) -> Iterator[tuple[Views, Views]]:
        """Yield, for each run of blocks, the views of what this rank's shards, and its blocks, have in common with others."""
        for of_shards, of_blocks in self._cuts:
            yield (
                [[shards[i][indices] for i, indices, _ in of_rank] for of_rank in of_shards],
                [[flat.as_strided(*view) for _, _, view in of_rank] for of_rank in of_blocks],
            )

    def _send(self, act: Callable[..., None], dtype: torch.dtype, sources: Views, targets: Views) -> None:
        """Send the sources in this dtype, and call act(targets, what other ranks send for them)."""
        out, into = ([sum(map(Tensor.numel, of_rank)) for of_rank in views] for views in (sources, targets))
        sent, received = (torch.empty(sum(n), dtype=dtype, device=self._bucket.device) for n in (out, into))
        (*own,), (*found,) = chain(*sources), chain(*targets)
        copy(stack_views([X.shape for X in own], sent), own)
        all_to_all(received, clamp_half(sent), into, out, group=self._group)
        act(found, stack_views([X.shape for X in found], received.to(self._bucket.dtype)))
