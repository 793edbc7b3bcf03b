"""AdamW-style Shampoo on stacks of blocks.

One step for a matrix parameter W of shape (m, n) with gradient G, as Li, Dong & Lin analyse it (arXiv 2601.07326; their
abstract names the method, the details below are our reading of it):

    L <- beta2 L + (1 - beta2) G G^T          R <- beta2 R + (1 - beta2) G^T G        update_factors
    X_L = (L + eps I)^(-1/p)                  X_R = (R + eps I)^(-1/q)                refresh_roots
    M <- beta1 M + (1 - beta1) G                                                      average
    P = X_L M X_R                                                                     precondition
    W <- (1 - lr wd) W - lr P                                                         optimizer.step

In the paper's letters beta1 is theta, beta2 is beta, lr is eta, wd is lambda, W is X. The competition's
submission adds bias corrections, NAdam's look-ahead, grafting (`rescale`) and momentum on P.

Elementwise work is bound by memory, and a new large tensor costs several passes over one that is there. So results take the
place of what is not needed any more: the averaged gradient that of the gradient, the direction that of the averaged gradient.

Shapes: a stack is B blocks of one shape, (B, d1, ..., dk); a block of order k has k factors. Functions that work elementwise
take any shape and are called once on the flat vector of all stacks. `present` is None when every block has a gradient;
otherwise it broadcasts against the state, 1 where a block has a gradient and 0 where it has none: that block's state stays.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .roots import inverse_root

ROOTS_AT_A_TIME = 2**22  # numbers


def bias_correction(beta: float, t: int) -> float:
    """1 - beta^t in float32 arithmetic, as the competition ran it; 1.0 for beta = 1, a plain sum.

    A beta that float32 rounds to 1 is taken in float64.
    """
    if beta == 1.0:
        return 1.0
    rounded = ctypes.c_float(ctypes.c_float(beta).value ** t).value
    return ctypes.c_float(1.0 - rounded).value or 1.0 - beta**t


def block_exponents(order: int, exponents: float | tuple[float, float] | None, multiplier: float) -> tuple[float, ...]:
    """The exponent of each factor's inverse root, 1/p and 1/q in the paper, for a block of the given order k.

    None: 1/(2k) each. A float: that each. A pair (left, right): left for the first dimension, right/(k-1) for each other one;
    a block of order 1 gets left + right. All times the multiplier.
    """
    if exponents is None:
        each = [1 / (2 * order)] * order
    elif isinstance(exponents, (tuple, list)):
        left, right = exponents
        each = [left] + [right / (order - 1)] * (order - 1) if order > 1 else [left + right]
    else:
        each = [exponents] * order
    return tuple(multiplier * e for e in each)


def accumulate(S: Tensor, X: Tensor, beta: float, present: Tensor | None) -> None:
    """S <- beta S + (1 - beta) X, in place; for beta = 1 a plain sum, S <- S + X (X being 0 where not present)."""
    if beta == 1.0:
        S.add_(X)
    else:
        S.lerp_(X, 1 - beta if present is None else (1 - beta) * present)


def accumulate_squares(V: Tensor, G: Tensor, beta: float, present: Tensor | None) -> None:
    """V <- beta V + (1 - beta) G * G, in place; for beta = 1 a plain sum, as `accumulate`."""
    if beta < 1.0:
        V.mul_(beta if present is None else 1 - (1 - beta) * present)
    V.addcmul_(G, G, value=1 - beta if beta < 1.0 else 1)


def unfold(G: Tensor, d: int) -> Tensor:
    """(B, d1, ..., dk) -> (B, product of the others, d_d), d from 1: the matrix whose rows run along dimension d.

    A view for the first and the last dimension.
    """
    return G.movedim(d, -1).flatten(1, -2) if G.dim() > 2 else G.unsqueeze(1)


def update_factors(factors: Sequence[Tensor | None], G: Tensor, beta2: float, present: Tensor | None) -> None:
    """A_d <- beta2 A_d + (1 - beta2) U^T U in place, U = unfold(G, d); for beta2 = 1 a plain sum.

    For matrices A_1 and A_2 are the paper's L and R: averages of G G^T and G^T G with decay beta.
    factors[d - 1]: (B, d_d, d_d), None where the exponent is zero; present: (B, 1, 1) or None.
    """
    for d, A in enumerate(factors, start=1):
        if A is None:
            continue
        U = unfold(G, d)
        if present is None:
            A.baddbmm_(U.mT, U, beta=beta2, alpha=1 - beta2 if beta2 < 1 else 1)
        else:
            accumulate(A, U.mT @ U, beta2, present)


def refresh_roots(
    inv_roots: Sequence[Tensor | None],
    factors: Sequence[Tensor | None],
    eigvecs: Sequence[Tensor | None],
    exponents: Sequence[float],
    bc2: float,
    blocks: Sequence[int],
    **options: Any,
) -> list[tuple[int, str]]:
    """X_d <- (A_d / bc2 + eps I)^(-exponents[d]) in place, for each dimension with a factor: (B, d_d, d_d), for these blocks.

    For matrices the paper's (L + eps I)^(-1/p) and (R + eps I)^(-1/q), with bc2 = 1: bias correction is the competition's.
    A few at a time, lest the solver need several times the memory of all factors. The options are those of `inverse_root`.
    Returns the blocks for which float32 was not enough, and what became of their roots.
    """
    rescued = []
    for X, A, Q, p in zip(inv_roots, factors, eigvecs, exponents, strict=True):
        if A is None or X is None:
            continue
        few = max(1, ROOTS_AT_A_TIME // A[0].numel())
        for some in (blocks[i : i + few] for i in range(0, len(blocks), few)):
            rows = slice(some[0], some[-1] + 1) if isinstance(some, range) else list(some)  # a slice copies nothing
            basis = Q[rows] if Q is not None else None
            roots, causes = inverse_root(A[rows], bc2, p, previous=X[rows], Q=basis, **options)
            X[rows] = roots.to(X.dtype)
            if Q is not None and basis is not None:
                Q[rows] = basis
            rescued += [(some[i], cause) for i, cause in causes.items()]
    return rescued


def average(M: Tensor | None, G: Tensor, beta1: float, nadam: bool, bc1: float, present: Tensor | None) -> Tensor:
    """M <- beta1 M + (1 - beta1) G in place; returns the averaged gradient N = M / bc1, in the place of G.

    With nadam, N = (beta1 M + (1 - beta1) G) / bc1 on the new M. Without M (beta1 = 0), N = G, uncorrected. The paper's M, of
    decay theta = beta1, is N with bc1 = 1 and without nadam.
    """
    if M is None:
        return G
    accumulate(M, G, beta1, present)
    return G.lerp_(M, beta1).div_(bc1) if nadam else torch.div(M, bc1, out=G)


def precondition(N: Tensor, inv_roots: Sequence[Tensor | None]) -> Tensor:
    """Contract N (B, d1, ..., dk) with X_d (B, d_d, d_d) along each dimension d; for matrices X_1 N X_2.

    In the paper (L + eps I)^(-1/p) M (R + eps I)^(-1/q); an X_d of None is the identity, 1/p or 1/q = 0 (one-sided).
    The first from the left, the others from the right, the last of them first: so only those between are copied.
    """
    for d in (1, *range(len(inv_roots), 1, -1)):
        X = inv_roots[d - 1]
        if X is None:
            continue
        X = X.to(N.dtype)
        if d == 1:
            N = (X @ N.reshape(*N.shape[:2], -1)).view(N.shape)
        else:
            moved = N.movedim(d, -1)
            N = (moved.flatten(1, -2) @ X).view(moved.shape).movedim(-1, d)
    return N


def block_norms(S: Tensor) -> Tensor:
    """The Frobenius norm of each block: (B, d1, ..., dk) -> (B, 1, ..., 1)."""
    return torch.linalg.vector_norm(S, dim=tuple(range(1, S.dim())), keepdim=True)


def normalize(S: Tensor) -> Tensor:
    """S / (||S||_F + 1e-16), block by block."""
    return S / (block_norms(S) + 1e-16)


def rescale(P: Tensor, S: Tensor, out: Tensor) -> None:
    """Each block of P with the Frobenius norm of S's: out <- P ||S||_F / (||P||_F + 1e-16)."""
    torch.mul(P, block_norms(S) / (block_norms(P) + 1e-16), out=out)


def momentum(B: Tensor, P: Tensor, mu: float, nesterov: bool, present: Tensor | None) -> Tensor:
    """B <- mu B + (1 - mu) P in place; returns B, or with nesterov (1 - mu) P + mu B in the place of P."""
    accumulate(B, P, mu, present)
    return P.lerp_(B, mu) if nesterov else B
