"""Measure the paper's convergence rate: `python -m experiments.convergence --output_dir=DIR`; five minutes, `--full` hours.

For X of shape (m, n) and 1/p + 1/q = 1/2, Li, Dong & Lin (arXiv 2601.07326) bound the mean nuclear norm of the gradient,
(1/K) sum_k E ||grad f(X_k)||_*, by O(sqrt(m + n) C / K^(1/4)), where C^4 is of order sigma^2 L (f(X_1) - inf f). Measure this
mean for `AdamWShampoo` with the paper's settings over horizons K, shapes, exponents, and ten seeds. As in the theory,

    1 - theta = 1 - beta = K^(-1/2),    eta = sqrt((f(X_1) - inf f) / (L K (m + n))),    lambda = 0;

the powers of K and m + n come from the theory, the constants do not. epsilon = 1e-6 sigma^2 / (m n) is a millionth of the
noise variance of an entry: far below the eigenvalues of the factors, which the noise bounds from below, so that the method does
not reduce to SGD, and above the float32 rounding error of the factors. Finished cells are read from DIR/norms.csv, so that the
same command resumes an interrupted run.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
import torch
from absl import app, flags
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from runner.files import replacing
from shampoo import AdamWShampoo

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker

FLAGS = flags.FLAGS

SEEDS = 10
CHUNK = 1024  # steps per batch of singular value decompositions
LAST = 3  # number of horizons in the slope at the end
METHODS: dict[str, tuple[float, float] | None] = {  # (1/p, 1/q)
    "1/4, 1/4": (0.25, 0.25),
    "1/2, 0": (0.5, 0.0),
    "0, 1/2": (0.0, 0.5),
    "1/8, 1/8": (0.125, 0.125),
    "1/2, 1/2": (0.5, 0.5),
    "SGD": None,
    "AdamW": None,
}
SUM_HALF = ["1/4, 1/4", "1/2, 0"]
SHAPES = {(8, 8): list(METHODS), (16, 4): SUM_HALF, (4, 16): SUM_HALF}
WIDTHS, FIXED_HORIZON = [4, 8, 16, 32], 1024  # square matrices at one horizon
CELL = ["problem", "m", "n", "method", "K"]


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
    """Return f(X) for each seed, shape (S,)."""
    d2 = 1 / B[0].numel()
    return d2 * problem.phi((A @ X - B) / d2**0.5).sum(dim=(1, 2))


def gradient(problem: Problem, A: Tensor, B: Tensor, X: Tensor) -> Tensor:
    """Return grad f(X) = d A^T phi'((A X - B) / d) for each seed, shape (S, m, n)."""
    d = 1 / math.sqrt(B[0].numel())
    return d * A.mT @ problem.slope((A @ X - B) / d)


def make_optimizer(method: str, X: list[torch.nn.Parameter], K: int, L: float, gap: float) -> torch.optim.Optimizer:
    """Return the optimizer for horizon K, smoothness L, gap = f(X_1) - inf f, and sigma = 1.

    If the exponents do not sum to 1/2, a direction scales like the factors to the power 1/2 - 1/p - 1/q; the factors are about
    sigma^2 / sqrt(m n), and eta compensates for that. SGD uses eta = min(1/L, sqrt(2 gap / (L K))). AdamW uses m n, the
    dimension in the bound of its own paper (arXiv 2505.11840), instead of m + n.
    """
    m, n = X[0].shape
    step, decay, eps = (gap / (L * K)) ** 0.5, 1 - K**-0.5, 1e-6 / (m * n)
    if method == "SGD":
        return torch.optim.SGD(X, min(1 / L, 2**0.5 * step))
    if method == "AdamW":
        return torch.optim.AdamW(X, step / (m * n) ** 0.5, betas=(decay, decay), eps=eps**0.5, weight_decay=0.0)
    exponents = METHODS[method]
    assert exponents is not None
    return AdamWShampoo(
        X,
        step / (m + n) ** 0.5 * (m * n) ** -(0.5 * (sum(exponents) - 0.5)),
        betas=(decay, decay),
        eps=eps,
        relative_eps=False,
        grafting="none",
        bias_correction=False,
        precondition_frequency=1,
        exponents=exponents,
        merge_dims=False,
        block_size=max(m, n),
    )


