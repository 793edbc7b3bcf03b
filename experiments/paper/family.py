"""A family of quadratic problems whose curvature and noise have a known structure, and what theory predicts for them.

With orthogonal U (m, m) and W (n, n), and entrywise products o,

    f(X) = 1/2 <Y, H o Y>  with  Y = U^T X W - Y*,    gradient  U (H o Y) W^T,    its noise  U (V^(1/2) o Z) W^T,

Z standard normal. A member of the family fixes the curvatures H, the variances V of the noise, and whether U and W are random
or the identity. Always L = max H = 1, sigma^2 = sum V = 1, and E (f(X_1) - inf f) = 1/2, shared equally by all entries, with
X_1 = 0 and Y*_ij normal with variance 1 / (m n H_ij). Hence C, and with it the paper's bound, is the same for all members.

The noise dominates the gradient, so that factors approach diagonal matrices in the bases U and W. If they were those of noise
alone, the methods would divide entry ij of the averaged gradient in these bases by [sum_j V_ij]^(1/p) [sum_i V_ij]^(1/q)
(Shampoo), by V_ij^(1/2) (SOAP; AdamW if U and W are the identity), or by (l_i r_j)^(1/2), where l_i = mean_j V_ij / r_j and
r_j = mean_i V_ij / l_i (KL). `condition` is the condition number of the curvature that is then left, and `predict` follows the
whole run.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .ladder import LARGEST, SEEDS, generator
from .methods import OPTIONS

SIZE, HORIZON = 16, 1024
LADDER = range(-24, 8)  # log2 of the step sizes in predictions
TIMES = 32  # at which predictions look at the nuclear norm


class Member(NamedTuple):
    """A problem of the family: curvatures H (m, n), variances V (m, n), and whether the bases are random."""

    H: Tensor
    V: Tensor
    rotated: bool
    reason: str  # for the order of methods


def member(H: Tensor, V: Tensor, rotated: bool, reason: str) -> Member:
    """Return a member with max H = 1 and sum V = 1."""
    return Member(H / H.max(), V / V.sum(), rotated, reason)


def members() -> dict[str, Member]:
    """Return all members by name."""
    ones, a = torch.ones(SIZE), torch.logspace(0, -2, SIZE)
    mild, strong = (torch.outer(x, x) for x in (a**0.5, a))
    rows = torch.outer(a**2, ones)
    board = mild * 100.0 ** -((torch.arange(SIZE) // 4 + torch.arange(SIZE)[:, None] // 4) % 2)
    columns = 0.1 * torch.outer(a**1.5, ones)
    columns[:, :2] = 1
    as_kronecker = "Factors are the Kronecker factors of the noise: exponents (a, a) leave H^(1 - a), in any bases."
    return {
        "Kronecker 1e2, rotated": member(mild, mild, True, as_kronecker),
        "Kronecker 1e4, rotated": member(strong, strong, True, as_kronecker),
        "Kronecker 1e4, aligned": member(strong, strong, False, "As before, and now AdamW sees the variances as well."),
        "rows 1e4, rotated": member(rows, rows, True, "R is a multiple of I: only the left exponent counts."),
        "checkerboard, rotated": member(board, board, True, "Factors average over the board; in their bases, SOAP sees it."),
        "checkerboard, aligned": member(board, board, False, "Factors average over the board; AdamW and SOAP see it."),
        "two loud columns, rotated": member(
            columns, columns, True, "L is dominated by two columns with equal rows; for KL, all columns count alike."
        ),
        "white noise, rotated": member(strong, torch.ones(SIZE, SIZE), True, "Factors are multiples of I: all are SGD."),
        "opposite noise, rotated": member(strong, 1 / strong, True, "Factors say the opposite of H: exponents make it worse."),
    }


def draw(problem: Member, seeds: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (S, m, m), W (S, n, n), and Y* (S, m, n)."""
    (m, n), S, drawn = problem.H.shape, SEEDS[seeds], generator(seeds, 0)
    bases = [torch.linalg.qr(torch.randn(S, k, k, generator=drawn)).Q for k in (m, n)]
    U, W = bases if problem.rotated else [torch.eye(k).expand(S, k, k) for k in (m, n)]
    return U, W, torch.randn(S, m, n, generator=drawn) / (m * n * problem.H).sqrt()


def loss(problem: Member, U: Tensor, W: Tensor, target: Tensor, X: Tensor) -> Tensor:
    """Return f(X) = 1/2 <Y, H o Y> for each seed, with Y = U^T X W - Y*."""
    return (problem.H * (U.mT @ X @ W - target).square()).sum(dim=(1, 2)) / 2


