"""Formulas of a step: bias corrections, moments, grafting, and momentum.

One step for a matrix W (m x n) with gradient G, and the function that computes each formula. This is how we read the method of
Li, Dong & Lin (arXiv 2601.07326), whose abstract names it without details:

    L <- beta2 L + (1 - beta2) G G^T          R <- beta2 R + (1 - beta2) G^T G        Kronecker.update
    X_L = (L + eps I)^(-1/p)                  X_R = (R + eps I)^(-1/q)                Kronecker.refresh
    M <- beta1 M + (1 - beta1) G                                                      average
    P = X_L M X_R                                                                     Kronecker.direction
    P <- P + wd W                                                                     step.compute_directions
    W <- W - lr P                                                                     copies.move

The paper writes theta for beta1, beta for beta2, eta for lr, lambda for wd, and X for W. The Shampoo submission to the AlgoPerf
competition adds bias corrections, NAdam's look-ahead, grafting (`graft`), and momentum on P; so do we.

Elementwise work is memory-bound, and allocating a large tensor costs as much as several passes over an existing one. So results
overwrite what is no longer needed: the averaged gradient overwrites the gradient, and the direction the averaged gradient.

Elementwise functions take any shape and are called once on the flat vector of all stacks; the others take a stack
(B, d1, ..., dk). `present` is None if every block has a gradient. Otherwise it broadcasts against the state: 1 for blocks with
a gradient, and 0 for blocks without, whose state does not change.
"""

import ctypes
from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

SMALLEST_NORM, LARGEST_NORM = 1e-10, 1e18  # between which squares in float32 neither vanish beside 1e-16 nor overflow
LARGEST = 1e38  # bound for options and plain sums, below float32's maximum, 3.4e38


def bias_correction(beta: float, t: int) -> float:
    """Return 1 - beta^t in float32 arithmetic, as in the competition's submission; 1.0 for beta = 1, a plain sum.

    If that is 0, because float32 rounds beta^t to 1, return it in float64.
    """
    if beta == 1.0:
        return 1.0
    rounded = ctypes.c_float(ctypes.c_float(beta).value ** t).value
    return ctypes.c_float(1.0 - rounded).value or 1.0 - beta**t


def bias_corrections(beta: float, counts: Sequence[int], spread: Callable[[list[float]], Tensor]) -> float | Tensor:
    """Return 1 - beta^t for each parameter's count t: a float if all counts are equal, otherwise a tensor from `spread`.

    Counts of 0, for parameters without a gradient, are ignored.
    """
    if len({0, *counts}) <= 2:
        return bias_correction(beta, max(1, *counts))
    return spread([bias_correction(beta, max(1, t)) for t in counts])


