"""Batched inverse roots of symmetric positive semi-definite matrices: the (L + eps I)^(-1/p) and (R + eps I)^(-1/q) of arXiv
2601.07326. Here A is a factor, L or R, and p is the power itself, the paper's 1/p or 1/q.

Every solver has one contract: A of shape (B, d, d), float32 or float64, with entries of at most 2, scales s and eps > 0 of
shape (B, 1), p > 0, and a basis Q (B, d, d) or None -> (s A + eps I)^(-p), symmetric to rounding, of A's shape and dtype.
Solvers in WITH_BASIS start from the basis that Q holds, all zeros before the first time, and leave the new one in it. A solver
raises `torch.linalg.LinAlgError` when any matrix of the batch fails; `inverse_root` then goes matrix by matrix.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isclose

import torch
from torch import Tensor

NEWTON_STEPS = 100


def power(lam: Tensor, Q: Tensor, p: float, eps: Tensor) -> Tensor:
    """Q (Lambda + eps)^(-p) Q^T for eigenvalues (B, d) and eigenvectors Q (B, d, d).

    Where rounding made an eigenvalue of a matrix negative, all of its eigenvalues are shifted up until the smallest is 0.
    """
    lam = lam - lam.amin(dim=1, keepdim=True).clamp(max=0) + eps
    return (Q * lam.pow(-p).unsqueeze(-2)) @ Q.mT


def eigh(A: Tensor, s: Tensor, p: float, eps: Tensor, Q: Tensor | None = None, tolerance: float = 0.0) -> Tensor:
    """`power` of all eigenvalues and eigenvectors of A. Exact to rounding."""
    lam, basis = torch.linalg.eigh(A)
    return power(lam * s, basis, p, eps)


def qr(A: Tensor, s: Tensor, p: float, eps: Tensor, Q: Tensor, tolerance: float) -> Tensor:
    """`power` of the Rayleigh quotients lambda_i = q_i^T A q_i and the basis Q, which follows A.

    With B = Q^T A Q, a basis is good while ||B - diag B||_F <= tolerance ||B||_F; since ||B||_F = ||A||_F, one product A Q
    tells. Where it is not, one step of orthogonal iteration makes it Q <- qr(A Q); where there is none, `eigh` does.
    (Eschenhagen et al., arXiv 2506.03595, have this test.)
    """
    AQ = A @ Q
    lam = (Q * AQ).sum(dim=1)
    square = torch.linalg.vector_norm(A, dim=(1, 2)).square()
    turn = square - lam.square().sum(dim=1) > tolerance**2 * square
    first = Q[:, :, 0].square().sum(dim=1) == 0
    if first.any():
        lam[first], Q[first] = torch.linalg.eigh(A[first])
        turn = turn & ~first
    if turn.any():
        order = lam[turn].argsort(dim=1, descending=True).unsqueeze(1)
        basis = torch.linalg.qr(torch.take_along_dim(AQ[turn], order, dim=2)).Q
        Q[turn], lam[turn] = basis, (basis * (A[turn] @ basis)).sum(dim=1)
    return power(lam * s, Q, p, eps)


def newton(A: Tensor, s: Tensor, p: float, eps: Tensor, Q: Tensor | None = None, tolerance: float = 0.0) -> Tensor:
    """s^(-1/r) times X -> (A + (eps / s) I)^(-1/r), r = 1/p an integer, by the coupled Newton iteration, products alone:

        X <- X T,  M <- T^r M,  T = ((r + 1) I - M) / r,     from X = z^(1/r) I, M = z (A + (eps / s) I)

    until M is I, with z = (1 + r) / (2 ||A + (eps / s) I||_F) (Higham, Functions of Matrices, 7.3; Anil et al., arXiv
    2002.09018). It takes no eps / s below two roundings of ||A||_F: A itself may have eigenvalues as far below 0.
    """
    r, eye = round(1 / p), torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    rounding = torch.finfo(A.dtype).eps
    M = A + torch.maximum(eps / s, 2 * rounding * torch.linalg.vector_norm(A, dim=(1, 2)).unsqueeze(1)).unsqueeze(2) * eye
    z = (1 + r) / (2 * torch.linalg.vector_norm(M, dim=(1, 2), keepdim=True))
    X, M = z ** (1 / r) * eye, z * M
    error = torch.linalg.vector_norm(M - eye, dim=(1, 2), keepdim=True)
    enough = 10 * rounding * A.shape[-1] ** 0.5
    going = torch.ones_like(error, dtype=torch.bool)
    for _ in range(NEWTON_STEPS):
        T = ((r + 1) * eye - M) / r
        M_next = torch.linalg.matrix_power(T, r) @ M
        error_next = torch.linalg.vector_norm(M_next - eye, dim=(1, 2), keepdim=True)
        going &= (error > enough) & (error_next < 1.2 * error)  # it falls until only rounding errors are left, which grow
        if not going.any():
            break
        X, M, error = X.where(~going, X @ T), M.where(~going, M_next), error.where(~going, error_next)
    return s.pow(-p).unsqueeze(2) * (X + X.mT) / 2


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


def inverse_root(
    A: Tensor,
    c: float,
    p: float,
    eps: float,
    previous: Tensor,
    Q: Tensor | None = None,
    *,
    relative_eps: bool = False,
    solver: str = "eigh",
    qr_tolerance: float = 0.3,
) -> tuple[Tensor, dict[int, str]]:
    """(A / c + eps I)^(-p) of each matrix of A: (B, d, d), always finite, by SOLVERS[solver]; eps tr(A / c) if relative_eps.

    The paper's have c = 1 and an absolute eps. Each matrix is divided by a power of two, so that no product overflows and no
    bit is lost. One that fails is tried alone by `eigh`, then in float64; if that fails too, or A is not finite, it keeps its
    `previous` root, or gets the identity where that is zero. Returns the roots, and in words what became of the matrices for
    which float32 was not enough.
    """
    s = _scales(A, c, eps)
    matrices = A / (c * s.unsqueeze(2))
    shift = torch.full_like(s, eps)
    if relative_eps:
        trace = s * matrices.diagonal(dim1=1, dim2=2).sum(dim=1, keepdim=True)
        shift = shift.where(trace <= 0, eps * trace)
    with full_precision():
        try:
            _finite(s)
            return _finite(SOLVERS[solver](matrices, s, p, shift, Q, qr_tolerance)), {}
        except torch.linalg.LinAlgError:
            if Q is not None:
                Q.zero_()  # it may hold NaN by now: the next time begins anew
        alone = [slice(b, b + 1) for b in range(len(A))]
        rescued = [_rescue(matrices[b], s[b], p, shift[b], previous[b]) for b in alone]
    return torch.cat([X for X, _ in rescued]), {b: cause for b, (_, cause) in enumerate(rescued) if cause}


def _scales(A: Tensor, c: float, eps: float) -> Tensor:
    """The power of two of the largest entry of each A / c, or of eps if that is larger; NaN where A is not finite: (B, 1)."""
    largest = torch.linalg.vector_norm(A, torch.inf, dim=(1, 2)).unsqueeze(1).clamp(min=c * eps) / c
    return largest / (2 * torch.frexp(largest).mantissa) + 0 * largest


def _finite(X: Tensor) -> Tensor:
    if not torch.isfinite(X).all():  # seen: float32 eigh on a CPU gives NaN, and no error, for some rank-deficient matrices
        raise torch.linalg.LinAlgError("a matrix with NaN or Inf")
    return X


def _rescue(A: Tensor, s: Tensor, p: float, eps: Tensor, previous: Tensor) -> tuple[Tensor, str]:
    """A root for one matrix, and how it was found, "" if as ever."""
    for dtype, found in ((A.dtype, ""), (torch.float64, "computed in float64")):
        try:
            exact = eigh(_finite(A).to(dtype), s.to(dtype), p, eps.to(dtype))
            return _finite(exact.to(A.dtype)), found
        except torch.linalg.LinAlgError:
            continue
    if previous.any() and torch.isfinite(previous).all():
        return previous.to(A.dtype), "kept as they were"
    return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).unsqueeze(0), "replaced by the identity"
