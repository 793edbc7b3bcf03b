"""Convert the state of buckets to state per parameter, for `state_dict()` and `optimizer.state`, and back.

Each parameter has `step`, the number of steps in which it had a gradient, and the moments in use (`exp_avg`, `exp_avg_sq`,
`momentum_buffer`), in its shape. For grid n (see `blocks`) and dimension d, both from 0, it has `factors.n.d`, `inv_roots.n.d`,
and with solver "qr" `eigvecs.n.d`, each (blocks, size, size). Keys do not depend on how blocks are stacked or which rank owns
them. Other keys are foreign: they are kept unchanged.

In version 1, parameters have no `step`, and take that of their group.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import chain
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .copies import assemble, copy, flat_views, grid_views
from .group import OPTIONS, Group
from .options import check_group, parameter_names, plain
from .ranks import Ranks
from .rules import check_value, one_of
from .state import Bucket, describe_tensor, is_own, make_buckets, moments, read_steps, tensors

VERSION = 2
ADDED = {"factor_frequency", "qr_tolerance", "preconditioner", "maximize"}  # options that a state_dict may lack
# State that may be missing after a change of groups or of `state`, and then starts at zero.
MAY_START_LATE = ("exp_avg", "momentum_buffer", "factors", "inv_roots", "eigvecs")

ParameterState = dict[str, Any]  # by key


def saved_blocks(bucket: Bucket) -> Iterator[tuple[int, str, slice, Tensor]]:
    """Yield (parameter index, key, rows in the saved tensor, view of these rows in the bucket) for each tensor and grid."""
    for grids, preconditioner in zip(bucket.layout.grids, bucket.preconditioners, strict=False):
        for name, d, X in preconditioner.tensors():
            for grid in grids:
                rows = slice(grid.first, grid.first + grid.size)
                yield grid.param, f"{name}.{grid.number}.{d}", rows, X[grid.row : grid.row + grid.size]


def zero_shards(bucket: Bucket, device: torch.device, ranks: Ranks) -> list[Bucket]:
    """Return each rank's counterpart of this bucket, all zeros, on `device`."""
    return [replace(bucket, device=device, rank=r) for r in range(ranks.size)]


def collect(buckets: Sequence[Bucket], ranks: Ranks, to: int | None) -> list[list[Bucket]]:
    """Gather all ranks' buckets on the CPU of rank `to`, or of all ranks if None. A collective.

    Return found[bucket][rank] there, and [] on other ranks.
    """
    receives = to in (None, ranks.rank)
    collected = []
    for own in buckets:
        shards = zero_shards(own, torch.device("cpu" if receives else "meta"), ranks)
        for owner, shard in enumerate(shards):
            shard.steps = list(own.steps)
            sources = tensors(own) if owner == ranks.rank else [None] * len(tensors(shard))
            for source, X in zip(sources, tensors(shard), strict=True):
                transfer(source, X, owner, own.device, ranks, to)
        collected.append(shards)
    return collected if receives else []


def transfer(source: Any, X: Tensor, owner: int, device: torch.device, ranks: Ranks, to: int | None) -> None:
    """Copy `source` on rank `owner` to X on rank `to`, or on all ranks if None; other ranks pass None as `source`.

    The tensor is sent between ranks on `device`, which the process group's backend must support; X may be on another device.
    """
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


def pack(buckets: Sequence[Sequence[Bucket]]) -> dict[Tensor, dict[str, Tensor]]:
    """Return the state of each parameter, given the counterparts of each bucket on all ranks: buckets[bucket][rank].

    Tensors are views of the buckets where they are contiguous there, otherwise copies; `step` is always a copy.
    """
    state: dict[Tensor, dict[str, Tensor]] = {}
    for shards in buckets:
        params, layouts = shards[0].params, shards[0].layouts[: len(shards)]
        for p, steps in zip(params, shards[0].steps, strict=True):
            state[p] = {"step": torch.tensor(float(steps))}
        for named in zip(*map(moments, shards), strict=True):
            for p, shape, X in zip(params, shards[0].shapes, assemble(layouts, [flat for _, flat in named]), strict=True):
                state[p][named[0][0]] = X.view(shape)
        parts: dict[tuple[int, str], list[tuple[int, Tensor]]] = {}
        for i, key, rows, X in chain(*map(saved_blocks, shards)):
            parts.setdefault((i, key), []).append((rows.start, X))
        for (i, key), found in parts.items():
            in_order = [X for _, X in sorted(found, key=lambda part: part[0])]
            state[params[i]][key] = in_order[0] if len(in_order) == 1 else torch.cat(in_order)
    return state


