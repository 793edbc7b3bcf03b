"""Grafting: a step's direction comes from Shampoo, its length from another method (Agarwal et al., arXiv 2002.11803).

A step function (N, V, bc2, eps) -> step takes the averaged gradient N, the second moment V, and bc2 = 1 - beta2^t. It works
elementwise on any shape and dtype and leaves N and V unchanged; it may return N itself. An eps of 0 is taken as the smallest
normal number, so that 0 / 0 is 0. bc2 may be a tensor that broadcasts.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Grafting(NamedTuple):
    """A row of GRAFTING: how a method computes its step, and what it needs."""

    step: Callable[..., Tensor]
    second_moment: bool = True  # whether it keeps V; without V, blocks that have no factors use Adam
    sums: bool = False  # V is a plain sum of squares, not an average
    sets_length: bool = True  # otherwise the preconditioned direction keeps its own


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
