"""Moments, momentum, and lengths: the formulas of one step, and where each is computed.

One step for a matrix W (m x n) with gradient G, as Li, Dong & Lin analyze it (arXiv 2601.07326; the abstract names the method,
the details are our reading of it):

    L <- beta2 L + (1 - beta2) G G^T          R <- beta2 R + (1 - beta2) G^T G        Kronecker.update
    X_L = (L + eps I)^(-1/p)                  X_R = (R + eps I)^(-1/q)                Kronecker.refresh
    M <- beta1 M + (1 - beta1) G                                                      average
    P = X_L M X_R                                                                     Kronecker.apply
    W <- (1 - lr wd) W - lr P                                                         copies.move

In the paper's letters beta1 is theta, beta2 is beta, lr is eta, wd is lambda, W is X. The competition's submission adds bias
corrections, NAdam's look-ahead, grafting (`rescale`), and momentum on P.

Elementwise work is bound by memory, and allocating a large tensor costs several passes over an existing one. So results reuse
the memory of what is no longer needed: the averaged gradient that of the gradient, the direction that of the averaged gradient.

Elementwise functions take any shape and are called once on the flat vector of all stacks; the others take a stack
(B, d1, ..., dk). `present` is None when every block has a gradient; otherwise it broadcasts against the state, 1 where a block
has a gradient and 0 where it has none: the state of such a block does not change.
"""

import ctypes
from collections.abc import Callable, Sequence
from math import isfinite

import torch
from torch import Tensor

LARGEST = 1e38  # what float32 holds, with room to spare


def bias_correction(beta: float, t: int) -> float:
    """Return 1 - beta^t in float32 arithmetic, as the competition ran it; 1.0 for beta = 1, a plain sum.

    A beta that float32 rounds to 1 is taken in float64.
    """
    if beta == 1.0:
        return 1.0
    rounded = ctypes.c_float(ctypes.c_float(beta).value ** t).value
    return ctypes.c_float(1.0 - rounded).value or 1.0 - beta**t


def bias_corrections(beta: float, counts: Sequence[int], spread: Callable[[list[float]], Tensor]) -> float | Tensor:
    """Return 1 - beta^t if all parameters count the same t steps; otherwise the `spread` of each one's. 0 is no count."""
    if len({0, *counts}) <= 2:
        return bias_correction(beta, max(1, *counts))
    return spread([bias_correction(beta, max(1, t)) for t in counts])


def factor_steps(t: int, every: int) -> int:
    """Return the step up to which a factor's average counts after t gradients: it takes the first and then each `every`-th."""
    return -(-t // every) * every


def accumulate(S: Tensor, X: Tensor, beta: float, present: Tensor | None) -> None:
    """S <- beta S + (1 - beta) X in place; for beta = 1 a plain sum, S <- S + X.

    A sum stops at LARGEST: it would stay infinite for ever.
    """
    if beta == 1.0:
        S.add_(X if present is None else X * present).clamp_(-LARGEST, LARGEST)
    else:
        S.lerp_(X, 1 - beta if present is None else (1 - beta) * present)


def accumulate_squares(V: Tensor, G: Tensor, beta: float, present: Tensor | None) -> None:
    """V <- beta V + (1 - beta) G * G in place; for beta = 1 a plain sum, as in `accumulate`."""
    if beta < 1.0:
        V.mul_(beta if present is None else 1 - (1 - beta) * present)
    V.addcmul_(G, G, value=1 - beta if beta < 1.0 else 1)
    if beta == 1.0:
        V.clamp_(max=LARGEST)


def average(M: Tensor | None, G: Tensor, beta1: float, nadam: bool, bc1: float | Tensor, present: Tensor | None) -> Tensor:
    """M <- beta1 M + (1 - beta1) G in place; return the averaged gradient N = M / bc1 in the memory of G.

    With nadam, N = (beta1 M + (1 - beta1) G) / bc1 on the new M. Without M (beta1 = 0), N = G, uncorrected. The paper's M, with
    theta = beta1, is N with bc1 = 1 and without nadam.
    """
    if M is None:
        return G
    accumulate(M, G, beta1, present)
    return G.lerp_(M, beta1).div_(bc1) if nadam else torch.div(M, bc1, out=G)


def block_norms(S: Tensor) -> Tensor:
    """Return the Frobenius norm of each block: (B, d1, ..., dk) -> (B, 1, ..., 1)."""
    norms: Tensor = torch.linalg.vector_norm(S, dim=tuple(range(1, S.dim())), keepdim=True)
    return norms


def normalize(S: Tensor) -> Tensor:
    """Return S / (||S||_F + 1e-16), block by block."""
    return S / (block_norms(S) + 1e-16)


def graft(P: Tensor, A: Tensor, sets_length: bool, out: Tensor) -> list[int]:
    """out <- P ||A||_F / (||P||_F + 1e-16), block by block, or P without `sets_length`.

    A block whose P is not finite becomes A, or without `sets_length` zero. Return these blocks; [] on an accelerator, for which
    the host does not wait.
    """
    norms = block_norms(P)
    if norms.device.type != "cpu":
        scaled, instead = (P * (block_norms(A) / (norms + 1e-16)), A) if sets_length else (P, torch.zeros_like(P))
        out.copy_(torch.where(norms.isfinite(), scaled, instead))
        return []
    found = norms.flatten().tolist()
    bad = [] if all(map(isfinite, found)) else [i for i, norm in enumerate(found) if not isfinite(norm)]
    instead = A[bad] if bad and sets_length else torch.zeros(())
    if sets_length:
        torch.mul(P, block_norms(A) / (norms + 1e-16), out=out)
    else:
        out.copy_(P)
    if bad:
        out[bad] = instead.to(out.dtype)
    return bad


def momentum(B: Tensor, P: Tensor, mu: float, nesterov: bool, present: Tensor | None) -> None:
    """B <- mu B + (1 - mu) P, then P <- B, or with nesterov P <- (1 - mu) P + mu B, in place."""
    accumulate(B, P, mu, present)
    if nesterov:
        P.lerp_(B, mu)
    else:
        P.copy_(B)