def gradient(problem: Member, U: Tensor, W: Tensor, target: Tensor, X: Tensor) -> Tensor:
    """Return grad f(X) = U (H o Y) W^T for each seed."""
    return U @ (problem.H * (U.mT @ X @ W - target)) @ W.mT


def noise(problem: Member, U: Tensor, W: Tensor, drawn: torch.Generator) -> Tensor:
    """Return U (V^(1/2) o Z) W^T for each seed."""
    return U @ (problem.V.sqrt() * torch.randn(len(U), *problem.V.shape, generator=drawn)) @ W.mT


def preconditioner(problem: Member, method: str) -> Tensor | None:
    """Return by what a method multiplies entry ij of U^T M W if its averages are the expectations of noise alone.

    None for Muon, and for AdamW in random bases, which do not act on entries.
    """
    V, rows, columns = problem.V, problem.V.sum(1, keepdim=True), problem.V.sum(0, keepdim=True)
    if method == "SGD":
        return torch.ones_like(V)
    if method == "SOAP" or (method == "AdamW" and not problem.rotated):
        return V.rsqrt()
    if method == "KL":
        for _ in range(1000):
            rows = (V / columns).mean(1, keepdim=True)
            columns = (V / rows).mean(0, keepdim=True)
        return (rows * columns).rsqrt()
    if method not in OPTIONS:
        return None
    left, right = OPTIONS[method]["exponents"]
    return rows.pow(-left) * columns.pow(-right)


def condition(problem: Member, method: str) -> float:
    """Return the condition number of P H, the curvature that is left, NaN for Muon.

    P is that of `preconditioner`, or, for AdamW in random bases, from the variance of each entry of the noise; this is the
    geometric mean over the reported seeds.
    """
    P = preconditioner(problem, method)
    if P is not None:
        left = P * problem.H
        return (left.max() / left.min()).item()
    if method != "AdamW":
        return float("nan")
    U, W, _ = (x.double() for x in draw(problem, "reported"))
    variances = U.square() @ problem.V.double() @ W.square().mT
    bases = torch.stack([torch.kron(u, w) for u, w in zip(U, W, strict=True)])
    root = bases * problem.H.double().sqrt().flatten()  # columns of H^(1/2) in the original coordinates
    eigenvalues = torch.linalg.eigvalsh(root.mT @ (root / variances.sqrt().flatten(1).unsqueeze(2)))
    return float((eigenvalues[:, -1] / eigenvalues[:, 0]).log().mean().exp())


def predict(problem: Member, method: str) -> dict[str, tuple[float, int]]:
    """Return, for the mean nuclear norm and the final loss, the lowest expected value over LADDER, and log2 of its step size.

    With the matrix P of `preconditioner`, entry ij of Y and of the averaged gradient M is a linear system of its own,

        M <- theta M + (1 - theta) (H Y + V^(1/2) Z),    Y <- Y - eta P M,

    so their second moments obey a recursion, from which E f follows. Entries of U^T G W are then independent and normal, with
    variance H^2 E Y^2: the expected nuclear norm is an average over draws at TIMES steps. NaN where there is no P.
    """
    P = preconditioner(problem, method)
    if P is None:
        return dict.fromkeys(("nuclear", "loss"), (math.nan, 0))
    H, V, theta, wait = problem.H.double(), problem.V.double(), 1 - HORIZON**-0.5, round(HORIZON**0.5)
    steps = torch.tensor([2.0**rung for rung in LADDER], dtype=torch.float64).view(-1, 1, 1) * P.double()
    yy = (1 / (H.numel() * H)).expand(len(LADDER), *H.shape)
    ym, mm, moments = torch.zeros_like(yy), torch.zeros_like(yy), []
    for k in range(wait + HORIZON):
        if k >= wait and (k - wait) % (HORIZON // TIMES) == HORIZON // TIMES // 2:
            moments.append(yy)
        mm = theta**2 * mm + 2 * theta * (1 - theta) * H * ym + (1 - theta) ** 2 * (H**2 * yy + V)
        ym = theta * ym + (1 - theta) * H * yy
        if k >= wait:
            yy, ym = yy - 2 * steps * ym + steps**2 * mm, ym - steps * mm
    Z = torch.randn(8, TIMES, 1, *H.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    variances = (H**2 * torch.stack(moments)).nan_to_num(LARGEST).clamp(0, LARGEST)
    expected = {
        "nuclear": torch.linalg.svdvals(Z * variances.sqrt()).sum(dim=-1).mean(dim=(0, 1)),
        "loss": (H * yy).sum(dim=(1, 2)).nan_to_num(LARGEST).clamp(max=LARGEST) / 2,
    }
    return {metric: (float(x.min()), LADDER[int(x.argmin())]) for metric, x in expected.items()}
