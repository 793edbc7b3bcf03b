"""Grafting: a step has Shampoo's direction and the length of another method's step (Agarwal et al., arXiv 2002.11803).

A step function (N, V, bc2, eps) -> step takes the averaged gradient N, the second moment V, and bc2 = 1 - beta2^t, a number or
a tensor that broadcasts. It is elementwise, for any shape and floating-point dtype, and leaves N and V unchanged; it may return
N itself. eps is at least the dtype's smallest normal number, so that 0 / 0 is 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Grafting(NamedTuple):
    """A grafting method: its step function, and the state that it needs."""

    step: Callable[..., Tensor]
    second_moment: bool = True  # whether it needs V; if not, parameters without factors use "adam" instead
    sums: bool = False  # whether V is a plain sum of squares instead of an average
    sets_length: bool = True  # if False, the preconditioned direction keeps its own length


def sgd(N: Tensor, V: Tensor | None, bc2: float, eps: float) -> Tensor:
    """Return N."""
    return N


def rmsprop(N: Tensor, V: Tensor, bc2: float, eps: float) -> Tensor:
    """Return N / (sqrt(V) + eps), where V is an average (RMSprop) or a sum (AdaGrad) of squared gradients."""
    D = V.sqrt().add_(max(eps, torch.finfo(V.dtype).tiny))
    return torch.div(N, D, out=D)


def adam(N: Tensor, V: Tensor, bc2: float, eps: float) -> Tensor:
    """Return N / (sqrt(V / bc2) + eps)."""
    D = V.div(bc2).sqrt_().add_(max(eps, torch.finfo(V.dtype).tiny))
    return torch.div(N, D, out=D)


GRAFTING: dict[str, Grafting] = {
    "none": Grafting(sgd, second_moment=False, sets_length=False),
    "sgd": Grafting(sgd, second_moment=False),
    "adagrad": Grafting(rmsprop, sums=True),
    "rmsprop": Grafting(rmsprop),
    "adam": Grafting(adam),
}