def factor_steps(t: int, every: int) -> int:
    """Return ceil(t / every) * every, so that 1 - beta2^result corrects a factor after t gradients.

    The factor has taken ceil(t / every) of them (the first and then every `every`-th), each with decay rate beta2^every.
    """
    return -(-t // every) * every


def accumulate(S: Tensor, X: Tensor, beta: float, present: Tensor | None) -> None:
    """S <- beta S + (1 - beta) X in place; for beta = 1, a plain sum: S <- S + X.

    A sum is clamped to [-LARGEST, LARGEST], since it could not recover from Inf.
    """
    if beta == 1.0:
        S.add_(X if present is None else X * present).clamp_(-LARGEST, LARGEST)
    else:
        S.lerp_(X, 1 - beta if present is None else (1 - beta) * present)


def accumulate_squares(V: Tensor, G: Tensor, beta: float, present: Tensor | None) -> None:
    """V <- beta V + (1 - beta) G * G in place; for beta = 1, a plain sum, clamped as in `accumulate`."""
    if beta == 1.0:
        V.addcmul_(G, G).clamp_(max=LARGEST)
    else:
        V.mul_(beta if present is None else 1 - (1 - beta) * present).addcmul_(G, G, value=1 - beta)


def average(M: Tensor | None, G: Tensor, beta1: float, nadam: bool, bc1: float | Tensor, present: Tensor | None) -> Tensor:
    """M <- beta1 M + (1 - beta1) G in place; return the averaged gradient N = M / bc1, which overwrites G.

    With nadam, N = (beta1 M + (1 - beta1) G) / bc1 with the new M. If M is None (beta1 = 0), N = G, uncorrected. In the paper,
    N = M: bc1 = 1, and no nadam.
    """
    if M is None:
        return G
    accumulate(M, G, beta1, present)
    return G.lerp_(M, beta1).div_(bc1) if nadam else torch.div(M, bc1, out=G)


def at(x: Any, part: slice) -> Any:
    """Return x[part] if x is a tensor, otherwise x, which is for all elements alike."""
    return x[part] if isinstance(x, Tensor) else x


def block_norms(S: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the Frobenius norm of each block of S (B, d1, ..., dk), as (B, 1, ..., 1), in S's dtype or another one."""
    norms: Tensor = torch.linalg.vector_norm(S, dim=tuple(range(1, S.dim())), keepdim=True, dtype=dtype)
    return norms


def normalize(S: Tensor) -> Tensor:
    """Return S / (||S||_F + 1e-16) for each block."""
    return S / (block_norms(S) + 1e-16)


def graft(P: Tensor, A: Tensor, sets_length: bool, out: Tensor) -> list[int]:
    """out <- P ||A||_F / (||P||_F + 1e-16) for each block, or out <- P if not `sets_length`. Reads the norms on the host.

    If P is not finite, or zero where A is not, out is A, or zero if not `sets_length`. Norms too small or large for float32 are
    taken in float64. Return the indices of blocks without a usable P.
    """
    norms, lengths = block_norms(P), block_norms(A) if sets_length else None
    if are_usual(norms, lengths):
        torch.mul(P, 1.0 if lengths is None else lengths / (norms + 1e-16), out=out)
        return []
    return (~graft_all([P], [A], sets_length, [out])).nonzero().flatten().tolist()


def graft_all(P: Sequence[Tensor], A: Sequence[Tensor], sets_length: bool, out: Sequence[Tensor]) -> Tensor:
    """Do what `graft` does for many stacks, in few operations and without waiting for the device. P is overwritten.

    Return a bool vector over the blocks of all stacks, True where P is usable.
    """
    norms, counts = torch.cat([block_norms(X, torch.float64).flatten() for X in P]), [len(X) for X in P]
    if sets_length:
        scale = torch.cat([block_norms(X).flatten() for X in A]) / (norms + 1e-300)  # 0 if both norms are 0
        usable = torch.add(scale, norms, alpha=0) < 1e200  # False for NaN, for 0 * Inf, and if only P is 0
        for X, of_stack in zip(P, scale.split(counts), strict=True):
            X.mul_(of_stack.view(-1, *[1] * (X.dim() - 1)))
    else:
        usable, A = norms < torch.inf, [P[0].new_zeros(())] * len(P)
    for X, A_X, of_stack, target in zip(P, A, usable.split(counts), out, strict=True):
        torch.where(of_stack.view(-1, *[1] * (X.dim() - 1)), X, A_X, out=target)
    return usable


def are_usual(norms: Tensor, lengths: Tensor | None) -> bool:
    """Return whether all norms are finite and, given lengths, exact in float32 where the length is not zero. On a CPU."""
    found = norms.flatten().tolist()
    if lengths is None or (min(found) > SMALLEST_NORM and max(found) < LARGEST_NORM):
        return all(map(isfinite, found))
    pairs = zip(found, lengths.flatten().tolist(), strict=True)
    return all(SMALLEST_NORM < norm < LARGEST_NORM or norm == length == 0 for norm, length in pairs)


def cautious_decay(P: Sequence[Tensor], W: Sequence[Tensor], weight_decay: float) -> None:
    """P <- P + weight_decay W in place where P W > 0, that is, where the step reduces |W| anyway (arXiv 2411.16085)."""
    for P_i, W_i in zip(P, W, strict=True):
        P_i.add_(W_i * (P_i * W_i > 0), alpha=weight_decay)


def momentum(B: Tensor, P: Tensor, mu: float, nesterov: bool, present: Tensor | None) -> None:
    """B <- mu B + (1 - mu) P, then P <- B, or with nesterov P <- (1 - mu) P + mu B. Both in place."""
    accumulate(B, P, mu, present)
    if nesterov:
        P.lerp_(B, mu)
    else:
        P.copy_(B)
