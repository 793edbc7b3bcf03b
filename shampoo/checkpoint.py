"""Convert the state of buckets to state per parameter, for `state_dict()` and `optimizer.state`, and back.

Each parameter has `step`, the number of steps in which it had a gradient, and the moments in use (`exp_avg`, `exp_avg_sq`,
`momentum_buffer`), in its shape. For grid n (see `blocks`) and dimension d, both from 0, it has `factors.n.d`, `inv_roots.n.d`,
and with solver "qr" `eigvecs.n.d`, each (blocks, size, size); with preconditioner "soap", `eigvecs.n.d` instead of
`inv_roots.n.d`, and `rotated_exp_avg_sq` instead of `exp_avg_sq`. Keys do not depend on how blocks are stacked or which rank
owns them. Other keys are foreign: they are kept unchanged.

In version 1, parameters have no `step`, and take that of their group.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import chain
from math import prod
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .blocks import View
from .copies import flat_views
from .options import ADDED, OPTIONS, Group, check_groups, parameter_names, plain
from .ranks import Ranks
from .rules import check_value, one_of
from .state import Bucket, describe_tensor, is_own, make_buckets, moments, read_steps, tensors

VERSION = 2
# State that may be missing after a change of groups or of `state`, and then starts at zero.
MAY_START_LATE = ("exp_avg", "momentum_buffer", "factors", "inv_roots", "eigvecs")

Entries = dict[Any, dict[str, Any]]  # the state of each parameter, by key


def pieces(bucket: Bucket) -> Iterator[tuple[str, tuple[int, ...], View, Tensor]]:
    """Yield each grid's piece of each state tensor: (key, shape of the saved tensor, `View` of the piece there, the piece)."""
    layout = bucket.layout
    for name, flat in moments(bucket):
        for view, X in zip(layout.views, flat_views(layout, flat, bucket.params), strict=True):
            yield name, tuple(bucket.shapes[view.param]), view, X
    for grids, preconditioner in zip(layout.grids, bucket.preconditioners, strict=True):
        for name, d, matrices in preconditioner.tensors():
            for grid in grids:
                X = matrices[grid.row : grid.row + grid.size]
                view = View(grid.param, tuple(X.shape), X.stride(), grid.first * X.stride(0))
                yield f"{name}.{grid.number}.{d}", (grid.total, *X.shape[1:]), view, X


def place(view: View, X: Tensor) -> Tensor:
    """Return the piece of a contiguous tensor that the `View` describes."""
    return X.as_strided(view.shape, view.stride, X.storage_offset() + view.offset)


def zero_shards(buckets: Sequence[Bucket], ranks: Ranks, device: str = "cpu") -> list[list[Bucket]]:
    """Return found[bucket][rank], the counterparts of buckets on all ranks, all zeros on `device`; on one rank, the buckets."""
    if ranks.size == 1:
        return [[bucket] for bucket in buckets]
    return [[replace(bucket, device=torch.device(device), rank=r) for r in range(ranks.size)] for bucket in buckets]


def collect(buckets: Sequence[Bucket], ranks: Ranks, to: int | None) -> list[list[Bucket]]:
    """Gather all ranks' buckets on the CPU of rank `to`, or of all ranks if None. A collective, except on one rank.

    Each rank broadcasts its tensors, one by one, on the bucket's device, which the process group's backend must support; ranks
    that do not receive drop them. Return found[bucket][rank], and [] on other ranks. With one rank, these are the buckets
    themselves.
    """
    receives = to in (None, ranks.rank)
    collected = zero_shards(buckets, ranks, "cpu" if receives else "meta")
    for own, shards in zip(buckets, collected, strict=True) if ranks.size > 1 else ():
        for owner, shard in enumerate(shards):
            shard.steps = list(own.steps)
            for source, X in zip(tensors(own if owner == ranks.rank else shard), tensors(shard), strict=True):
                buffer = source if owner == ranks.rank else torch.empty_like(X, device=own.device)
                dist.broadcast(buffer, dist.get_global_rank(ranks.group, owner), ranks.group)
                X.copy_(buffer)
    return collected if receives else []


