"""Batched inverse roots of symmetric positive semi-definite matrices: (A + eps I)^(-p).

Every solver has one contract: A of shape (B, d, d), float32 or float64, p > 0, eps > 0 -> (B, d, d) of the same dtype,
symmetric to rounding. A solver raises `torch.linalg.LinAlgError` when any matrix of the batch fails; `inverse_root` then goes
matrix by matrix.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def eigh(A: Tensor, p: float, eps: float) -> Tensor:
    """(A + eps I)^(-p) = Q (Lambda + eps)^(-p) Q^T, with A = Q Lambda Q^T.

    Where rounding made an eigenvalue of a matrix negative, all of its eigenvalues are shifted up until the smallest is 0.
    """
    lam, Q = torch.linalg.eigh(A)
    lam = lam - lam[:, :1].clamp(max=0) + eps
    return (Q * lam.pow(-p).unsqueeze(-2)) @ Q.mT


SOLVERS: dict[str, Callable[[Tensor, float, float], Tensor]] = {"eigh": eigh}


def inverse_root(A: Tensor, p: float, eps: float, solver: str, previous: Tensor) -> Tensor:
    """(A + eps I)^(-p) of each matrix of A: (B, d, d), finite, by SOLVERS[solver].

    A matrix on which the solver fails is tried alone, then in float64; if that fails too it keeps its `previous` root.
    """
    try:
        return _finite_root(A, p, eps, solver)
    except torch.linalg.LinAlgError:
        return torch.cat([_rescue(A[b : b + 1], p, eps, solver, previous[b : b + 1]) for b in range(len(A))])


def _finite_root(A: Tensor, p: float, eps: float, solver: str) -> Tensor:
    X = SOLVERS[solver](A, p, eps)
    if not torch.isfinite(X).all():  # seen: float32 eigh on a CPU gives NaN, and no error, for some rank-deficient matrices
        raise torch.linalg.LinAlgError(f"{solver} gave a root with NaN or Inf")
    return X


def _rescue(A: Tensor, p: float, eps: float, solver: str, previous: Tensor) -> Tensor:
    for dtype in (A.dtype, torch.float64):
        try:
            return _finite_root(A.to(dtype), p, eps, solver).to(A.dtype)
        except torch.linalg.LinAlgError:
            continue
    return previous
