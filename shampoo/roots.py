"""Batched inverse roots of symmetric positive semidefinite matrices: (L + eps I)^(-1/p) and (R + eps I)^(-1/q) of arXiv
2601.07326. Here A is a factor, L or R, and p is the power itself, the paper's 1/p or 1/q.

Every solver has one contract: solve(A, s, p, eps, Q, **options) -> (s A + eps I)^(-p), of A's shape and dtype and symmetric to
rounding, for A (B, d, d), float32 or float64, with entries of magnitude at most 2, scales s and eps > 0 of shape (B, 1), p > 0,
and a basis Q (B, d, d) or None. A solver that keeps a basis starts from the one in Q, all zeros before the first time, and
leaves the new one there. A solver raises LinAlgError when any matrix of the batch fails; `inverse_root` then takes each alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isclose
from typing import NamedTuple

import torch
from torch import Tensor

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # documented, but not in its __all__

NEWTON_STEPS = 100
LARGEST_ROOT = 64  # of "newton"
QR_TOLERANCE = 0.3


def eigen_power(lam: Tensor, Q: Tensor, p: float, eps: Tensor) -> Tensor:
    """Return Q (Lambda + eps)^(-p) Q^T for eigenvalues (B, d) and eigenvectors Q (B, d, d).

    If rounding made an eigenvalue of a matrix negative, all of its eigenvalues are shifted up until the smallest is 0.
    """
    lam = lam - lam.amin(dim=1, keepdim=True).clamp(max=0) + eps
    return (Q * lam.pow(-p).unsqueeze(-2)) @ Q.mT


def eigh(A: Tensor, s: Tensor, p: float, eps: Tensor, Q: Tensor | None = None) -> Tensor:
    """Return the `eigen_power` of all eigenvalues and eigenvectors of A: exact to rounding."""
    lam, basis = torch.linalg.eigh(A)
    return eigen_power(lam * s, basis, p, eps)


def qr(A: Tensor, s: Tensor, p: float, eps: Tensor, Q: Tensor, qr_tolerance: float = QR_TOLERANCE) -> Tensor:
    """Return the `eigen_power` of the Rayleigh quotients lambda_i = q_i^T A q_i and the basis Q, which follows A.

    With B = Q^T A Q, a basis fits while ||B - diag B||_F <= qr_tolerance ||B||_F; since ||B||_F = ||A||_F, one product A Q
    tells. A basis that does not fit takes one step of orthogonal iteration, Q <- qr(A Q); the first one comes from `eigh`.
    (Eschenhagen et al., arXiv 2506.03595, have this test.)
    """
    AQ = A @ Q
    lam = (Q * AQ).sum(dim=1)
    square = torch.linalg.vector_norm(A, dim=(1, 2)).square()
    turn = square - lam.square().sum(dim=1) > qr_tolerance**2 * square
    first = Q[:, :, 0].square().sum(dim=1) == 0
    if first.any():
        lam[first], Q[first] = torch.linalg.eigh(A[first])
        turn = turn & ~first
    if turn.any():
        order = lam[turn].argsort(dim=1, descending=True).unsqueeze(1)
        basis = torch.linalg.qr(torch.take_along_dim(AQ[turn], order, dim=2)).Q
        Q[turn], lam[turn] = basis, (basis * (A[turn] @ basis)).sum(dim=1)
    return eigen_power(lam * s, Q, p, eps)


def newton(A: Tensor, s: Tensor, p: float, eps: Tensor, Q: Tensor | None = None) -> Tensor:
    """Return s^(-1/r) X, where X -> (A + (eps / s) I)^(-1/r) by the coupled Newton iteration, r = 1/p an integer:

        X <- X T,  M <- T^r M,  T = ((r + 1) I - M) / r,     from X = z^(1/r) I, M = z (A + (eps / s) I)

    until M is I, with z = (1 + r) / (2 ||A + (eps / s) I||_F) (Higham, Functions of Matrices, 7.3; Anil et al., arXiv
    2002.09018). Matrix products alone. eps / s is raised to at least two roundings of ||A||_F, since A itself may have
    eigenvalues that far below 0.
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
        going &= (error > enough) & (error_next < 1.2 * error)  # the error falls until only rounding is left, which grows
        if not going.any():
            break
        X, M, error = X.where(~going, X @ T), M.where(~going, M_next), error.where(~going, error_next)
    root: Tensor = s.pow(-p).unsqueeze(2) * (X + X.mT) / 2
    return root


