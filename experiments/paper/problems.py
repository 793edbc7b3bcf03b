"""Problems with known constants for the paper's claims, the table of measured cells, and the slopes with their intervals."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from runner.files import replacing
from shampoo import AdamWShampoo

SEEDS = 10
CHUNK = 256  # steps per batch of singular value decompositions
Factory = Callable[[list[torch.nn.Parameter], float], torch.optim.Optimizer]  # from the parameters and f(X_1) - inf f
METHODS: dict[str, tuple[float, float] | None] = {  # (1/p, 1/q)
    "1/4, 1/4": (0.25, 0.25),
    "1/2, 0": (0.5, 0.0),
    "0, 1/2": (0.0, 0.5),
    "1/8, 1/8": (0.125, 0.125),
    "1/2, 1/2": (0.5, 0.5),
    "SGD": None,
    "AdamW": None,
}


def gaussian(m: int, n: int, generator: torch.Generator) -> Tensor:
    """Return noise of shape (S, m, n) with independent Gaussian entries and E ||.||_F^2 = 1."""
    return torch.randn(SEEDS, m, n, generator=generator) / math.sqrt(m * n)


def rank_one(m: int, n: int, generator: torch.Generator) -> Tensor:
    """Return D u v^T of shape (S, m, n), u and v standard normal, D diagonal from 1 down to 1/10, scaled to E ||.||_F^2 = 1."""
    D = torch.logspace(0, -1, m)
    D /= D.norm() * math.sqrt(n)
    u, v = torch.randn(SEEDS, m, 1, generator=generator), torch.randn(SEEDS, 1, n, generator=generator)
    return D.unsqueeze(1) * u * v


class Problem(NamedTuple):
    """f(X) = d^2 sum phi((A X - B) / d) over the entries of X (m, n), with d = 1 / sqrt(m n) and phi >= 0 even and nonconvex.

    A (m, m) is Gaussian, divided by its operator norm; B is d times standard normal. Hence f is L-smooth in the Frobenius norm
    with L = max |phi''|, inf f = 0 since A is invertible, and f(0) equals E phi(N(0, 1)) up to sampling error for all shapes.
    Gradient noise is independent of X with sigma^2 = E ||noise||_F^2 = 1, so that C is the same for all shapes.
    """

    phi: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]  # phi'
    smoothness: float  # L
    noise: Callable[[int, int, torch.Generator], Tensor]


PROBLEMS = {
    # phi'' = 2 (1 - e^2) / (1 + e^2)^2 is between -1/4 and 2.
    "log, Gaussian noise": Problem(lambda e: torch.log1p(e**2), lambda e: 2 * e / (1 + e**2), 2.0, gaussian),
    # phi'' = cos e is between -1 and 1.
    "cos, rank-one noise": Problem(lambda e: 1 - torch.cos(e), torch.sin, 1.0, rank_one),
}


def draw_data(m: int, n: int) -> tuple[Tensor, Tensor]:
    """Return A (S, m, m) and B (S, m, n) for all seeds, the same for every method and horizon."""
    generator = torch.Generator().manual_seed(1000 * m + n)
    A, B = (torch.randn(SEEDS, m, k, generator=generator) for k in (m, n))
    return A / torch.linalg.matrix_norm(A, 2, keepdim=True), B / (m * n) ** 0.5


def loss(problem: Problem, A: Tensor, B: Tensor, X: Tensor) -> Tensor:
    """Return f(X) for each seed: shape (..., S) for X of shape (..., S, m, n)."""
    d2 = 1 / B[0].numel()
    return d2 * problem.phi((A @ X - B) / d2**0.5).sum(dim=(-2, -1))


def gradient(problem: Problem, A: Tensor, B: Tensor, X: Tensor) -> Tensor:
    """Return grad f(X) = d A^T phi'((A X - B) / d) for each seed, of the shape of X, (..., S, m, n)."""
    d = 1 / math.sqrt(B[0].numel())
    return d * A.mT @ problem.slope((A @ X - B) / d)


def theory_rate(method: str, m: int, n: int, K: int, L: float, gap: float) -> float:
    """Return the step size eta of the theory for horizon K, smoothness L, gap = f(X_1) - inf f, and sigma = 1.

    For SGD, it is min(1/L, sqrt(2 gap / (L K))). AdamW has m n, the dimension in the bound of its own paper (arXiv 2505.11840),
    instead of m + n. If the exponents do not sum to 1/2, a direction scales like the factors to the power 1/2 - 1/p - 1/q; the
    factors are about sigma^2 / sqrt(m n), and eta compensates for that.
    """
    step, exponents = math.sqrt(gap / (L * K)), METHODS[method]
    if method == "SGD":
        return min(1 / L, math.sqrt(2) * step)
    if exponents is None:
        return step / math.sqrt(m * n)
    return step / math.sqrt(m + n) * math.pow(m * n, 0.25 - sum(exponents) / 2)


def gain(exponents: tuple[float, float], m: int, n: int, sigma: float = 1.0) -> float:
    """Return c = (m / sigma^2)^(1/p) (n / sigma^2)^(1/q): the direction is c M if white noise dominates the gradient.

    The m n entries of the noise then have variance sigma^2 / (m n), so that L is about (sigma^2 / m) I and R (sigma^2 / n) I.
    """
    inverse_p, inverse_q = exponents
    return math.pow(m / sigma**2, inverse_p) * math.pow(n / sigma**2, inverse_q)


