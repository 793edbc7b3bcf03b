"""Parameters <-> flat vectors <-> stacks: the views and copies between them. `blocks` says what lies where."""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, chain
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import Layout


def stack_views(stacks: Sequence[tuple[int, ...]], flat: Tensor) -> list[Tensor]:
    """Return views of a flat vector as stacks of these shapes, each (B, d1, ..., dk)."""
    parts = torch.split_with_sizes(flat, list(map(prod, stacks)))
    return list(map(Tensor.view, parts, stacks))


def flatten(stacks: Sequence[Tensor]) -> Tensor:
    """Return a new flat vector, the inverse of `stack_views`."""
    return torch.cat([stack.flatten() for stack in stacks])


def flat_views(layout: Layout, flat: Tensor, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Return views of a flat vector as its grids (*counts, *block), without those of parameters for which tensors has None."""
    parts = zip(torch.split_with_sizes(flat, layout.lengths), layout.views, strict=True)
    return [part.view(view.shape) for part, view in parts if tensors[view.param] is not None]


def grid_views(layout: Layout, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Return views of the same grids within contiguous tensors, one for each parameter and of its shape; none of a None."""
    return [
        X.as_strided(shape, stride, X.storage_offset() + offset)
        for param, shape, stride, offset in layout.views
        if (X := tensors[param]) is not None
    ]


def copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source into its target; lists may be empty."""
    if targets:
        torch._foreach_copy_(targets, sources)


def add(targets: list[Tensor], sources: list[Tensor], scale: float) -> None:
    """X <- X + scale Y in place for each target X and source Y; lists may be empty."""
    if targets:
        torch._foreach_add_(targets, sources, alpha=scale)


def load(
    layout: Layout, tensors: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """Return a new flat vector of the tensors, one for each parameter and of its shape, and its `flat_views`.

    Zeros where a tensor is None.
    """
    found, complete = [], True
    for X in tensors:
        found.append(None if X is None else X.contiguous())
        complete = complete and X is not None
    flat = (torch.empty if complete else torch.zeros)(layout.numel, dtype=dtype, device=device)
    views = flat_views(layout, flat, tensors)
    copy(views, grid_views(layout, found))
    return flat, views


def spread(layout: Layout, values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a new flat vector that has a parameter's value at each of its elements."""
    flat = torch.empty(layout.numel, dtype=dtype, device=device)
    for part, view in zip(torch.split_with_sizes(flat, layout.lengths), layout.views, strict=True):
        part.fill_(values[view.param])
    return flat


def assemble(layouts: Sequence[Layout], flats: Sequence[Tensor]) -> list[Tensor]:
    """Return a tensor of its merged shape for each parameter, given all ranks' flat vectors: the inverse of `load`.

    A view where a parameter lies in one piece; otherwise a copy.
    """
    found: list[Tensor | None] = [None] * len(layouts[0].shapes)
    if len(layouts) == 1:
        for part, grid in zip(torch.split_with_sizes(flats[0], layouts[0].lengths), chain(*layouts[0].grids), strict=True):
            shape = layouts[0].shapes[grid.param]
            found[grid.param] = part.view(shape) if grid.size == grid.counts[0] and part.numel() == prod(shape) else None
    copies = [flats[0].new_empty(shape) if X is None else None for X, shape in zip(found, layouts[0].shapes, strict=True)]
    for layout, flat in zip(layouts, flats, strict=True):
        copy(grid_views(layout, copies), flat_views(layout, flat, copies))
    return [X if copied is None else copied for X, copied in zip(found, copies, strict=True)]  # type: ignore[misc]


@cache
def chunks(stacks: tuple[tuple[int, ...], ...], numel: int) -> list[tuple[slice, slice, list[int]]]:
    """Return chunks of consecutive stacks with at most `numel` elements, or of one stack.

    For each its slice of the flat vector, of the stacks, and the number of elements of each stack.
    """
    lengths = list(map(prod, stacks))
    ends, found, first = list(accumulate(lengths, initial=0)), [], 0
    for last in range(1, len(stacks) + 1):
        if last == len(stacks) or ends[last + 1] - ends[first] > numel:
            found.append((slice(ends[first], ends[last]), slice(first, last), lengths[first:last]))
            first = last
    return found


class Inputs(NamedTuple):
    """What a step reads of a bucket's parameters; None for a parameter without a gradient."""

    grads: list[Tensor | None]  # full
    views: list[list[Tensor]]  # of each rank's grids within the weights, where decay reads them or they are updated in place
    in_place: bool  # whether the views are of the parameters themselves


def read(params: Sequence[Tensor], layouts: Sequence[Layout], decay: float) -> Inputs:
    """Return the gradients of parameters, and their weights if decay needs them or views can update them.

    A collective for each DTensor, even for one that has a gradient on other ranks alone. Read all buckets before anything that
    may fail on one rank, so that no rank waits for one that failed.
    """
    grads: list[Tensor | None] = []
    weights: list[Tensor | None] = []
    in_place, failure = True, None
    for p in params:
        G, W, plain = p.grad, p, p.is_contiguous()
        if hasattr(p, "full_tensor"):
            try:
                G, W, plain = full_gradient(p), full_tensor(p) if decay else p, False
            except Exception as error:
                failure = error  # raised below: other ranks wait for the collectives that follow
        grads.append(G)
        weights.append(W.contiguous() if G is not None and (plain or decay) else None)
        in_place = in_place and (plain or G is None)
    if failure is not None:
        raise failure
    return Inputs(grads, [grid_views(layout, weights) for layout in layouts], in_place)


def move(
    params: Sequence[Tensor], layouts: Sequence[Layout], inputs: Inputs, directions: list[list[Tensor]], lr: float
) -> None:
    """W <- W - lr P for parameters that have a gradient, given the `flat_views` of all ranks' directions P."""
    parts = list(chain.from_iterable(directions))
    if inputs.in_place:
        add(list(chain.from_iterable(inputs.views)), parts, -lr)
        return
    updates = [
        None if G is None else torch.zeros(p.shape, dtype=parts[0].dtype, device=p.device)
        for p, G in zip(params, inputs.grads, strict=True)
    ]
    add([view for layout in layouts for view in grid_views(layout, updates)], parts, -lr)
    for p, full_update in zip(params, updates, strict=True):
        if full_update is not None:
            add_full(p, full_update)


def full_tensor(x: Tensor) -> Tensor:
    """Return the full tensor of a DTensor, a collective on its mesh; any other tensor unchanged."""
    full: Tensor = getattr(x, "full_tensor", lambda: x)()
    return full


def full_gradient(p: Tensor) -> Tensor | None:
    """Return the full gradient, or None without one. A collective for a DTensor, even if only other ranks have a gradient."""
    if not hasattr(p, "full_tensor"):
        return p.grad
    full = full_tensor(torch.zeros_like(p) if p.grad is None else p.grad)
    return None if p.grad is None else full


def add_full(x: Tensor, update: Tensor) -> None:
    """x <- x + update, given the full update; of a DTensor each rank adds to its own part."""
    if not hasattr(x, "full_tensor"):
        x.add_(update)
        return
    from torch.distributed.tensor import DTensor, Replicate  # takes 1.5 s, which only users of DTensors pay

    mesh, placements = x.device_mesh, x.placements  # type: ignore[attr-defined]
    replicated = DTensor.from_local(update, mesh, [Replicate()] * mesh.ndim, run_check=False)
    x.to_local().add_(replicated.redistribute(mesh, placements).to_local())  # type: ignore[attr-defined]


def is_sharded(x: Tensor) -> bool:
    """Return whether x is a DTensor."""
    return hasattr(x, "full_tensor")


def checksum(x: Tensor) -> int:
    """Return an integer that depends on every bit of x and on its place."""
    bits = x.detach().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])
    rows = bits.reshape(x.shape[0] if x.dim() else 1, -1)
    sums = [rows.sum(dim=d, dtype=torch.int64) for d in (0, 1)]
    return sum(int((S * torch.arange(1, 1 + len(S), device=S.device)).sum()) for S in sums) if x.numel() else 0
