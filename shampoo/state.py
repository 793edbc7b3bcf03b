"""What the optimizer keeps: buckets of parameters, each with one flat vector per moment and one stack per factor and root."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .grafting import WITHOUT_SECOND_MOMENT
from .layout import Layout, build_layout
from .update import block_exponents


@dataclass
class Bucket:
    """Parameters of one group that share device, state dtype and treatment, with their layout and state.

    Moments are flat vectors, None where not needed. Factors, roots and exponents have a list for each stack, with an entry for
    each dimension of its blocks: (B, d, d), or None where the exponent is zero. In a bucket that is not `factored` (parameters
    with a dimension >= max_dim) the grafting method moves alone.
    """

    params: list[Tensor]
    dtype: torch.dtype
    layout: Layout
    factored: bool
    grafting: str
    exponents: list[tuple[float, ...]]
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    momentum_buffer: Tensor | None
    factors: list[list[Tensor | None]]
    inv_roots: list[list[Tensor | None]]


def make_buckets(group: dict[str, Any]) -> list[Bucket]:
    """Sort a group's parameters into buckets and allocate their state, all zeros; a parameter without elements is in none."""
    members: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
    for p in filter(torch.numel, group["params"]):
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        members.setdefault((p.device, dtype, max(p.shape, default=1) < group["max_dim"]), []).append(p)
    return [_make_bucket(params, group, dtype, factored) for (_, dtype, factored), params in members.items()]


def _make_bucket(params: list[Tensor], group: dict[str, Any], dtype: torch.dtype, factored: bool) -> Bucket:
    layout = build_layout([tuple(p.shape) for p in params], group["block_size"], group["merge_dims"])
    grafting = group["grafting"] if factored or group["grafting"] not in WITHOUT_SECOND_MOMENT else "adam"
    exponents = [
        block_exponents(len(block), group["exponents"], group["exponent_multiplier"]) if factored else (0.0,) * len(block)
        for _, *block in layout.stacks
    ]

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=params[0].device)

    def moment(needed: bool) -> Tensor | None:
        return zeros(layout.numel) if needed else None

    def matrices() -> list[list[Tensor | None]]:
        return [
            [zeros(blocks, d, d) if p else None for d, p in zip(block, each, strict=True)]
            for (blocks, *block), each in zip(layout.stacks, exponents, strict=True)
        ]

    return Bucket(
        params,
        dtype,
        layout,
        factored,
        grafting,
        exponents,
        exp_avg=moment(group["betas"][0] > 0),
        exp_avg_sq=moment(grafting not in WITHOUT_SECOND_MOMENT),
        momentum_buffer=moment(group["momentum"] > 0),
        factors=matrices(),
        inv_roots=matrices(),
    )
