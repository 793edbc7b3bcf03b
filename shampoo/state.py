"""What the optimizer keeps: buckets of parameters, each with a flat vector per moment and a preconditioner per stack."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .assignment import Cost, share_blocks
from .blocks import Layout, merged_shape
from .grafting import GRAFTING, Grafting
from .group import Group
from .options import STRUCTURAL
from .preconditioner import PRECONDITIONERS, Kronecker, block_exponents

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


@dataclass
class Bucket:
    """Parameters of one group that share device, state dtype, and treatment, and the state of the blocks that a rank owns.

    Moments are flat vectors, None where not needed. In a bucket that is not `factored` (parameters with a dimension >= max_dim,
    and vectors if so asked) there are no preconditioners, and the grafting method moves alone.
    """

    group: Group
    params: list[Tensor]
    device: torch.device  # of the state
    dtype: torch.dtype
    factored: bool
    layouts: list[Layout]  # of each rank
    rank: int  # whose blocks these are
    grafting: Grafting
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    momentum_buffer: Tensor | None
    preconditioners: list[Kronecker]  # of each stack
    steps: list[int]  # of each parameter: how many had a gradient
    unusual: Counter[tuple[int, str]] = field(default_factory=Counter)  # roots and directions: parameter, and what
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        self.layout = self.layouts[self.rank]

    def note(self, stack: int, blocks: Sequence[int], what: str) -> None:
        """Count something unusual about these blocks of a stack."""
        self.unusual.update((self.layout.params[stack][block], what) for block in blocks)

    def zeros(self) -> Tensor:
        """Return a flat vector of zeros."""
        return torch.zeros(self.layout.numel, dtype=self.dtype, device=self.device)


def moments(bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the flat vector of each moment that the bucket keeps."""
    return ((name, flat) for name in MOMENTS if (flat := getattr(bucket, name)) is not None)


def tensors(bucket: Bucket) -> list[Tensor]:
    """Return all state of a bucket, in an order that depends on its layout alone."""
    matrices = chain.from_iterable(each.tensors() for each in bucket.preconditioners)
    return [flat for _, flat in moments(bucket)] + [X for _, _, X in matrices]


def make_buckets(groups: Sequence[Group], rank: int, num_ranks: int) -> list[Bucket]:
    """Sort the parameters of all groups into buckets and allocate the state of a rank, all zeros.

    A parameter without elements, or a lazy one without a shape yet, is in none.
    """
    loads, buckets = [Cost(0.0, 0)] * num_ranks, []
    for group in groups:
        members: dict[tuple[bool, torch.device, torch.dtype], list[Tensor]] = {}
        for p in group["params"]:
            if not is_lazy(p) and p.numel():
                dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
                members.setdefault((has_factors(p, group), p.device, dtype), []).append(p)
        most_expensive_first = sorted(members.items(), key=lambda item: not item[0][0])  # those with factors
        for (factored, device, dtype), params in most_expensive_first:
            shapes, flops = [tuple(p.shape) for p in params], block_flops(group, factored)
            layouts, loads = share_blocks(shapes, group["block_size"], group["merge_dims"], flops, loads)
            buckets.append(allocate(group, params, device, dtype, factored, layouts, rank))
    return buckets


def signature(groups: Sequence[Group]) -> list[Any]:
    """Return what decides which state there is: parameters, their shapes, devices, and dtypes, and some options."""
    found: list[Any] = []
    for group in groups:
        found += [id(group), *map(group.get, STRUCTURAL), group["betas"][0] > 0, group["momentum"] > 0]
        for p in group["params"]:
            found.append((id(p), None if is_lazy(p) else p.shape, p.device, p.dtype))
    return found


def has_factors(p: Tensor, group: Group) -> bool:
    """Return whether a parameter gets factors: all dimensions below max_dim, and no vector where vectors get none."""
    order = len(merged_shape(tuple(p.shape), group["block_size"], group["merge_dims"]))
    return max(p.shape, default=1) < group["max_dim"] and (order > 1 or group["precondition_vectors"])


def block_flops(group: Group, factored: bool) -> Callable[[tuple[int, ...]], float]:
    """Return a function from a block's shape to its floating-point operations per step: 20 for each element, and the
    preconditioner's.
    """
    cost = PRECONDITIONERS[group["preconditioner"]].cost

    def flops(block: Sequence[int]) -> float:
        """Return the operations of a block (d1, ..., dk)."""
        return 20 * prod(block) + (cost(block, block_exponents(len(block), group), group) if factored else 0)

    return flops


def allocate(
    group: Group,
    params: list[Tensor],
    device: torch.device,
    dtype: torch.dtype,
    factored: bool,
    layouts: list[Layout],
    rank: int,
) -> Bucket:
    """Return a bucket with the state of one rank, all zeros."""
    layout, grafting = layouts[rank], GRAFTING[group["grafting"]]
    if not factored and not grafting.second_moment:
        grafting = GRAFTING["adam"]
    make = PRECONDITIONERS[group["preconditioner"]]
    preconditioners = [
        make(stack, block_exponents(len(stack) - 1, group), group, dtype, device) for stack in layout.stacks if factored
    ]

    def moment(needed: bool) -> Tensor | None:
        """Return a flat vector of zeros if it is needed."""
        return torch.zeros(layout.numel, dtype=dtype, device=device) if needed else None

    exp_avg, exp_avg_sq = moment(group["betas"][0] > 0), moment(grafting.second_moment)
    moments = exp_avg, exp_avg_sq, moment(group["momentum"] > 0)
    steps = [0] * len(params)
    return Bucket(group, params, device, dtype, factored, layouts, rank, grafting, *moments, preconditioners, steps)
