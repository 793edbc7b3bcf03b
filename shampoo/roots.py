"""Batched inverse roots of symmetric positive semidefinite matrices.

The roots are (L + eps I)^(-1/p) and (R + eps I)^(-1/q) of arXiv 2601.07326. Here, A is a factor (L or R), and p is the power
itself (the paper's 1/p or 1/q).

Every solver is a function solve(A, s, p, eps, Q, **options) -> (s A + eps I)^(-p), symmetric to rounding. A is (B, d, d),
float32 or float64, with entries of magnitude at most 2; s and eps are positive (B, 1); p > 0; Q is a basis (B, d, d) or None. A
solver that keeps a basis starts from Q, which is zero before the first call, and updates it in place. If any matrix of the
batch fails, a solver raises LinAlgError or returns NaN or Inf; `inverse_root` then computes the roots one by one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from math import floor, isclose, isfinite, log2, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .blocks import Exponents

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # documented, but not in its __all__

NEWTON_STEPS = 100
CUSHION = 0.02
FARTHEST = 0.034  # from 1, an eigenvalue of M before the last polynomial, whatever the first interval and the dtype
LARGEST_ROOT = 64  # largest r for which "newton" computes A^(-1/r)
QR_TOLERANCE = 0.3


def eigen_power(lam: Tensor, Q: Tensor, p: float, eps: Tensor) -> Tensor:
    """Return Q (Lambda + eps I)^(-p) Q^T for eigenvalues lam (B, d) and eigenvectors Q (B, d, d).

    If rounding made an eigenvalue of a matrix negative, all of its eigenvalues are first shifted so that the smallest is 0.
    """
    lam = lam - lam.amin(dim=1, keepdim=True).clamp(max=0) + eps
    return (Q * lam.pow(-p).unsqueeze(-2)) @ Q.mT


def eigh(A: Tensor, s: Tensor, p: float, eps: Tensor, Q: Tensor | None = None) -> Tensor:
    """Return (s A + eps I)^(-p) from the eigendecomposition of A, exact to rounding; Q is ignored."""
    lam, basis = torch.linalg.eigh(A)
    return eigen_power(lam * s, basis, p, eps)


def descending_eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues in descending order and their eigenvectors."""
    lam, basis = torch.linalg.eigh(A)
    return lam.flip(1), basis.flip(2)