def mean_norms(problem: Problem, m: int, n: int, method: str, K: int) -> pd.DataFrame:
    """Return one row per seed: the nuclear and Frobenius norms of the noise-free gradient, averaged over X_1 = 0, ..., X_K, and
    the nuclear norm at X_1. All seeds are blocks of one stack, so that they train together.
    """
    A, B = draw_data(m, n)
    weights, noisy = torch.zeros(SEEDS, m, n), torch.zeros(SEEDS, m, n)
    X = [torch.nn.Parameter(x) for x in weights]  # views: the optimizer updates `weights`
    for x, G in zip(X, noisy, strict=True):
        x.grad = G
    optimizer = make_optimizer(method, X, K, problem.smoothness, loss(problem, A, B, weights).mean().item())
    generator = torch.Generator().manual_seed(K)
    chunks = []
    for first in range(0, K, CHUNK):
        gradients = torch.empty(min(CHUNK, K - first), SEEDS, m, n)
        for G in gradients:
            G.copy_(gradient(problem, A, B, weights))
            torch.add(G, problem.noise(m, n, generator), out=noisy)
            optimizer.step()
        chunks.append(torch.linalg.svdvals(gradients))
    singular_values = torch.cat(chunks)
    nuclear, frobenius = singular_values.sum(dim=2), torch.linalg.vector_norm(singular_values, dim=2)
    columns = {"nuclear": nuclear.mean(dim=0), "frobenius": frobenius.mean(dim=0), "first": nuclear[0]}
    return pd.DataFrame({"seed": range(SEEDS), **{name: x.double().numpy() for name, x in columns.items()}})


def cells(horizons: list[int]) -> Iterator[tuple[str, int, int, str, int]]:
    """Yield problem, m, n, method, and K of every cell once, in order of increasing K."""
    wanted = [(m, n, method, K) for K in horizons for (m, n), methods in SHAPES.items() for method in methods]
    wanted += [(width, width, method, FIXED_HORIZON) for width in WIDTHS for method in [*SUM_HALF, "SGD"]]
    for m, n, method, K in sorted(dict.fromkeys(wanted), key=lambda cell: cell[3]):
        for name in PROBLEMS:
            yield name, m, n, method, K


def measure(
    wanted: list[tuple[str, int, int, str, int]],
    path: Path,
    run: Callable[..., pd.DataFrame] = lambda name, *cell: mean_norms(PROBLEMS[name], *cell),
) -> pd.DataFrame:
    """Return the rows of all cells. Cells missing from the CSV at `path` are computed and added to it one by one."""
    table = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=CELL)
    finished = set(table[CELL].itertuples(index=False, name=None))
    for cell in tqdm([cell for cell in wanted if cell not in finished], unit="cell", smoothing=0, dynamic_ncols=True):
        rows = run(*cell)
        for i, (column, value) in enumerate(zip(CELL, cell, strict=True)):
            rows.insert(i, column, value)
        table = pd.concat([table, rows], ignore_index=True) if len(table) else rows
        with replacing(path) as partial:
            table.to_csv(partial, index=False, float_format="%.7g")
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


def slope_table(norms: pd.DataFrame) -> pd.DataFrame:
    """Return one row per problem, shape, and method: slopes over all and over the last horizons, and the norm at the last."""
    rows = []
    for name in PROBLEMS:
        for (m, n), methods in SHAPES.items():
            for method in methods:
                chosen = norms[(norms["problem"] == name) & (norms["m"] == m) & (norms["n"] == n) & (norms["method"] == method)]
                wide = {
                    norm: chosen.pivot(index="seed", columns="K", values=norm) for norm in ("nuclear", "frobenius", "first")
                }
                values, K = wide["nuclear"].to_numpy(), wide["nuclear"].columns.to_numpy(dtype=float)
                rows.append(
                    {
                        "problem": name,
                        "m, n": f"{m}, {n}",
                        "1/p, 1/q": method,
                        "slope": format_fit(fit_slope(values, K)),
                        f"slope, last {LAST}": format_fit(fit_slope(values[:, -LAST:], K[-LAST:])),
                        "Frobenius, all": format_fit(fit_slope(wide["frobenius"].to_numpy(), K)),
                        f"mean at K = {K[-1]:.0f}": f"{values[:, -1].mean():.3f}",
                        "over that at X_1": f"{(values[:, -1].mean() / wide['first'].to_numpy()[:, -1].mean()):.3f}",
                    }
                )
    return pd.DataFrame(rows)