def counts(buckets: Sequence[Bucket]) -> Entries:
    """Return `step` of each parameter, a new tensor."""
    return {p: {"step": torch.tensor(float(n))} for bucket in buckets for p, n in zip(bucket.params, bucket.steps, strict=True)}


def pack(buckets: Sequence[Sequence[Bucket]]) -> Entries:
    """Return the state of each parameter, given the counterparts of each bucket on all ranks: buckets[bucket][rank].

    Tensors are views of the buckets where they are contiguous there, otherwise copies; `step` is always a copy.
    """
    state = counts([shards[0] for shards in buckets])
    for shards in buckets:
        for key, shape, view, X in chain(*map(pieces, shards)):
            entry = state[shards[0].params[view.param]]
            whole = X.numel() == prod(shape) and X.as_strided(view.shape, view.stride).is_contiguous()
            if key not in entry:
                entry[key] = X.view(shape) if whole else X.new_empty(shape)
            if not whole:
                place(view, entry[key]).copy_(X)
    return state


def pack_state_dict(groups: Sequence[dict[str, Any]], entries: Entries, state: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    """Return the state_dict of groups and `state`, updated with each parameter's entry, with parameters as indices."""
    index = {p: i for i, p in enumerate(chain(*(group["params"] for group in groups)))}
    packed: dict[Any, Any] = {i: {**state.get(p, {}), **entries.get(p, {})} for p, i in index.items()}
    packed.update({key: entry for key, entry in state.items() if not isinstance(key, Tensor)})
    saved = [
        {name: plain(x) for name, x in group.items()} | {"params": [index[p] for p in group["params"]]} for group in groups
    ]
    return {"state": packed, "param_groups": saved, "version": VERSION}


def is_zero(entries: Mapping[Any, Any]) -> bool:
    """Return whether no tensor in the entries of a state has an element that is not zero."""
    values = chain(*(entry.values() for entry in entries.values() if isinstance(entry, dict)))
    return not any(bool(X.any()) for X in values if isinstance(X, Tensor))


def unpack(groups: Sequence[Group], saved: Entries, ranks: Ranks, late: Sequence[str] = ()) -> list[Bucket]:
    """Return this rank's buckets for these groups with the state of each parameter, converted to their dtypes.

    A parameter without state starts at zero, and so does missing state whose name is in `late`. Raises ValueError, naming the
    parameter, if other state is missing, or if any has the wrong type, shape, or values; if `late` is empty, also for a
    parameter without state, unless it is frozen: torch.distributed.checkpoint leaves those out.
    """
    names, buckets = parameter_names(groups), make_buckets(groups, ranks.rank, ranks.size)

    @cache
    def find(p: Tensor, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a parameter's saved tensor in this dtype, contiguous. Raises ValueError unless it is valid."""
        X = lookup(saved[p], key)
        if X is None and key.split(".")[0] in late:
            return torch.zeros(shape)
        dense = isinstance(X, Tensor) and X.is_floating_point() and X.layout == torch.strided and not X.is_meta
        if not dense or (X.shape != shape and (saved[p]["step"] or X.any())):
            needed = f"a dense floating-point tensor of shape {shape}: if it is another optimizer's, or a shape or an option"
            undo = "such as block_size changed, undo that or delete the parameter's state"
            raise ValueError(f"the state of {names[p]} holds {describe_tensor(X)} for {key}; it must be {needed} {undo}")
        X = X.to(dtype).contiguous() if X.shape == shape else torch.zeros(shape)
        squares = key.endswith("exp_avg_sq")
        if not X.isfinite().all() or (squares and (X < 0).any()):
            raise ValueError(f"the state of {names[p]} has elements of {key} that are not finite{' and nonnegative' * squares}")
        return X

    for bucket in buckets:
        kept = [any(is_own(bucket, key) for key in saved.get(p, ())) for p in bucket.params]
        for i, p in enumerate(bucket.params):
            if kept[i]:
                bucket.steps[i] = read_steps(saved[p].get("step"), names[p])
            elif p.requires_grad and not late:
                keys = ", ".join(sorted(bucket.names))
                raise ValueError(f"the state of {names[p]} is missing, or another optimizer's: there is none of {keys}")
        for key, shape, view, X in pieces(bucket):
            if kept[view.param]:
                X.copy_(place(view, find(bucket.params[view.param], key, shape, bucket.dtype)))
        for preconditioner in bucket.preconditioners if any(kept) else ():
            preconditioner.find_rootless()
    return buckets


def lookup(entry: Any, key: str) -> Any:
    """Return an entry's value for a key, or None. Keys with dots may be nested, as torch.distributed.checkpoint leaves them."""
    if key in entry:
        return entry[key]
    for part in key.split("."):
        entry = entry.get(part) if isinstance(entry, dict) else None
    return entry


def foreign(buckets: Sequence[Bucket], state: Mapping[Any, Any], copy: Callable[[Any, Any], Any] = lambda x, _: x) -> Any:
    """Return copy(value, device) of the foreign keys of each parameter's entry, and the entries of no parameter."""
    found = {**state}
    for bucket in buckets:
        for p in bucket.params:
            found[p] = {key: copy(x, p.device) for key, x in state.get(p, {}).items() if not is_own(bucket, key)}
    return found


def copied(x: Any, device: torch.device) -> Any:
    """Return a copy of a foreign value, if it is a tensor, on this device."""
    return x.to(device, copy=True) if isinstance(x, Tensor) else deepcopy(x)


def read(state_dict: Mapping[str, Any], groups: Sequence[Any], ranks: Ranks) -> tuple[list[Group], Entries, list[Bucket]]:
    """Return the groups with the options of a state_dict, its state, with parameters as keys instead of indices, and `unpack`.

    Other keys are unchanged. Raises ValueError if it is not a state_dict, for an unknown version, for groups of other sizes,
    for options that are missing or out of range, and as `unpack`.
    """
    try:
        options, entries = [{**group} for group in state_dict["param_groups"]], {**state_dict["state"]}
        keys = [list(group.pop("params")) for group in options]
        entries.update({key: {**entries.get(key, {})} for key in chain(*keys)})
        options = [{name: plain(deepcopy(x)) for name, x in group.items() if name != "param_names"} for group in options]
        version = state_dict.get("version", 1)  # where it is lost, steps that are there stay
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"not an optimizer's state_dict: reading param_groups and state raised {error!r}") from error
    check_value("the state_dict's version", version, one_of(*range(1, VERSION + 1)))
    sizes, expected = [len(of_group) for of_group in keys], [len(group["params"]) for group in groups]
    if sizes != expected:
        raise ValueError(f"the state_dict has groups of {sizes} parameters; this optimizer has groups of {expected}")
    for k, of_group in enumerate(options):
        if missing := {"step", *OPTIONS} - ADDED - of_group.keys():
            raise ValueError(f"group {k} of the state_dict lacks {', '.join(sorted(missing))}: is it another optimizer's?")
    found = [cast(Group, {**group, "max_factor_ratio": None, **other}) for group, other in zip(groups, options, strict=True)]
    check_groups(found)
    params = dict(zip(chain(*keys), chain(*(group["params"] for group in found)), strict=True))
    state = {params.get(key, key): entry for key, entry in entries.items()}
    for group in found if version == 1 else ():
        for p in group["params"]:
            state[p] = {"step": group["step"], **state[p]} if state.get(p) else {}
    return found, state, unpack(found, state, ranks)
