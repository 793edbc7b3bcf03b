"""What the optimizer keeps: buckets of parameters, each with a flat vector per moment and a preconditioner per stack."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import prod

import torch
from torch import Tensor

from .assignment import Cost, share_blocks
from .blocks import Layout, merged_shape
from .grafting import GRAFTING, Grafting
from .options import Group
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
    rescued: Counter[tuple[int, str]] = field(default_factory=Counter)  # roots not computed as usual: parameter, and why
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        self.layout = self.layouts[self.rank]

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


def make_buckets(group: Group, rank: int, carried: list[Cost]) -> tuple[list[Bucket], list[Cost]]:
    """Sort a group's parameters into buckets and allocate a rank's state, all zeros; a parameter without elements is in none.

    `carried` is what each rank carries for earlier groups; returned with this group's blocks added.
    """
    members: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
    for p in filter(torch.numel, group["params"]):
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        members.setdefault((p.device, dtype, has_factors(p, group)), []).append(p)
    buckets = []
    most_expensive_first = sorted(members.items(), key=lambda item: not item[0][2])  # those with factors
    for (device, dtype, factored), params in most_expensive_first:
        shapes = [tuple(p.shape) for p in params]
        flops = block_flops(group, factored)
        layouts, carried = share_blocks(shapes, group["block_size"], group["merge_dims"], flops, carried)
        buckets.append(allocate(group, params, device, dtype, factored, layouts, rank))
    return buckets, carried


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

    exp_avg, momentum_buffer = moment(group["betas"][0] > 0), moment(group["momentum"] > 0)
    exp_avg_sq = moment(grafting.second_moment)
    return Bucket(
        group, params, device, dtype, factored, layouts, rank, grafting, exp_avg, exp_avg_sq, momentum_buffer, preconditioners
    )
