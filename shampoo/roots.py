"""Batched inverse roots of symmetric positive semi-definite matrices: (A + eps I)^(-p).

Every solver has one contract: A of shape (B, d, d), float32 or float64, p > 0, eps > 0, and a basis Q (B, d, d) or None -> X of
A's shape and dtype, symmetric to rounding. Solvers in WITH_BASIS start from the basis that Q holds, all zeros before the first
time, and leave the new one in it. A solver raises `torch.linalg.LinAlgError` when any matrix of the batch fails; `inverse_root`
then goes matrix by matrix.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isclose

import torch
from torch import Tensor

QR_TOLERANCE = 0.1  # of `qr`: relative to ||A||_F
NEWTON_STEPS = 100


def power(lam: Tensor, Q: Tensor, p: float, eps: float) -> Tensor:
    """Q (Lambda + eps)^(-p) Q^T for eigenvalues (B, d) and eigenvectors Q (B, d, d).

    Where rounding made an eigenvalue of a matrix negative, all of its eigenvalues are shifted up until the smallest is 0.
    """
    lam = lam - lam.amin(dim=1, keepdim=True).clamp(max=0) + eps
    return (Q * lam.pow(-p).unsqueeze(-2)) @ Q.mT


def eigh(A: Tensor, p: float, eps: float, Q: Tensor | None = None) -> Tensor:
    """`power` of all eigenvalues and eigenvectors of A. Exact to rounding."""
    lam, basis = torch.linalg.eigh(A)
    return power(lam, basis, p, eps)


def qr(A: Tensor, p: float, eps: float, Q: Tensor) -> Tensor:
    """`power` of the Rayleigh quotients lambda_i = q_i^T A q_i and the basis Q, which follows A.

    With B = Q^T A Q, a basis is good while ||B - diag B||_F <= tau ||B||_F; since ||B||_F = ||A||_F, one product A Q tells.
    Where it is not, one step of orthogonal iteration makes it Q <- qr(A Q); where there is none, `eigh` does. (Eschenhagen et
    al., arXiv 2506.03595, have this test.) On a factor that turns slowly a root is a tenth of its norm off, at most.
    """
    AQ = A @ Q
    lam = (Q * AQ).sum(dim=1)
    square = torch.linalg.vector_norm(A, dim=(1, 2)).square()
    turn = square - lam.square().sum(dim=1) > QR_TOLERANCE**2 * square
    first = Q[:, :, 0].square().sum(dim=1) == 0
    if first.any():
        lam[first], Q[first] = torch.linalg.eigh(A[first])
        turn = turn & ~first
    if turn.any():
        order = lam[turn].argsort(dim=1, descending=True).unsqueeze(1)
        basis = torch.linalg.qr(torch.take_along_dim(AQ[turn], order, dim=2)).Q
        Q[turn], lam[turn] = basis, (basis * (A[turn] @ basis)).sum(dim=1)
    return power(lam, Q, p, eps)


def newton(A: Tensor, p: float, eps: float, Q: Tensor | None = None) -> Tensor:
    """X -> (A + eps I)^(-1/r), r = 1/p an integer, by the coupled Newton iteration, matrix products alone:

        X <- X T,  M <- T^r M,  T = ((r + 1) I - M) / r,     from X = z^(1/r) I, M = z (A + eps I)

    until M is I, with z = (1 + r) / (2 ||A + eps I||_F) (Higham, Functions of Matrices, 7.3; Anil et al., arXiv 2002.09018). It
    takes no eps below two roundings of ||A||_F: A itself may have eigenvalues as far below 0.
    """
    r, eye = round(1 / p), torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    rounding = torch.finfo(A.dtype).eps
    M = A + (2 * rounding * torch.linalg.matrix_norm(A)[:, None, None]).clamp(min=eps) * eye
    z = (1 + r) / (2 * torch.linalg.matrix_norm(M)[:, None, None])
    X, M = z ** (1 / r) * eye, z * M
    error = (M - eye).abs().amax(dim=(1, 2), keepdim=True)
    going = torch.ones_like(error, dtype=torch.bool)
    for _ in range(NEWTON_STEPS):
        T = ((r + 1) * eye - M) / r
        M_next = torch.linalg.matrix_power(T, r) @ M
        error_next = (M_next - eye).abs().amax(dim=(1, 2), keepdim=True)
        going &= (error > 10 * rounding) & (error_next < 1.2 * error)  # in the end only rounding errors grow
        if not going.any():
            break
        X, M, error = X.where(~going, X @ T), M.where(~going, M_next), error.where(~going, error_next)
    return (X + X.mT) / 2


SOLVERS: dict[str, Callable[..., Tensor]] = {"eigh": eigh, "qr": qr, "newton": newton}
WITH_BASIS = ("qr",)


def check_solver(solver: str, exponents: tuple[float, ...]) -> None:
    """Raise ValueError if the solver cannot have these exponents."""
    if solver == "newton" and any(p and not isclose(round(1 / p) * p, 1) for p in exponents):
        raise ValueError(f"solver 'newton' needs exponents 1, 1/2, 1/3, ...; here they are {exponents}: take 'eigh' or 'qr'")


@contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products of float32 in float32, whatever the user allows elsewhere (TF32, bfloat16)."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)


def inverse_root(A: Tensor, p: float, eps: float, solver: str, previous: Tensor, Q: Tensor | None = None) -> Tensor:
    """(A + eps I)^(-p) of each matrix of A: (B, d, d), finite, by SOLVERS[solver].

    A matrix on which the solver fails is tried alone by `eigh`, then in float64; if that fails too it keeps its `previous`
    root.
    """
    with full_precision():
        try:
            return _finite(SOLVERS[solver](A, p, eps, Q))
        except torch.linalg.LinAlgError:
            if Q is not None:
                Q.zero_()  # it may hold NaN by now: the next time begins anew
            return torch.cat([_rescue(A[b : b + 1], p, eps, previous[b : b + 1]) for b in range(len(A))])


def _finite(X: Tensor) -> Tensor:
    if not torch.isfinite(X).all():  # seen: float32 eigh on a CPU gives NaN, and no error, for some rank-deficient matrices
        raise torch.linalg.LinAlgError("a root with NaN or Inf")
    return X


def _rescue(A: Tensor, p: float, eps: float, previous: Tensor) -> Tensor:
    for dtype in (A.dtype, torch.float64):
        try:
            return _finite(eigh(A.to(dtype), p, eps)).to(A.dtype)
        except torch.linalg.LinAlgError:
            continue
    return previous