def paper_shampoo(X: list[torch.nn.Parameter], lr: float, K: int, **options: Any) -> AdamWShampoo:
    """Return `AdamWShampoo` with the paper's settings, `options`, such as exponents, and the averages of the theory for horizon
    K: 1 - theta = 1 - beta = K^(-1/2).

    epsilon = 1e-6 sigma^2 / (m n) is a millionth of the noise variance of an entry: far below the eigenvalues of the factors,
    which the noise bounds from below, so that the method does not reduce to SGD, and above the float32 rounding error of the
    factors.
    """
    (m, n), decay = X[0].shape, 1 - K**-0.5
    settings: dict[str, Any] = {
        "betas": (decay, decay),
        "eps": 1e-6 / (m * n),
        "relative_eps": False,
        "weight_decay": 0.0,
        "grafting": "none",
        "bias_correction": False,
        "precondition_frequency": 1,
        "merge_dims": False,
        "block_size": max(m, n),
    }
    return AdamWShampoo(X, lr, **{**settings, **options})


def make_optimizer(
    method: str, X: list[torch.nn.Parameter], lr: float, K: int, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Return an optimizer of METHODS: `paper_shampoo`, SGD, or AdamW with the same averages and the same epsilon."""
    exponents, decay = METHODS[method], 1 - K**-0.5
    if exponents is not None:
        return paper_shampoo(X, lr, K, exponents=exponents, weight_decay=weight_decay)
    if method == "SGD":
        return torch.optim.SGD(X, lr, weight_decay=weight_decay)
    return torch.optim.AdamW(X, lr, betas=(decay, decay), eps=1e-3 * X[0].numel() ** -0.5, weight_decay=weight_decay)


def trajectory(
    problem: Problem, A: Tensor, B: Tensor, K: int, make_optimizer: Factory, scales: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield X_1 = 0, ..., X_K and the noise-free gradients there, in chunks of shape (steps, ..., S, m, n).

    All seeds are blocks of one stack, so that they train together. With scales (J,), so do J copies of each, with the same
    noise: copy j minimizes over Y = X / scales[j] with the gradient with respect to X, and its chunks have shape (steps, J, S,
    m, n). As directions depend on the gradients alone, its step size in X is scales[j] times that of the optimizer.
    """
    m, n = B.shape[1:]
    scale = torch.ones(()) if scales is None else scales[:, None, None, None]
    Y, noisy = (torch.zeros(scale.shape[:1] + B.shape) for _ in range(2))
    parameters = [torch.nn.Parameter(y) for y in Y.flatten(0, -3)]  # views: the optimizer updates Y
    for y, G in zip(parameters, noisy.flatten(0, -3), strict=True):
        y.grad = G
    optimizer = make_optimizer(parameters, loss(problem, A, B, torch.zeros_like(B)).mean().item())
    generator = torch.Generator().manual_seed(K)
    for first in range(0, K, CHUNK):
        X, gradients = (torch.empty(min(CHUNK, K - first), *Y.shape) for _ in range(2))
        for x, G in zip(X, gradients, strict=True):
            torch.mul(scale, Y, out=x)
            G.copy_(gradient(problem, A, B, x))
            torch.add(G, problem.noise(m, n, generator), out=noisy)
            optimizer.step()
        yield X, gradients


def mean_norms(problem: Problem, m: int, n: int, K: int, make_optimizer: Factory) -> pd.DataFrame:
    """Return one row per seed: the nuclear and Frobenius norms of the noise-free gradient, averaged over X_1, ..., X_K, and the
    nuclear norm at X_1.
    """
    singular_values = torch.cat([torch.linalg.svdvals(G) for _, G in trajectory(problem, *draw_data(m, n), K, make_optimizer)])
    nuclear, frobenius = singular_values.sum(dim=2), torch.linalg.vector_norm(singular_values, dim=2)
    columns = {"nuclear": nuclear.mean(dim=0), "frobenius": frobenius.mean(dim=0), "first": nuclear[0]}
    return pd.DataFrame({"seed": range(SEEDS), **{name: x.double().numpy() for name, x in columns.items()}})


def measure(cells: Sequence[Any], path: Path, run: Callable[..., pd.DataFrame], max_workers: int | None = None) -> pd.DataFrame:
    """Return the rows of all cells: run(*cell), with the fields of the cell, a NamedTuple, as the first columns.

    Cells missing from the CSV at `path` run in single-threaded processes, one per core unless max_workers says otherwise, and
    are added to it one by one, so that the same command resumes an interrupted run.
    """
    names = list(cells[0]._fields)
    try:
        table = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=names)
    except ValueError as error:
        raise ValueError(f"{path} is no table: {str(error).strip()}; move it away to measure all cells again") from error
    finished = set(table[names].itertuples(index=False, name=None))
    missing = [cell for cell in dict.fromkeys(cells) if tuple(cell) not in finished]
    with ProcessPoolExecutor(max_workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(run, *cell): cell for cell in missing}
        try:
            for future in tqdm(as_completed(futures), total=len(missing), unit="cell", smoothing=0, dynamic_ncols=True):
                rows = future.result()
                for i, (name, value) in enumerate(futures[future]._asdict().items()):
                    rows.insert(i, name, value)
                table = pd.concat([table, rows], ignore_index=True) if len(table) else rows
                with replacing(path) as partial:
                    table.to_csv(partial, index=False, float_format="%.7g")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return table


def fit_slope(values: np.ndarray, x: np.ndarray) -> tuple[float, float, float]:
    """Return the mean over seeds of the least-squares slope of log(value) against log x, and its 95 % t interval over seeds.

    values has shape (seeds, points).
    """
    centered = np.log(x) - np.log(x).mean()
    slopes = np.log(values) @ centered / (centered**2).sum()
    low, high = stats.ttest_1samp(slopes, 0.0).confidence_interval(0.95)
    return float(slopes.mean()), float(low), float(high)


def format_fit(fit: tuple[float, float, float]) -> str:
    """Format a slope and its interval."""
    return "{:.3f} ({:.3f} to {:.3f})".format(*fit)
