"""What the optimizer keeps: buckets of parameters, each with one flat vector per moment and one stack per factor and root."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from .blocking import merged_shape
from .grafting import WITHOUT_SECOND_MOMENT
from .layout import Layout, Load, build_layouts, load
from .roots import WITH_BASIS, check_solver
from .update import block_exponents


@dataclass
class Bucket:
    """Parameters of one group that share device, state dtype and treatment, with the state of the blocks that a rank owns.

    Moments are flat vectors, None where not needed. Factors, roots and exponents have a list for each stack, with an entry for
    each dimension of its blocks: (B, d, d), or None where the exponent is zero; so have eigvecs, the bases of a solver that
    keeps them. In a bucket that is not `factored` (parameters with a dimension >= max_dim, vectors if so asked) the grafting
    method moves alone.
    """

    params: list[Tensor]
    device: torch.device  # of the state
    dtype: torch.dtype
    layouts: list[Layout]  # of each rank
    layout: Layout  # of the rank whose blocks these are
    factored: bool
    grafting: str
    exponents: list[tuple[float, ...]]
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    momentum_buffer: Tensor | None
    factors: list[list[Tensor | None]]
    inv_roots: list[list[Tensor | None]]
    eigvecs: list[list[Tensor | None]]
    rescued: Counter[tuple[int, str]] = field(default_factory=Counter)  # roots not computed as usual: parameter, and why

    def presence(self) -> Tensor | None:
        """A flat vector, 1 where a block has a gradient and 0 where it has none; None where all have."""
        if all(p.grad is not None for p in self.params):
            return None
        one = torch.ones((), dtype=self.dtype, device=self.device)
        return load(
            self.layout, [None if p.grad is None else one.expand(p.shape) for p in self.params], self.dtype, self.device
        )

    def moving(self) -> list[Tensor | None]:
        """The parameters, None for those without a gradient."""
        return [None if p.grad is None else p for p in self.params]

    def zeros(self) -> Tensor:
        """A flat vector of zeros."""
        return torch.zeros(self.layout.numel, dtype=self.dtype, device=self.device)


MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
MATRICES = ("factors", "inv_roots", "eigvecs")


def moments(bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    """The name and the flat vector of each moment that the bucket keeps."""
    return ((name, flat) for name in MOMENTS if (flat := getattr(bucket, name)) is not None)


def tensors(bucket: Bucket) -> list[Tensor]:
    """All state of a bucket, in an order that depends on its layout alone."""
    found = [A for kind in MATRICES for stack in getattr(bucket, kind) for A in stack if A is not None]
    return [flat for _, flat in moments(bucket)] + found


def make_buckets(group: dict[str, Any], rank: int, loads: list[Load]) -> list[Bucket]:
    """Sort a group's parameters into buckets and allocate a rank's state, all zeros; a parameter without elements is in none.

    `loads` has what each rank has to bear for earlier groups; this group's is added.
    """
    members: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
    for p in filter(torch.numel, group["params"]):
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        members.setdefault((p.device, dtype, has_factors(p, group)), []).append(p)
    buckets = []
    dearest_first = sorted(members.items(), key=lambda item: not item[0][2])  # those with factors
    for (device, dtype, factored), params in dearest_first:

        def cost(block: tuple[int, ...], factored: bool = factored) -> float:
            """What a block of this bucket costs its rank."""
            return block_cost(block, powers(block, group, factored), group)

        layouts = build_layouts([tuple(p.shape) for p in params], group["block_size"], group["merge_dims"], cost, loads)
        buckets.append(allocate(params, group, layouts, rank, device, dtype, factored))
    return buckets


def has_factors(p: Tensor, group: dict[str, Any]) -> bool:
    """Whether a parameter gets factors: all its dimensions are below max_dim, and it is no vector where vectors get none."""
    order = len(merged_shape(tuple(p.shape), group["block_size"], group["merge_dims"]))
    return max(p.shape, default=1) < group["max_dim"] and (order > 1 or group["precondition_vectors"])


def powers(block: tuple[int, ...], group: dict[str, Any], factored: bool) -> tuple[float, ...]:
    """The exponent for each dimension of a block, zeros where nothing is factored."""
    if not factored:
        return (0.0,) * len(block)
    return block_exponents(len(block), group["exponents"], group["exponent_multiplier"])


def block_cost(block: tuple[int, ...], exponents: tuple[float, ...], group: dict[str, Any]) -> float:
    """Floating point operations per step for a block: 20 n of elementwise work, n being its elements, and for each factor of
    size d 2 n d for preconditioning, as much for each update, and a root now and then, for which 25 d^3 is usual.
    """
    n, updates, refreshes = prod(block), 1 / group["factor_frequency"], 1 / group["precondition_frequency"]
    return 20 * n + sum(2 * n * d * (1 + updates) + 25 * d**3 * refreshes for d, p in zip(block, exponents, strict=True) if p)


def allocate(
    params: list[Tensor],
    group: dict[str, Any],
    layouts: list[Layout],
    rank: int,
    device: torch.device,
    dtype: torch.dtype,
    factored: bool,
) -> Bucket:
    """A bucket with the state of one rank, all zeros."""
    layout = layouts[rank]
    grafting = group["grafting"] if factored or group["grafting"] not in WITHOUT_SECOND_MOMENT else "adam"
    exponents = [powers(tuple(block), group, factored) for _, *block in layout.stacks]
    for each in exponents:
        check_solver(group["solver"], each)

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        """State of a shape."""
        return torch.zeros(shape, dtype=dtype, device=device)

    def moment(needed: bool) -> Tensor | None:
        """A flat vector, if there is to be one."""
        return zeros(layout.numel) if needed else None

    def matrices(needed: bool = True, dtype: torch.dtype = dtype) -> list[list[Tensor | None]]:
        """For each stack and dimension (B, d, d), None where the exponent is zero."""
        return [
            [zeros(blocks, d, d, dtype=dtype) if p and needed else None for d, p in zip(block, each, strict=True)]
            for (blocks, *block), each in zip(layout.stacks, exponents, strict=True)
        ]

    return Bucket(
        params,
        device,
        dtype,
        layouts,
        layout,
        factored,
        grafting,
        exponents,
        exp_avg=moment(group["betas"][0] > 0),
        exp_avg_sq=moment(grafting not in WITHOUT_SECOND_MOMENT),
        momentum_buffer=moment(group["momentum"] > 0),
        factors=matrices(),
        inv_roots=matrices(dtype=torch.bfloat16 if group["bf16_roots"] else dtype),
        eigvecs=matrices(group["solver"] in WITH_BASIS),
    )
