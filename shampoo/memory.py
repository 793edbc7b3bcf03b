"""Compute how many bytes the optimizer's state takes, before any step."""

from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checkpoint import pieces
from .optimizer import AdamWShampoo
from .options import OPTIONS, check_groups, set_start
from .state import make_buckets


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
    arguments = signature(AdamWShampoo).bind([], **options)
    arguments.apply_defaults()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    params: dict[Tensor, str] = {torch.empty_like(p, device="meta", requires_grad=True): name for name, p in named.items()}
    group: Any = {name: x for name, x in arguments.arguments.items() if name in OPTIONS} | {"params": list(params), "step": 0}
    set_start(group)
    check_groups([group])
    found = dict.fromkeys(named, 0)
    for bucket in make_buckets([group], rank=0, num_ranks=1):
        for _, _, view, X in pieces(bucket):
            found[params[bucket.params[view.param]]] += X.nbytes
    total = sum(found.values())
    return StateBytes(total, total / max(1, sum(p.numel() for p in named.values())), found)