def pack_state_dict(
    groups: Sequence[dict[str, Any]], entries: Mapping[Tensor, ParameterState], state: Mapping[Any, ParameterState]
) -> dict[str, Any]:
    """Return the state_dict of groups, each parameter's entry, and foreign keys of `state`, with parameters as indices."""
    index = {p: i for i, p in enumerate(chain(*(group["params"] for group in groups)))}
    packed = {i: {**state.get(p, {}), **entries.get(p, {})} for p, i in index.items()}
    others = {key: entry for key, entry in state.items() if not isinstance(key, Tensor)}
    return {
        "state": {**packed, **others},
        "param_groups": [
            {name: plain(x) for name, x in group.items() if name != "params"} | {"params": [index[p] for p in group["params"]]}
            for group in groups
        ],
        "version": VERSION,
    }


def is_zero(state_dict: Mapping[str, Any]) -> bool:
    """Return whether a state_dict has no element that is not zero in its state."""
    entries = (entry for entry in state_dict["state"].values() if isinstance(entry, dict))
    return not any(bool(X.any()) for entry in entries for X in entry.values() if isinstance(X, Tensor))


def unpack(
    buckets: Sequence[Bucket], saved: Mapping[Tensor, ParameterState], names: dict[Tensor, str], late: Sequence[str] = ()
) -> None:
    """Copy the state of each parameter into new buckets, converted to their dtypes.

    A parameter without an entry, or with an empty one, starts at zero, and so does missing state whose name is in `late`.
    Raises ValueError, naming the parameter, if other state is missing, or if any has the wrong type, shape, or values.
    """

    def find(p: Tensor, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a parameter's saved tensor in this dtype. Raises ValueError unless it is valid."""
        X = lookup(saved[p], key)
        if X is None and key.split(".")[0] in late:
            return torch.zeros(shape)
        words = f"the state of {names[p]} holds {describe_tensor(X)} for {key}; it must be "
        if X is None:
            raise ValueError(
                f"{words}a tensor: is it another optimizer's, or did an option change? Keys: {', '.join(saved[p])}"
            )
        if not isinstance(X, Tensor) or not X.is_floating_point() or X.layout != torch.strided or X.is_meta:
            raise ValueError(f"{words}a dense floating-point tensor of shape {shape}")
        if X.shape != shape and (saved[p]["step"] or X.any()):
            changed = "if the parameter or an option such as block_size changed, undo that or delete the parameter's state"
            raise ValueError(f"{words}a dense floating-point tensor of shape {shape}: {changed}")
        X = X.to(dtype) if X.shape == shape else torch.zeros(shape)
        if not X.isfinite().all() or (key == "exp_avg_sq" and (X < 0).any()):
            kinds = "finite and nonnegative" if key == "exp_avg_sq" else "finite"
            raise ValueError(f"the state of {names[p]} has elements of {key} that are not {kinds}")
        return X

    for bucket in buckets:
        kept = [any(is_own(bucket, key) for key in saved.get(p, ())) for p in bucket.params]
        for i, p in enumerate(bucket.params):
            if kept[i]:
                bucket.steps[i] = read_steps(saved[p].get("step"), names[p])
        for name, flat in moments(bucket):
            found = [find(p, name, tuple(p.shape), flat.dtype) if kept[i] else None for i, p in enumerate(bucket.params)]
            contiguous = [None if X is None else X.contiguous() for X in found]
            copy(flat_views(bucket.layout, flat, found), grid_views(bucket.layout, contiguous))
        count: Counter[tuple[int, str]] = Counter()  # blocks of each grid, over all ranks
        for grid in chain(*(grids for layout in bucket.layouts for grids in layout.grids)):
            count[grid.param, str(grid.number)] += grid.size
        for i, key, rows, X in saved_blocks(bucket):
            if kept[i]:
                X.copy_(find(bucket.params[i], key, (count[i, key.split(".")[1]], *X.shape[1:]), bucket.dtype)[rows])
        for preconditioner in bucket.preconditioners if any(kept) else ():
            preconditioner.find_rootless()


def lookup(entry: Any, key: str) -> Any:
    """Return an entry's value for a key, or None. Keys with dots may be nested, as torch.distributed.checkpoint leaves them."""
    if key in entry:
        return entry[key]
    for part in key.split("."):
        entry = entry.get(part) if isinstance(entry, dict) else None
    return entry


def read(
    state_dict: Mapping[str, Any], groups: Sequence[dict[str, Any]], ranks: Ranks
) -> tuple[list[Group], list[Bucket], dict[Any, ParameterState]]:
    """Return the groups of a state_dict, this rank's buckets with its state, and foreign state by parameter or other key.

    Raises ValueError if the state_dict does not fit `groups`, the optimizer's.
    """
    found, state = match_groups(state_dict, groups)
    names, buckets = parameter_names(found), make_buckets(found, ranks.rank, ranks.size)
    members = [(bucket, p) for bucket in buckets for p in bucket.params]
    for bucket, p in members:
        # torch.distributed.checkpoint leaves out the state of frozen parameters.
        if p.requires_grad and not any(is_own(bucket, key) for key in state.get(p, ())):
            keys = ", ".join(("step", *dict(moments(bucket))))
            raise ValueError(f"the state of {names[p]} is missing, or another optimizer's: there is no {keys}")
    unpack(buckets, state, names)
    for bucket, p in members:
        foreign = {key: x for key, x in state.get(p, {}).items() if not is_own(bucket, key)}
        state[p] = {key: x.to(p.device, copy=True) if isinstance(x, Tensor) else deepcopy(x) for key, x in foreign.items()}
    return found, buckets, state


def match_groups(
    state_dict: Mapping[str, Any], groups: Sequence[dict[str, Any]]
) -> tuple[list[Group], dict[Any, ParameterState]]:
    """Return the groups with the options of a state_dict, and its state, with parameters as keys instead of indices.

    Other keys are unchanged. Raises ValueError if it is not a state_dict, for an unknown version, for groups of other sizes,
    and for options that are missing or out of range.
    """
    try:
        saved, entries = [{**group} for group in state_dict["param_groups"]], {**state_dict["state"]}
        keys = [list(group["params"]) for group in saved]
        entries.update({key: {**entries.get(key, {})} for key in chain(*keys)})
        options = [
            {name: plain(deepcopy(x)) for name, x in group.items() if name not in ("params", "param_names")} for group in saved
        ]
        version = state_dict.get("version", VERSION if any("step" in entries[key] for key in chain(*keys)) else 1)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"not an optimizer's state_dict: reading param_groups and state raised {error!r}") from error
    check_value("the state_dict's version", version, one_of(*range(1, VERSION + 1)))
    sizes, expected = [len(of_group) for of_group in keys], [len(group["params"]) for group in groups]
    if sizes != expected:
        raise ValueError(f"the state_dict has groups of {sizes} parameters; this optimizer has groups of {expected}")
    for k, of_group in enumerate(options):
        missing = {*OPTIONS, "step"} - ADDED - of_group.keys()
        if missing:
            raise ValueError(f"group {k} of the state_dict lacks {', '.join(sorted(missing))}: is it another optimizer's?")
    found = [cast(Group, {**group, **other}) for group, other in zip(groups, options, strict=True)]
    for group in found:
        check_group(group)
    params = dict(zip(chain(*keys), chain(*(group["params"] for group in found)), strict=True))
    state = {params.get(key, key): entry for key, entry in entries.items()}
    for group in found if version == 1 else ():
        for p in group["params"]:
            state[p] = {"step": group["step"], **state[p]} if state.get(p) else {}
    return found, state