def turn(A: Tensor, Q: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Turn the bases Q toward the eigenvectors of A in place, where needed.

    Return their Rayleigh quotients lambda_i = q_i^T A q_i (B, d), and which old column each column follows (B, d).

    With B = Q^T A Q, Q is kept while ||B - diag B||_F <= tolerance ||B||_F (the test of Eschenhagen et al., arXiv 2506.03595);
    since ||B||_F = ||A||_F, this needs only the product A Q. Otherwise, Q takes one step of orthogonal iteration: Q <- qr(A Q),
    columns in descending order of lambda. The first Q, after zeros, comes from `eigh`.
    """
    AQ = A @ Q
    lam = (Q * AQ).sum(dim=1)
    order = torch.arange(A.shape[-1], device=A.device).repeat(len(A), 1)
    square = torch.linalg.vector_norm(A, dim=(1, 2)).square()
    first = Q[:, :, 0].square().sum(dim=1) == 0
    turns = ~first & (square - lam.square().sum(dim=1) > tolerance**2 * square)
    if first.any():
        lam[first], Q[first] = descending_eigh(A[first])
    if turns.any():
        order[turns] = lam[turns].argsort(dim=1, descending=True)
        basis = torch.linalg.qr(torch.take_along_dim(AQ[turns], order[turns].unsqueeze(1), dim=2)).Q
        Q[turns], lam[turns] = basis, (basis * (A[turns] @ basis)).sum(dim=1)
    return lam, order


def qr(A: Tensor, s: Tensor, p: float, eps: Tensor, Q: Tensor, qr_tolerance: float = QR_TOLERANCE) -> Tensor:
    """Return Q (s Lambda + eps I)^(-p) Q^T with the Rayleigh quotients lambda of Q, after `turn`."""
    lam, _ = turn(A, Q, qr_tolerance)
    return eigen_power(lam * s, Q, p, eps)


def newton(A: Tensor, s: Tensor, p: float, eps: Tensor, Q: Tensor | None = None) -> Tensor:
    """Return (s A + eps I)^(-1/r) for an integer r = 1/p, from matrix products only, except that for r = 2, `eigh` computes
    the roots of matrices whose rounding errors exceed eps. Q is ignored.

    eps / s is raised to at least 2 u ||A||_F, where u is the machine epsilon, since rounding may have made eigenvalues of A
    negative by that much.
    """
    r, length = round(1 / p), torch.linalg.vector_norm(A, dim=(1, 2), keepdim=True)
    shift = torch.maximum((eps / s).unsqueeze(2), 2 * torch.finfo(A.dtype).eps * length)
    norm = length + shift  # at least the largest eigenvalue of A + shift I
    M = A / norm
    M.diagonal(dim1=1, dim2=2).add_((shift / norm).squeeze(2))
    if r == 2:
        # shift / norm >= 1 / (tr A / shift + 1), which with a relative eps is the same for all A, so that roots do not depend
        # on other matrices of the batch
        ratio = float((A.diagonal(dim1=1, dim2=2).sum(dim=1) / shift.flatten()).amax())
        X, close = newton_schulz(M, 1 / (max(0.0, ratio) + 1))
    else:
        X, close = coupled_newton(M, r), None
    root: Tensor = (X + X.mT).mul_(norm.pow(-p) * s.unsqueeze(2).pow(-p) / 2)
    if close is not None and not close.all():
        root[~close] = eigh(A[~close], s[~close], p, (s * shift.squeeze(2))[~close])
    return root


def newton_schulz(M: Tensor, low: float) -> tuple[Tensor, Tensor]:
    """Return M^(-1/2) for symmetric M with eigenvalues in [low, 1] by the coupled Newton-Schulz iteration of degree 5

        X <- X T,  M <- T M T,  T = a I + b M + c M^2,     from X = I,

    which maps each eigenvalue x^2 of M to (a x + b x^3 + c x^5)^2, with the coefficients of `polar_express`. Also return
    whether each M (B,) came as close to I before the last step as they make it: it does not if rounding left an eigenvalue
    negative, whose magnitude then grows. M may be overwritten.
    """
    exponent = floor(2 * log2(low)) / 4  # of l = sqrt(low), rounded, so that few coefficients are computed
    first, *others = polar_express(2.0**exponent, 25 * torch.finfo(M.dtype).eps)
    X = T = polynomial(M, *first)
    for coefficients in others:
        M = torch.bmm(T, torch.bmm(M, T))
        T = polynomial(M, *coefficients)
        X = torch.bmm(X, T)
    M.diagonal(dim1=1, dim2=2).sub_(1)
    return X, torch.linalg.vector_norm(M, dim=(1, 2)) <= 0.5 + FARTHEST * M.shape[-1] ** 0.5


def polynomial(M: Tensor, a: float, b: float, c: float) -> Tensor:
    """Return a I + b M + c M^2."""
    T = torch.baddbmm(M, M, M, beta=b, alpha=c)
    T.diagonal(dim1=1, dim2=2).add_(a)
    return T


@lru_cache(maxsize=256)
def polar_express(low: float, tolerance: float) -> list[tuple[float, float, float]]:
    """Return (a, b, c) of polynomials a x + b x^3 + c x^5 whose composition maps [low, 1] into [1 - tolerance, 1 + tolerance].

    Each has the smallest error on the interval [l, h] into which those before it map [low, 1] (Amsel et al., "The Polar
    Express", arXiv 2505.16932); but if l < CUSHION h, on [CUSHION h, h], so that no large eigenvalue is mapped close to 0,
    where rounding errors are relatively large.
    """
    found, (low, high), error = [], (low, 1.0), 1.0
    while error > tolerance:
        (a, b, c), error = minimax(max(low, CUSHION * high), high)
        found.append((a, b, c))
        low, high = min(1 - error, a * low + b * low**3 + c * low**5), 1 + error
        error = max(1 - low, error)
    return found


def minimax(low: float, high: float) -> tuple[tuple[float, float, float], float]:
    """Return (a, b, c) that minimize E, the largest |1 - a x - b x^3 - c x^5| over [low, high], and E, by Remez's exchange.

    Errors are E and -E in turn at four points: both ends, and the zeros of a + 3 b x^2 + 5 c x^4. On short intervals, where the
    equations are nearly singular, return the expansion at 1 instead, whose error is 5/2 (x - 1)^3 to first order.
    """
    if high - low < 0.02:
        return (15 / 8, -10 / 8, 3 / 8), 2.6 * max(1 - low, high - 1) ** 3
    start = [low, (2 * low + high) / 3, (low + 2 * high) / 3, high]
    x, signs = torch.tensor([start, [1.0, -1.0, 1.0, -1.0]], dtype=torch.float64, device="cpu")
    for _ in range(20):
        a, b, c, error = torch.linalg.solve(torch.stack([x, x**3, x**5, signs], dim=1), torch.ones_like(x)).tolist()
        middle, half = -0.3 * b / c, sqrt(max(0.09 * b * b - 0.2 * a * c, 0.0)) / abs(c)
        x[1], x[2] = sqrt(middle - half), sqrt(middle + half)
    return (a, b, c), abs(error)


def coupled_newton(M: Tensor, r: int) -> Tensor:
    """Return M^(-1/r) for symmetric M with eigenvalues in (0, 1], by the coupled Newton iteration

        X <- X T,  M <- T^r M,  T = ((r + 1) I - M) / r,     from X = z^(1/r) I, M = z M, where z = (1 + r) / 2,

    until M is I to rounding (Higham, Functions of Matrices, 7.3; Anil et al., arXiv 2002.09018).
    """
    eye, z = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device).expand_as(M), (1 + r) / 2
    X, M = eye.mul(z ** (1 / r)), z * M
    error = torch.linalg.vector_norm(M - eye, dim=(1, 2), keepdim=True)
    enough = 10 * torch.finfo(M.dtype).eps * M.shape[-1] ** 0.5
    going = torch.ones_like(error, dtype=torch.bool)
    for _ in range(NEWTON_STEPS):
        T = M / -r
        T.diagonal(dim1=1, dim2=2).add_((r + 1) / r)
        M_next = torch.linalg.matrix_power(T, r) @ M
        error_next = torch.linalg.vector_norm(M_next - eye, dim=(1, 2), keepdim=True)
        going &= (error > enough) & (error_next < 1.2 * error)  # an error that grows is rounding
        if not going.any():
            break
        X, M, error = X.where(~going, X @ T), M.where(~going, M_next), error.where(~going, error_next)
    return X


def check_newton(exponents: Exponents) -> None:
    """Raise ValueError unless every exponent is 0 or 1/r for an integer r of at most LARGEST_ROOT."""
    if any(p and not (p * LARGEST_ROOT > 0.999 and isclose(round(1 / p) * p, 1)) for p in exponents):
        raise ValueError(f"solver 'newton' needs exponents 0, 1, 1/2, ..., 1/{LARGEST_ROOT}; here they are {exponents}")


class Solver(NamedTuple):
    """A way to compute inverse roots."""

    solve: Callable[..., Tensor]
    keeps_basis: bool = False
    options: tuple[str, ...] = ()  # names of optimizer options that `solve` takes
    check: Callable[[Exponents], None] = lambda exponents: None  # raises ValueError for exponents that it cannot take


SOLVERS: dict[str, Solver] = {
    "auto": Solver(eigh),  # but "newton" for some roots on an accelerator; see `inverse_root`
    "eigh": Solver(eigh),
    "qr": Solver(qr, keeps_basis=True, options=("qr_tolerance",)),
    "newton": Solver(newton, check=check_newton),
}


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 matrix products in full precision, even if the user allows TF32 or bfloat16."""
    try:
        allowed = torch.get_float32_matmul_precision()
    except RuntimeError:  # set per backend, as torch 2.9 and newer allow
        allowed = ""
    backends: list[Any] = [] if allowed else [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    precisions = [backend.fp32_precision for backend in backends]
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if allowed:
            torch.set_float32_matmul_precision(allowed)
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision


@full_precision()
def inverse_root(
    A: Tensor, c: float | Tensor, p: float, eps: float, previous: Tensor, Q: Tensor | None = None,
    *, relative_eps: bool = False, solver: str = "eigh", **options: object,
) -> tuple[Tensor, dict[int, str]]:  # fmt: skip
    """Return (A / c + eps I)^(-p) for each matrix of A (B, d, d), always finite, and notes on roots that needed a fallback.

    c is a number or (B, 1). With relative_eps, eps tr(A / c) replaces eps where the trace is positive. The paper has c = 1 and
    an absolute eps. The solver gets each matrix divided by a power of two, which avoids overflow and is exact, and its
    `options`. "auto" is "newton" on an accelerator, where `eigh` is slow, for p = 1/2 and a relative eps of at least 1e-6,
    which bounds condition numbers by 1e6; otherwise "eigh".

    If any matrix fails, the whole batch is redone one by one with `eigh`, in A's dtype and then in float64, and all of Q is
    reset to zero. If both fail, or the matrix is not finite, its root is `previous`, or the identity if `previous` is zero or
    not finite. The notes map the index of each matrix that `eigh` in A's dtype could not handle to what became of its root.
    """
    if solver == "auto" and A.device.type != "cpu" and p == 0.5 and relative_eps and eps >= 1e-6:
        solver = "newton"
    s = _scales(A, c, torch.finfo(A.dtype).tiny if relative_eps else eps)
    matrices = A / (c * s).unsqueeze(2)
    shift = torch.full_like(s, eps)
    if relative_eps:
        trace = s * matrices.diagonal(dim1=1, dim2=2).sum(dim=1, keepdim=True)
        shift = shift.where(trace <= 0, eps * trace)
        s = s.where(trace != 0, eps)  # any s suits a zero matrix, but eps / s overflows if s is tiny
    try:
        return _finite(SOLVERS[solver].solve(matrices, _finite(s), p, shift, Q, **options)), {}
    except LinAlgError:
        if Q is not None:
            Q.zero_()  # it may hold NaN; the next call starts from `eigh`
        return _one_by_one(matrices, lambda X, b: eigh(X, s[b].to(X.dtype), p, shift[b].to(X.dtype)), previous)


@full_precision()
def update_basis(A: Tensor, previous: Tensor, solver: str, tolerance: float) -> tuple[Tensor, Tensor | None, dict[int, str]]:
    """Return orthogonal bases of eigenvectors of A (B, d, d), columns in descending order of their eigenvalues.

    Solver "qr" starts from `previous` and a `tolerance`; see `turn`. "eigh" is exact. "auto" is "eigh" on a CPU and "qr" on an
    accelerator. Also return which old column each column follows (B, d), or None for each its own, and notes on bases that
    needed a fallback, as `inverse_root` does: they are recomputed in float64, or if that fails, or the matrix is not finite,
    stay `previous`, or the identity for zeros.
    """
    s = _scales(A, 1.0, torch.finfo(A.dtype).tiny)
    matrices, Q = A / s.unsqueeze(2), previous.clone()
    try:
        _finite(s)
        turns = solver == "qr" or (solver == "auto" and A.device.type != "cpu")
        order = turn(matrices, Q, tolerance)[1] if turns else None
        return _finite(Q if order is not None else descending_eigh(matrices)[1]), order, {}
    except LinAlgError:
        Q, notes = _one_by_one(matrices, lambda X, b: descending_eigh(X)[1], previous)
        return Q, None, notes


def _scales(A: Tensor, c: float | Tensor, eps: float) -> Tensor:
    """Return the largest power of two <= max(max |A / c|, eps) for each matrix, (B, 1); NaN where A is not finite."""
    largest: Tensor = (torch.linalg.vector_norm(A, torch.inf, dim=(1, 2)).unsqueeze(1) / c).clamp(min=eps)
    return largest / (2 * torch.frexp(largest).mantissa) + 0 * largest


def _finite(X: Tensor) -> Tensor:
    """Return X. Raise LinAlgError if an element is NaN or Inf, which float32 `eigh` may return on a CPU without an error."""
    if not isfinite(torch.linalg.vector_norm(X, torch.inf).item()):
        raise LinAlgError("a matrix with NaN or Inf")
    return X


def _one_by_one(A: Tensor, compute: Callable[..., Tensor], previous: Tensor) -> tuple[Tensor, dict[int, str]]:
    """Return compute(A[b], b) for each matrix b, or what stands in for it, and notes; see `_rescue`."""
    found = [_rescue(A[[b]], partial(compute, b=[b]), previous[[b]]) for b in range(len(A))]
    return torch.cat([X for X, _ in found]), {b: note for b, (_, note) in enumerate(found) if note}


def _rescue(A: Tensor, compute: Callable[[Tensor], Tensor], previous: Tensor) -> tuple[Tensor, str]:
    """Return compute(A) for one matrix (1, d, d), or what stands in for it, and how it was found, "" in A's own dtype."""
    for dtype, found in ((A.dtype, ""), (torch.float64, "computed in float64")):
        with suppress(LinAlgError):
            return _finite(compute(_finite(A).to(dtype)).to(A.dtype)), found
    if previous.any() and torch.isfinite(previous).all():
        return previous.to(A.dtype), "kept as they were"
    return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).unsqueeze(0), "replaced by the identity"
