"""Convert between parameters, flat vectors, and stacks, by views and copies. `blocks.Layout` says where each block is."""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import accumulate, chain
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .blocks import Layout, Shape

Flat = tuple[Tensor, list[Tensor]]  # a flat vector and its `flat_views`


def stack_views(stacks: Sequence[Shape], flat: Tensor) -> list[Tensor]:
    """Return views of a flat vector as stacks of these shapes, each (B, d1, ..., dk)."""
    parts = torch.split_with_sizes(flat, list(map(prod, stacks)))
    return list(map(Tensor.view, parts, stacks))


def flatten(stacks: Sequence[Tensor]) -> Tensor:
    """Concatenate stacks into a new flat vector, the inverse of `stack_views`."""
    return torch.cat([stack.flatten() for stack in stacks])


def flat_views(layout: Layout, flat: Tensor, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Return a view (*counts, *block) of each grid in a flat vector, skipping parameters whose tensor in `tensors` is None."""
    parts = zip(torch.split_with_sizes(flat, layout.lengths), layout.views, strict=True)
    return [part.view(view.shape) for part, view in parts if tensors[view.param] is not None]


def grid_views(layout: Layout, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Return views of the same grids in `tensors`: per parameter, a contiguous tensor of its shape, or None to skip it."""
    return [
        X.as_strided(shape, stride, X.storage_offset() + offset)
        for param, shape, stride, offset in layout.views
        if (X := tensors[param]) is not None
    ]


def copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source into its target. The lists may be empty."""
    if targets:
        torch._foreach_copy_(targets, sources)


def add(targets: list[Tensor], sources: list[Tensor], scale: float) -> None:
    """X <- X + scale Y in place for each target X and source Y. The lists may be empty."""
    if targets:
        torch._foreach_add_(targets, sources, alpha=scale)


def load(layout: Layout, tensors: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device) -> Flat:
    """Copy tensors, one per parameter and of its shape, into a new flat vector; return it and its `flat_views`.

    Elements of parameters whose tensor is None are 0.
    """
    found = [None if X is None else X.contiguous() for X in tensors]
    make = torch.zeros if [X for X in tensors if X is None] else torch.empty
    flat = make(layout.numel, dtype=dtype, device=device)
    views = flat_views(layout, flat, tensors)
    copy(views, grid_views(layout, found))
    return flat, views


def spread(layout: Layout, values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a new flat vector in which each element has the value of its parameter."""
    flat = torch.empty(layout.numel, dtype=dtype, device=device)
    for part, view in zip(torch.split_with_sizes(flat, layout.lengths), layout.views, strict=True):
        part.fill_(values[view.param])
    return flat


def attempt(act: Callable[..., Any], *arguments: Any) -> tuple[Any, Exception | None]:
    """Return (result, None), or (None, error) if the call raises, so that collectives that other ranks wait in come first."""
    try:
        return act(*arguments), None
    except Exception as error:
        return None, error


def call_all(acts: Iterable[Callable[[], Any]]) -> list[Any]:
    """Return what each function returns. Raise an error after all calls only, since other ranks wait for each of them."""
    found = [attempt(act) for act in acts]
    for _, error in found:
        if error is not None:
            raise error
    return [result for result, _ in found]


@lru_cache(maxsize=256)
def chunks(stacks: tuple[Shape, ...], kinds: tuple[bool, ...], numel: int) -> list[tuple[slice, slice, list[int], bool]]:
    """Split the stacks into runs of one kind and of at most `numel` elements; a larger stack is a run of its own.

    Return for each run its slice of the flat vector, its slice of the list of stacks, the number of elements per stack, and
    its kind.
    """
    lengths = list(map(prod, stacks))
    ends, found, first = list(accumulate(lengths, initial=0)), [], 0
    for last in range(1, len(stacks) + 1):
        if last == len(stacks) or ends[last + 1] - ends[first] > numel or kinds[last] != kinds[first]:
            found.append((slice(ends[first], ends[last]), slice(first, last), lengths[first:last], kinds[first]))
            first = last
    return found


class Inputs(NamedTuple):
    """Gradients and weights of a bucket's parameters, as a step reads them."""

    grads: list[Tensor | None]  # of each parameter, None if it has none; only their norms where there is `flat`
    views: list[list[Tensor]]  # of each rank's grids in the weights, for decay and updates in place; none without a gradient
    in_place: bool  # whether the views share memory with the parameters, so that updating them updates the weights
    flat: Tensor | None = None  # the gradients of this rank's blocks, where a rank holds only shards of parameters


def read(params: Sequence[Tensor], layouts: Sequence[Layout], decay: float) -> Inputs:
    """Return the gradients of parameters, and views of their weights where decay or updates in place need them.

    DTensors are gathered, whole: a collective for each, even if only other ranks have its gradient.
    """
    grads: list[Tensor | None] = []
    weights: list[Tensor | None] = []
    in_place = True
    for p in params:
        G, W, plain = p.grad, p, p.is_contiguous()
        if hasattr(p, "full_tensor"):
            G, W, plain = full_gradient(p), full_tensor(p) if decay else p, False
        grads.append(G)
        weights.append(W.contiguous() if G is not None and (plain or decay) else None)
        in_place = in_place and (plain or G is None)
    return Inputs(grads, [grid_views(layout, weights) for layout in layouts], in_place)


def move(params: Sequence[Any], layouts: Sequence[Layout], inputs: Inputs, views: list[list[Tensor]], lr: float) -> None:
    """W <- W - lr P in place for each parameter with a gradient; `views` are the `flat_views` of each rank's P.

    Where inputs have `flat`, the exchange has moved shards already.
    """
    parts = list(chain.from_iterable(views))
    if inputs.in_place:
        add(list(chain.from_iterable(inputs.views)), parts, -lr)
    if inputs.in_place or inputs.flat is not None:
        return
    updates = [None if G is None else G.new_zeros(G.shape, dtype=parts[0].dtype) for G in inputs.grads]
    add([view for layout in layouts for view in grid_views(layout, updates)], parts, -lr)
    for p, full_update in zip(params, updates, strict=True):
        if full_update is not None and is_sharded(p):
            p.to_local().add_(full_update[tuple(slice(each.start, each.stop) for each in shard_box(p))])
        elif full_update is not None:
            p.add_(full_update)


def is_sharded(x: Any) -> bool:
    """Return whether x is a DTensor."""
    return hasattr(x, "full_tensor")


def shard_box(x: Any) -> tuple[range, ...]:
    """Return the indices of this rank's shard of a DTensor, in each dimension."""
    first = x.__create_chunk_list__()[0].offsets  # as torch.distributed.checkpoint asks for it
    return tuple(map(range, first, map(int.__add__, first, x.to_local().shape)))


def full_tensor(x: Any) -> Any:
    """Gather a DTensor, a collective on its mesh; return anything else unchanged."""
    return x.full_tensor() if is_sharded(x) else x


def full_gradient(p: Tensor) -> Tensor | None:
    """Return p.grad, or None. A DTensor is gathered: a collective, even if only other ranks have a gradient."""
    full: Tensor = full_tensor(torch.zeros_like(p) if p.grad is None and is_sharded(p) else p.grad)
    return None if p.grad is None else full


def checksum(x: Tensor) -> int:
    """Return sum_ij (1000003 i + 998244353 j) b_ij modulo 2^64 over i, j >= 1, to tell different tensors apart.

    b is x with its bits as integers, and all dimensions but the first flattened; a vector is one row.
    """
    bits = x.detach().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])
    rows = torch.atleast_2d(bits).flatten(1)
    sums = {998244353: rows.sum(dim=0, dtype=torch.int64), 1000003: rows.sum(dim=1, dtype=torch.int64)}
    return sum(int((S * (k * torch.arange(1, 1 + len(S), device=S.device))).sum()) for k, S in sums.items())
