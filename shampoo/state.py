"""The optimizer's state: buckets of parameters, each with one flat vector per moment and one preconditioner per stack."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .assignment import Cost, share_blocks
from .blocks import Layout, block_exponents, merged_shape, parameter_exponents
from .copies import Inputs, is_sharded, read
from .grafting import GRAFTING
from .options import Group
from .preconditioner import PRECONDITIONERS, Kronecker


@dataclass
class Bucket:
    """Parameters of one group with the same device, state dtype, and `factored`, and one rank's part of their state.

    Each moment is a flat vector of the blocks that the rank owns, or None if it is not needed. Parameters of which no block has
    factors are not `factored`: their preconditioners are empty. The grafting method alone updates blocks without factors.
    Either all parameters are DTensors, or none.
    """

    group: Group
    params: list[Tensor]
    device: torch.device  # of the state
    dtype: torch.dtype
    factored: bool
    layouts: list[Layout]  # one per rank
    rank: int  # the rank that owns this state

    def __post_init__(self) -> None:
        group, self.layout, kind = self.group, self.layouts[self.rank], PRECONDITIONERS[self.group["preconditioner"]]
        exponents = [block_exponents(block, group) if self.factored else None for _, *block in self.layout.stacks]
        self.has_factors = tuple(each is not None for each in exponents)  # of each stack
        everywhere = self.factored and all(block_exponents(block, group) for each in self.layouts for _, *block in each.stacks)
        self.exp_avg = self.zeros() if group["betas"][0] else None
        self.exp_avg_sq = self.zeros() if GRAFTING[group["grafting"]].second_moment or not everywhere else None
        self.momentum_buffer = self.zeros() if group["momentum"] else None
        new, stacks = partial(kind, options=group, dtype=self.dtype, device=self.device), self.layout.stacks
        self.preconditioners = [new(s, each or (0.0,) * (len(s) - 1)) for s, each in zip(stacks, exponents, strict=True)]
        self.rotates = self.factored and kind.rotate is not Kronecker.rotate  # into other coordinates
        self.second_moment = "rotated_exp_avg_sq" if self.rotates else "exp_avg_sq"  # its key
        self.names = {"step", *kind.NAMES, *dict(moments(self))}  # of its state
        self.steps, self.shapes = [0] * len(self.params), [p.shape for p in self.params]
        self.shards: Any = None  # a `Shards` on multiple ranks if parameters are DTensors
        self.read: Callable[[float], Inputs] = partial(read, self.params, self.layouts)
        self.unusual: Counter[tuple[int, str]] = Counter()  # rescued roots and non-finite directions of (parameter index, what)

    def zeros(self) -> Tensor:
        """Return a flat vector of zeros for this rank's blocks."""
        return torch.zeros(self.layout.numel, dtype=self.dtype, device=self.device)


def moments(bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the flat vector of each moment that the bucket keeps."""
    found = {"exp_avg": bucket.exp_avg, bucket.second_moment: bucket.exp_avg_sq, "momentum_buffer": bucket.momentum_buffer}
    return ((name, flat) for name, flat in found.items() if flat is not None)


def tensors(bucket: Bucket) -> list[Tensor]:
    """Return all state tensors of a bucket, in the same order for equal options and layouts."""
    matrices = [X for preconditioner in bucket.preconditioners for _, _, X in preconditioner.tensors()]
    return [flat for _, flat in moments(bucket)] + matrices


def make_buckets(groups: Sequence[Group], rank: int, num_ranks: int) -> list[Bucket]:
    """Sort the parameters of all groups into buckets, and allocate one rank's state, all zeros.

    Parameters without elements, and lazy ones, which have no shape yet, are in no bucket.
    """
    loads, buckets = [Cost(0.0, 0)] * num_ranks, []
    for group in groups:
        members: dict[tuple[bool, torch.device, torch.dtype, bool], list[Tensor]] = {}
        for p in group["params"]:
            if not is_lazy(p) and p.numel():
                dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
                factored = bool(parameter_exponents(tuple(p.shape), group))
                members.setdefault((factored, p.device, dtype, is_sharded(p)), []).append(p)
        for (factored, device, dtype, _), params in sorted(members.items(), key=lambda item: not item[0][0]):  # costly first
            shapes, flops = [merged_shape(tuple(p.shape), group) for p in params], partial(block_flops, group, factored)
            layouts, loads = share_blocks(shapes, group["block_size"], flops, loads)
            buckets.append(Bucket(group, params, device, dtype, factored, layouts, rank))
    return buckets


def block_flops(group: Group, factored: bool, block: tuple[int, ...]) -> float:
    """Return a block's floating-point operations per step: 20 per element, plus the preconditioner's `cost` if factored."""
    exponents = block_exponents(block, group) if factored else None
    cost = PRECONDITIONERS[group["preconditioner"]].cost
    return 20 * prod(block) + (cost(block, exponents, group) if exponents else 0)


def is_own(bucket: Bucket, key: Any) -> bool:
    """Return whether a key of an entry is the optimizer's own, and not foreign."""
    return str(key).split(".")[0] in bucket.names


def describe_tensor(X: Any) -> str:
    """Return a description of a value in an entry, for error messages."""
    if isinstance(X, Tensor):
        return f"a {X.dtype} tensor ({X.layout}, on {X.device}) of shape {tuple(X.shape)}"
    return "nothing" if X is None else repr(X)


def read_steps(step: Any, name: str) -> int:
    """Return `step` as an int. Raises ValueError unless it is an integer in [0, 2^53), or a one-element tensor of one."""
    number = step.item() if isinstance(step, Tensor) and step.numel() == 1 and not step.is_meta else step
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < 2**53 or number != int(number):
        raise ValueError(f"the state of {name} holds {describe_tensor(step)} for step; it must be an integer >= 0")
    return int(number)