def check_newton(exponents: tuple[float, ...]) -> None:
    """Raise ValueError unless every exponent is 0 or 1/r for an integer r of at most LARGEST_ROOT."""
    if any(p and not (p * LARGEST_ROOT > 0.999 and isclose(round(1 / p) * p, 1)) for p in exponents):
        raise ValueError(
            f"solver 'newton' needs exponents 1, 1/2, 1/3, ...; here they are {exponents}, and the smallest is "
            f"1/{LARGEST_ROOT}: use 'eigh' or 'qr'"
        )


class Solver(NamedTuple):
    """A way to compute roots."""

    solve: Callable[..., Tensor]
    keeps_basis: bool = False
    options: tuple[str, ...] = ()  # those of the optimizer that only this solver takes
    check: Callable[[tuple[float, ...]], None] = lambda exponents: None  # raises ValueError for exponents it cannot have


SOLVERS: dict[str, Solver] = {
    "eigh": Solver(eigh),
    "qr": Solver(qr, keeps_basis=True, options=("qr_tolerance",)),
    "newton": Solver(newton, check=check_newton),
}


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 matrix products in float32, even where the user allows TF32 or bfloat16."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)


def inverse_root(
    A: Tensor,
    c: float | Tensor,
    p: float,
    eps: float,
    previous: Tensor,
    Q: Tensor | None = None,
    *,
    relative_eps: bool = False,
    solver: str = "eigh",
    **options: object,
) -> tuple[Tensor, dict[int, str]]:
    """Return (A / c + eps I)^(-p) of each matrix of A (B, d, d), always finite; eps tr(A / c) instead of eps if relative_eps.

    c is a number or (B, 1); the paper has c = 1 and an absolute eps. Each matrix is divided by a power of two, so that no
    product overflows and no bit is lost, and goes to SOLVERS[solver] with its options. If that fails for any, each is computed
    alone by `eigh`, then in float64, and Q is reset; if that fails too, or A is not finite, a matrix keeps its `previous` root,
    or gets the identity if that is zero. Also returns, by index, what became of those for which float32 was not enough.
    """
    s = _scales(A, c, torch.finfo(A.dtype).tiny if relative_eps else eps)
    matrices = A / (c * s).unsqueeze(2)
    shift = torch.full_like(s, eps)
    if relative_eps:
        trace = s * matrices.diagonal(dim1=1, dim2=2).sum(dim=1, keepdim=True)
        shift = shift.where(trace <= 0, eps * trace)
    with full_precision():
        try:
            _finite(s)
            return _finite(SOLVERS[solver].solve(matrices, s, p, shift, Q, **options)), {}
        except LinAlgError:
            if Q is not None:
                Q.zero_()  # it may hold NaN by now: start anew next time
        alone = [slice(b, b + 1) for b in range(len(A))]
        rescued = [_rescue(matrices[b], s[b], p, shift[b], previous[b]) for b in alone]
    return torch.cat([X for X, _ in rescued]), {b: cause for b, (_, cause) in enumerate(rescued) if cause}


def _scales(A: Tensor, c: float | Tensor, eps: float) -> Tensor:
    """Return the power of two of the largest entry of each A / c, or of eps if larger: (B, 1); NaN where A is not finite."""
    largest: Tensor = (torch.linalg.vector_norm(A, torch.inf, dim=(1, 2)).unsqueeze(1) / c).clamp(min=eps)
    return largest / (2 * torch.frexp(largest).mantissa) + 0 * largest


def _finite(X: Tensor) -> Tensor:
    if not torch.isfinite(X).all():  # seen: float32 eigh on a CPU returns NaN, and no error, for some rank-deficient matrices
        raise LinAlgError("a matrix with NaN or Inf")
    return X


def _rescue(A: Tensor, s: Tensor, p: float, eps: Tensor, previous: Tensor) -> tuple[Tensor, str]:
    """Return a root for one matrix (1, d, d), and how it was found; "" for the usual way."""
    for dtype, found in ((A.dtype, ""), (torch.float64, "computed in float64")):
        try:
            exact = eigh(_finite(A).to(dtype), s.to(dtype), p, eps.to(dtype))
            return _finite(exact.to(A.dtype)), found
        except LinAlgError:
            continue
    if previous.any() and torch.isfinite(previous).all():
        return previous.to(A.dtype), "kept as they were"
    return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).unsqueeze(0), "replaced by the identity"
