"""State of buckets <-> state per parameter, as `state_dict()` holds it.

For each parameter: `exp_avg`, `exp_avg_sq`, `momentum_buffer`, where used, in its shape, and for each of its grids n and
dimensions d `factors.n.d`, `inv_roots.n.d`, and with solver "qr" `eigvecs.n.d`, (blocks of the grid, size, size). Nothing
depends on how blocks are stacked, or on which rank owns them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .assignment import Cost
from .copies import assemble, copy, flat_views, grid_views
from .options import Group, check_options, check_value, integer, parameter_names
from .ranks import Ranks
from .state import Bucket, allocate, make_buckets, moments, tensors


def blocks(bucket: Bucket) -> Iterator[tuple[int, str, slice, Tensor]]:
    """Yield parameter, key, rows of what is saved, and a view of the blocks, for each grid and tensor of a preconditioner."""
    for grids, preconditioner in zip(bucket.layout.grids, bucket.preconditioners, strict=False):
        for name, d, X in preconditioner.tensors():
            for grid in grids:
                rows = slice(grid.first, grid.first + grid.size)
                yield grid.param, f"{name}.{grid.number}.{d}", rows, X[grid.row : grid.row + grid.size]


def collect(buckets: Sequence[Bucket], ranks: Ranks, to: int | None) -> list[list[Bucket]]:
    """Return for each bucket those of all ranks, on the CPU of rank `to`, or of all if None; elsewhere []. A collective."""
    receives = to in (None, ranks.rank)
    device = torch.device("cpu" if receives else "meta")
    collected = []
    for own in buckets:
        shards = [
            allocate(own.group, own.params, device, own.dtype, own.factored, own.layouts, rank) for rank in range(ranks.size)
        ]
        for owner, shard in enumerate(shards):
            sources = tensors(own) if owner == ranks.rank else [None] * len(tensors(shard))
            for source, X in zip(sources, tensors(shard), strict=True):
                send(source, X, owner, own.device, ranks, to)
        collected.append(shards)
    return collected if receives else []


def send(source: Any, X: Tensor, owner: int, device: torch.device, ranks: Ranks, to: int | None) -> None:
    """Copy the owner's tensor, `source` there, to X on rank `to`, or on all if None, through a device with collectives."""
    if to is None:
        buffer = torch.empty_like(X, device=device) if source is None else source
        dist.broadcast(buffer, dist.get_global_rank(ranks.group, owner), ranks.group)
        X.copy_(buffer)
    elif owner == to == ranks.rank:
        X.copy_(source)
    elif owner == ranks.rank:
        dist.send(source, dist.get_global_rank(ranks.group, to), ranks.group)
    elif to == ranks.rank:
        buffer = torch.empty_like(X, device=device)
        dist.recv(buffer, dist.get_global_rank(ranks.group, owner), ranks.group)
        X.copy_(buffer)


def pack(buckets: Sequence[Sequence[Bucket]], params: Sequence[Tensor]) -> dict[int, dict[str, Tensor]]:
    """Return the state of each parameter under its index in `params`, given all ranks' buckets for each bucket.

    Moments are copies; matrices are views of the live state where one rank owns a whole grid.
    """
    index = {p: i for i, p in enumerate(params)}
    state: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(params))}
    for shards in buckets:
        of_params = [state[index[p]] for p in shards[0].params]
        for named in zip(*map(moments, shards), strict=True):
            full = assemble(shards[0].layouts[: len(shards)], [flat for _, flat in named])
            for of_param, p, X in zip(of_params, shards[0].params, full, strict=True):
                of_param[named[0][0]] = X.view(p.shape)
        parts: dict[tuple[int, str], list[tuple[int, Tensor]]] = {}
        for i, key, rows, X in chain(*map(blocks, shards)):
            parts.setdefault((i, key), []).append((rows.start, X))
        for (i, key), found in parts.items():
            in_order = [X for _, X in sorted(found, key=lambda part: part[0])]
            of_params[i][key] = in_order[0] if len(in_order) == 1 else torch.cat(in_order)
    return state


def unpack(buckets: Sequence[Bucket], saved: dict[Tensor, dict[str, Tensor]], names: dict[Tensor, str]) -> None:
    """Copy the saved state of each parameter into the buckets, keeping their dtypes.

    Raises ValueError, naming the parameter, if something is missing or has another shape.
    """

    def find(p: Tensor, key: str, shape: tuple[int, ...]) -> Tensor:
        """Return a parameter's saved tensor, checked."""
        X = saved[p].get(key)
        if not isinstance(X, Tensor) or X.shape != shape or not X.is_floating_point():
            found = f"{X.dtype} of shape {tuple(X.shape)}" if isinstance(X, Tensor) else "nothing" if X is None else repr(X)
            raise ValueError(f"the state of {names[p]} holds {found} for {key}; it must be real and have shape {shape}")
        return X

    for bucket in buckets:
        for name, flat in moments(bucket):
            found = [find(p, name, tuple(p.shape)) for p in bucket.params]
            copy(flat_views(bucket.layout, flat, found), grid_views(bucket.layout, [X.contiguous() for X in found]))
        count: Counter[tuple[int, str]] = Counter()  # of the blocks of each grid, over all ranks
        for grid in (grid for layout in bucket.layouts for grids in layout.grids for grid in grids):
            count[grid.param, str(grid.number)] += grid.size
        for i, key, rows, X in blocks(bucket):
            X.copy_(find(bucket.params[i], key, (count[i, key.split(".")[1]], *X.shape[1:]))[rows])


def read(
    state_dict: dict[str, Any], groups: Sequence[dict[str, Any]], ranks: Ranks
) -> tuple[list[Group], list[list[Bucket]], list[Cost]]:
    """Return the groups of a state_dict, a rank's buckets of each with its state, and what each rank carries.

    Raises ValueError for a state_dict that does not fit.
    """
    found, saved = match_groups(state_dict, groups)
    for group in found:
        check_options(group)
        check_value("start_preconditioning_step", group["start_preconditioning_step"], integer(1))
    carried, buckets = [Cost(0.0, 0)] * ranks.size, []
    for group in found:
        of_group, carried = make_buckets(group, ranks.rank, carried)
        unpack(of_group, saved, parameter_names(found))
        buckets.append(of_group)
    return found, buckets, carried


def match_groups(
    state_dict: dict[str, Any], groups: Sequence[dict[str, Any]]
) -> tuple[list[Group], dict[Tensor, dict[str, Tensor]]]:
    """Return the groups with the options of a state_dict, and its state for each of their parameters.

    Raises ValueError if the state_dict has other groups, or none.
    """
    try:
        saved, state = state_dict["param_groups"], state_dict["state"]
        options = [{name: x for name, x in group.items() if name not in ("params", "param_names")} for group in saved]
        keys = [list(group["params"]) for group in saved]
        states = [dict(state.get(key, {})) for key in chain(*keys)]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"this is no state_dict of an optimizer: {error!r} when looking for param_groups and state") from error
    sizes, expected = [len(of_group) for of_group in keys], [len(group["params"]) for group in groups]
    if sizes != expected:
        raise ValueError(f"the state_dict has groups of {sizes} parameters; this optimizer has groups of {expected}")
    params = [p for group in groups for p in group["params"]]
    merged = [cast(Group, {**group, **other}) for group, other in zip(groups, options, strict=True)]
    return merged, dict(zip(params, states, strict=True))
