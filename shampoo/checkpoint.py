"""State of buckets <-> state per parameter, as `state_dict()` holds it.

For each parameter: `exp_avg`, `exp_avg_sq`, `momentum_buffer`, where used, in its shape, and for each of its tiles n and
dimensions d `factors.n.d` and `inv_roots.n.d`, (blocks of the tile, size, size). Nothing depends on how blocks are stacked.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from .layout import fill, gather
from .state import Bucket

Groups = Sequence[dict[str, Any]]
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def moments(bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    """The name and the flat vector of each moment that the bucket keeps."""
    return ((name, flat) for name in MOMENTS if (flat := getattr(bucket, name)) is not None)


def matrices(bucket: Bucket) -> Iterator[tuple[int, str, Tensor]]:
    """Parameter, key and a view of the blocks, for the factors and inverse roots of each tile and dimension."""
    for kind in ("factors", "inv_roots"):
        for pieces, stack in zip(bucket.layout.pieces, getattr(bucket, kind), strict=True):
            for d, A in enumerate(stack):
                for piece in pieces if A is not None else ():
                    yield piece.param, f"{kind}.{piece.number}.{d}", A[piece.first : piece.first + piece.tile.num_blocks]


def pack(buckets: Sequence[Sequence[Bucket]], params: Sequence[Tensor]) -> dict[int, dict[str, Tensor]]:
    """The state of each parameter under its place in `params`: moments copied, factors and roots views of the live state."""
    place = {p: i for i, p in enumerate(params)}
    state: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(params))}
    for bucket in chain(*buckets):
        for name, flat in moments(bucket):
            for p, x in zip(bucket.params, gather(bucket.layout, flat), strict=True):
                state[place[p]][name] = x.view(p.shape)
        for i, name, blocks in matrices(bucket):
            state[place[bucket.params[i]]][name] = blocks
    return state


def unpack(buckets: Sequence[Sequence[Bucket]], saved: dict[Tensor, dict[str, Tensor]]) -> None:
    """Copy the saved state of each parameter into the buckets, keeping their dtypes.

    Raises ValueError, naming the parameter, where something is missing or has another shape.
    """
    place = {p: i for i, p in enumerate(saved)}

    def find(p: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
        x = saved[p].get(name)
        found = "nothing" if x is None else f"shape {tuple(x.shape)}"
        if x is None or x.shape != shape:
            owner = f"parameter {place[p]} of shape {tuple(p.shape)}"
            raise ValueError(f"the state of {owner} holds {found} for {name}; it must have shape {shape}")
        return x

    for bucket in chain(*buckets):
        for name, flat in moments(bucket):
            fill(bucket.layout, flat, [find(p, name, tuple(p.shape)) for p in bucket.params])
        for i, name, blocks in matrices(bucket):
            blocks.copy_(find(bucket.params[i], name, tuple(blocks.shape)))


def match_groups(state_dict: dict[str, Any], groups: Groups) -> tuple[list[dict[str, Any]], dict[Tensor, Any]]:
    """The groups with the options of a state_dict, and its state for each of their parameters.

    Raises ValueError if the state_dict has other groups, or none.
    """
    try:
        saved, state = state_dict["param_groups"], state_dict["state"]
        sizes = [len(group["params"]) for group in saved]
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is no state_dict of an optimizer: {error!r} when looking for param_groups and state") from error
    expected = [len(group["params"]) for group in groups]
    if sizes != expected:
        raise ValueError(f"the state_dict has groups of {sizes} parameters; this optimizer has groups of {expected}")
    params = [p for group in groups for p in group["params"]]
    keys = [key for group in saved for key in group["params"]]
    return (
        [{**group, **other, "params": group["params"]} for group, other in zip(groups, saved, strict=True)],
        {p: state.get(key, {}) for p, key in zip(params, keys, strict=True)},
    )
