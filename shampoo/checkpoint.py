"""State of buckets <-> state per parameter, as `state_dict()` holds it.

For each parameter: `exp_avg`, `exp_avg_sq`, `momentum_buffer`, where used, in its shape, and for each of its tiles n and
dimensions d `factors.n.d`, `inv_roots.n.d` and with solver "qr" `eigvecs.n.d`, (blocks of the tile, size, size). Nothing
depends on how blocks are stacked, or on which rank owns them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import Load, fill, gather
from .options import check_options, check_value, integer, parameter_names
from .ranks import Ranks
from .state import MATRICES, Bucket, allocate, make_buckets, moments, tensors

Groups = Sequence[dict[str, Any]]


def matrices(bucket: Bucket) -> Iterator[tuple[int, str, slice, Tensor]]:
    """Parameter, key, rows of what is saved, and a view of the blocks, for the factors, roots and bases of each piece."""
    for kind in MATRICES:
        for pieces, stack in zip(bucket.layout.pieces, getattr(bucket, kind), strict=True):
            for d, A in enumerate(stack):
                for piece in pieces if A is not None else ():
                    n = piece.tile.num_blocks
                    rows = slice(piece.offset, piece.offset + n)
                    yield piece.param, f"{kind}.{piece.number}.{d}", rows, A[piece.first : piece.first + n]


def collect(buckets: Sequence[Sequence[Bucket]], groups: Groups, ranks: Ranks, to: int | None) -> list[list[Bucket]]:
    """For each bucket those of all ranks, on the CPU of rank `to`, or of all ranks for None; elsewhere []. A collective."""
    receives = to in (None, ranks.rank)
    device = torch.device("cpu" if receives else "meta")
    collected = []
    for group, own in ((group, bucket) for group, of_group in zip(groups, buckets, strict=True) for bucket in of_group):
        treatment = own.dtype, own.factored
        shards = [allocate(own.params, group, own.layouts, r, device, *treatment) for r in range(ranks.size)]
        for r, shard in enumerate(shards):
            source = tensors(own) if r == ranks.rank else [None] * len(tensors(shard))
            for mine, x in zip(source, tensors(shard), strict=True):
                share(mine, x, r, own.device, ranks, to)
        collected.append(shards)
    return collected if receives else []


def share(mine: Any, x: Tensor, owner: int, device: torch.device, ranks: Ranks, to: int | None) -> None:
    """Copy the owner's tensor, `mine` there, to x on rank `to`, or on all ranks; through the device, where collectives work."""
    if to is None:
        buffer = torch.empty_like(x, device=device) if mine is None else mine
        dist.broadcast(buffer, dist.get_global_rank(ranks.group, owner), ranks.group)
        x.copy_(buffer)
    elif owner == to == ranks.rank:
        x.copy_(mine)
    elif owner == ranks.rank:
        dist.send(mine, dist.get_global_rank(ranks.group, to), ranks.group)
    elif to == ranks.rank:
        buffer = torch.empty_like(x, device=device)
        dist.recv(buffer, dist.get_global_rank(ranks.group, owner), ranks.group)
        x.copy_(buffer)


def pack(buckets: Sequence[Sequence[Bucket]], params: Sequence[Tensor]) -> dict[int, dict[str, Tensor]]:
    """The state of each parameter under its place in `params`, given for each bucket those of all ranks.

    Moments are copies; factors and roots are views of the live state where one rank has a tile.
    """
    place = {p: i for i, p in enumerate(params)}
    state: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(params))}
    for shards in buckets:
        owner = [state[place[p]] for p in shards[0].params]
        for named in zip(*map(moments, shards), strict=True):
            whole = gather(shards[0].layouts[: len(shards)], [flat for _, flat in named])
            for of_param, p, x in zip(owner, shards[0].params, whole, strict=True):
                of_param[named[0][0]] = x.view(p.shape)
        parts: dict[tuple[int, str], list[tuple[int, Tensor]]] = {}
        for i, name, rows, blocks in chain(*map(matrices, shards)):
            parts.setdefault((i, name), []).append((rows.start, blocks))
        for (i, name), found in parts.items():
            in_order = [blocks for _, blocks in sorted(found, key=lambda part: part[0])]
            owner[i][name] = in_order[0] if len(in_order) == 1 else torch.cat(in_order)
    return state


def unpack(buckets: Sequence[Sequence[Bucket]], saved: dict[Tensor, dict[str, Tensor]], names: dict[Tensor, str]) -> None:
    """Copy the saved state of each parameter into the buckets, keeping their dtypes.

    Raises ValueError, naming the parameter, where something is missing or has another shape.
    """

    def find(p: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
        """A parameter's saved tensor, checked."""
        x = saved[p].get(name)
        if not isinstance(x, Tensor) or x.shape != shape or not x.is_floating_point():
            found = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else "nothing" if x is None else repr(x)
            raise ValueError(f"the state of {names[p]} holds {found} for {name}; it must be real and have shape {shape}")
        return x

    for bucket in chain(*buckets):
        for name, flat in moments(bucket):
            fill(bucket.layout, flat, [find(p, name, tuple(p.shape)) for p in bucket.params])
        pieces = (piece for layout in bucket.layouts for stack in layout.pieces for piece in stack)
        count: Counter[tuple[int, int]] = Counter()  # of blocks, for each tile of each parameter
        for piece in pieces:
            count[piece.param, piece.number] += piece.tile.num_blocks
        for i, name, rows, blocks in matrices(bucket):
            n = count[i, int(name.split(".")[1])]
            blocks.copy_(find(bucket.params[i], name, (n, *blocks.shape[1:]))[rows])


def read(
    state_dict: dict[str, Any], groups: Groups, ranks: Ranks
) -> tuple[list[dict[str, Any]], list[list[Bucket]], list[Load]]:
    """The groups of a state_dict, a rank's buckets with its state, and what each rank has to bear. Raises ValueError."""
    found, saved = match_groups(state_dict, groups)
    for group in found:
        check_options(group)
        check_value("start_preconditioning_step", group["start_preconditioning_step"], integer(1))
    loads = [Load(0.0, 0)] * ranks.size
    buckets = [make_buckets(group, ranks.rank, loads) for group in found]
    unpack(buckets, saved, parameter_names(found))
    return found, buckets, loads


def match_groups(state_dict: dict[str, Any], groups: Groups) -> tuple[list[dict[str, Any]], dict[Tensor, Any]]:
    """The groups with the options of a state_dict, and its state for each of their parameters.

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
    return [{**group, **other} for group, other in zip(groups, options, strict=True)], dict(zip(params, states, strict=True))
