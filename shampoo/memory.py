"""Compute how many bytes the optimizer's state takes, before any step."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checkpoint import pieces
from .optimizer import AdamWShampoo


class StateBytes(NamedTuple):
    """Bytes of state, on all ranks together."""

    total: int
    per_element: float  # over the number of elements of the parameters; AdamW's state takes 8 in float32
    by_parameter: dict[str, int]


def state_bytes(model: nn.Module, **options: Any) -> StateBytes:
    """Return the bytes of state for the parameters of a model that require gradients, given options of AdamWShampoo.

    These are moments, factors, roots, and bases; a step also needs memory for gradients and directions. The model may be on any
    device, also the meta device: nothing is allocated. Raises TypeError for an unknown option, and ValueError as AdamWShampoo.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    params: dict[Tensor, str] = {torch.empty_like(p, device="meta", requires_grad=True): name for name, p in named.items()}
    optimizer, found = AdamWShampoo(list(params), **{**options, "shard": False}), dict.fromkeys(named, 0)
    for bucket in optimizer._buckets:
        for _, _, view, X in pieces(bucket):
            found[params[bucket.params[view.param]]] += X.nbytes
    return StateBytes(total := sum(found.values()), total / max(1, sum(p.numel() for p in params)), found)