def size_table(norms: pd.DataFrame) -> pd.DataFrame:
    """Return one row per problem and method: the exponent of m + n over square shapes at one horizon, and the norms."""
    square = norms[(norms["m"] == norms["n"]) & (norms["K"] == FIXED_HORIZON)]
    rows = []
    for (name, method), chosen in square.groupby(["problem", "method"], sort=False):
        wide = chosen.pivot(index="seed", columns="m", values="nuclear")
        if list(wide.columns) != WIDTHS:
            continue
        means = {f"{width} x {width}": f"{value:.3f}" for width, value in wide.mean().items()}
        fit = format_fit(fit_slope(wide.to_numpy(), 2 * wide.columns.to_numpy(dtype=float)))
        rows.append({"problem": name, "1/p, 1/q": method, "exponent of m + n": fit, **means})
    return pd.DataFrame(rows)


def draw(norms: pd.DataFrame, path: Path) -> None:
    """Plot the mean nuclear norm against K for the first shape, one panel per problem, with a line of slope -1/4."""
    m, n = next(iter(SHAPES))
    figure, panels = plt.subplots(1, len(PROBLEMS), sharey=True, figsize=(6 * len(PROBLEMS), 4.6), layout="constrained")
    for axes, name in zip(panels, PROBLEMS, strict=True):
        chosen = norms[(norms["problem"] == name) & (norms["m"] == m) & (norms["n"] == n)]
        for method in SHAPES[m, n]:
            means = chosen[chosen["method"] == method].groupby("K")["nuclear"].mean()
            dashes = "-" if METHODS[method] else "--"
            axes.loglog(means.index, means, dashes, marker="o", markersize=4, base=2, label=method)
        K, top = means.index.to_numpy(dtype=float), chosen.groupby(["method", "K"])["nuclear"].mean().max()
        axes.loglog(K, 1.15 * top * (K / K[0]) ** -0.25, color="black", linewidth=1, base=2, label="slope -1/4")
        axes.set_yscale("log", base=10)
        axes.yaxis.set_major_locator(ticker.FixedLocator([0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8]))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.set(title=f"{name}, {m} x {n}", xlabel="horizon K", ylabel="mean nuclear norm of the gradient")
        axes.grid(alpha=0.3)
    panels[-1].legend(title="1/p, 1/q")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(_: Any) -> None:
    """Measure the missing cells, then write the tables, the figure, and the page."""
    torch.set_num_threads(1)
    output = Path(FLAGS.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    horizons = [2**i for i in range(6, 17 if FLAGS.full else 13)]
    wanted = list(cells(horizons))
    norms = measure(wanted, output / "norms.csv")
    norms = norms[norms["K"].isin(horizons)]
    tables = {"slopes": slope_table(norms), "sizes": size_table(norms)}
    for name, table in tables.items():
        table.to_csv(output / f"{name}.csv", index=False)
        print(table.to_string(), "\n")
    draw(norms, output / "convergence.png")
    page = [
        "# Mean nuclear norm of the gradient against the horizon",
        f"\nK = {horizons[0]} ... {horizons[-1]}, {SEEDS} seeds. Slopes are those of log(mean nuclear norm) against log K, or, "
        'in the column "Frobenius, all", of log(mean Frobenius norm). Parentheses give 95 % t intervals over seeds.\n',
        tables["slopes"].to_markdown(index=False, disable_numparse=True),
        f"\nSquare shapes at K = {FIXED_HORIZON}:\n",
        tables["sizes"].to_markdown(index=False, disable_numparse=True),
        "\n![mean nuclear norm against the horizon](convergence.png)\n",
    ]
    (output / "README.md").write_text("\n".join(page))


if __name__ == "__main__":
    flags.DEFINE_boolean("full", False, "extend the horizons from 4,096 to 65,536")
    flags.DEFINE_string(
        "output_dir", None, "folder for results; existing results are kept and only missing cells run", required=True
    )
    app.run(main)
