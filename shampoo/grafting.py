"""Grafting: the length of a step comes from another method, its direction from Shampoo (Agarwal et al. 2020, arXiv 2002.11803).

A method is a second moment V, kept by `update.accumulate` with `second_moment_decay`, and a function (N, V, bc2, eps) -> step.
N is the averaged gradient, bc2 = 1 - beta2^t. All work elementwise, on any shape and dtype, and leave N and V as they are; the
step may be N itself.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def sgd(N: Tensor, V: Tensor | None, bc2: float, eps: float) -> Tensor:
    """N."""
    return N


def rmsprop(N: Tensor, V: Tensor, bc2: float, eps: float) -> Tensor:
    """N / (sqrt(V) + eps), V an average (RMSprop) or a sum (AdaGrad) of squared gradients."""
    D = V.sqrt().add_(eps)
    return torch.div(N, D, out=D)


def adam(N: Tensor, V: Tensor, bc2: float, eps: float) -> Tensor:
    """N / (sqrt(V / bc2) + eps)."""
    D = V.div(bc2).sqrt_().add_(eps)
    return torch.div(N, D, out=D)


# "none" means that the preconditioned direction keeps its own length.
GRAFTING: dict[str, Callable[..., Tensor]] = {"none": sgd, "sgd": sgd, "adagrad": rmsprop, "rmsprop": rmsprop, "adam": adam}
WITHOUT_SECOND_MOMENT = ("none", "sgd")


def second_moment_decay(method: str, beta2: float) -> float:
    """The decay of V under `method`: 1.0 (a plain sum) for AdaGrad, beta2 otherwise."""
    return 1.0 if method == "adagrad" else beta2
