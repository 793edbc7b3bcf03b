"""Measure the paper's convergence rate: `python -m experiments.paper.horizons --output_dir=DIR`; five minutes, `--full` 20.

For X of shape (m, n) and 1/p + 1/q = 1/2, Li, Dong & Lin (arXiv 2601.07326) bound the mean nuclear norm of the gradient,
(1/K) sum_k E ||grad f(X_k)||_*, by O(sqrt(m + n) C / K^(1/4)), where C^4 is of order sigma^2 L (f(X_1) - inf f). Measure this
mean for `AdamWShampoo` with the paper's settings over horizons K, shapes, exponents, and ten seeds. As in the theory,

    1 - theta = 1 - beta = K^(-1/2),    eta = sqrt((f(X_1) - inf f) / (L K (m + n))),    lambda = 0;

the powers of K and m + n come from the theory, the constants do not. epsilon is that of `problems.paper_shampoo`. Finished
cells are read from DIR/norms.csv, so that the same command resumes an interrupted run.

What to expect where f is quadratic and white noise dominates the gradient, so that every method is SGD with a step size e (see
`effective_step`): the gradient is the sum of that of gradient flow at the time e k, whose mean over K steps falls at most like
1 / (e K), that is, K^(-1/2), and of

    sqrt(e L / (2 m n)) A^T Z,  Z standard normal,    which falls like sqrt(e), that is, K^(-1/4).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
import torch
from absl import app, flags
from torch import Tensor

from .problems import (
    METHODS,
    PROBLEMS,
    SEEDS,
    Problem,
    draw_data,
    fit_slope,
    format_fit,
    gain,
    loss,
    make_optimizer,
    mean_norms,
    measure,
    theory_rate,
    trajectory,
)

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker

FLAGS = flags.FLAGS

LAST = 3  # number of horizons in the slope at the end
SUM_HALF = ["1/4, 1/4", "1/2, 0"]
SHAPES = {(8, 8): list(METHODS), (16, 4): SUM_HALF, (4, 16): SUM_HALF}
WIDTHS, FIXED_HORIZON = [4, 8, 16, 32], 1024  # square matrices at one horizon
SHORT, LONG = 4096, ["1/4, 1/4", "1/2, 0", "1/2, 1/2", "SGD", "AdamW"]  # only these, and the first shape, for K > SHORT
EXPLAINED = ["1/4, 1/4", "AdamW", "SGD"]  # by gradient flow and noise, for the problem with white noise
FLOW_STEP = 1 / 16  # of gradient descent that stands for gradient flow, far below 1 / L


class Cell(NamedTuple):
    """One measurement, for all seeds."""

    problem: str
    m: int
    n: int
    method: str
    K: int


def run(problem: str, m: int, n: int, method: str, K: int) -> pd.DataFrame:
    """Return the mean norms of one cell, with the step size of the theory."""
    chosen = PROBLEMS[problem]
    return mean_norms(
        chosen, m, n, K, lambda X, gap: make_optimizer(method, X, theory_rate(method, m, n, K, chosen.smoothness, gap), K)
    )


def cells(horizons: list[int]) -> list[Cell]:
    """Return every cell once, in order of increasing K."""
    every = [(m, n, method) for (m, n), methods in SHAPES.items() for method in methods]
    wanted = [
        (*case, K) for K in horizons for case in every if K <= SHORT or (case[:2] == next(iter(SHAPES)) and case[2] in LONG)
    ]
    wanted += [(width, width, method, FIXED_HORIZON) for width in WIDTHS for method in [*SUM_HALF, "SGD"]]
    ordered = sorted(dict.fromkeys(wanted), key=lambda cell: cell[3])
    return [Cell(name, *cell) for cell in ordered for name in PROBLEMS]


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
                        "K up to": f"{K[-1]:.0f}",
                        "slope": format_fit(fit_slope(values, K)),
                        f"slope, last {LAST}": format_fit(fit_slope(values[:, -LAST:], K[-LAST:])),
                        "Frobenius, all": format_fit(fit_slope(wide["frobenius"].to_numpy(), K)),
                        "mean at last K": f"{values[:, -1].mean():.3f}",
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


def wide_norms(norms: pd.DataFrame, problem: str, method: str) -> pd.DataFrame:
    """Return the mean nuclear norms of the first shape, one row per seed and one column per K."""
    m, n = next(iter(SHAPES))
    chosen = norms[(norms["problem"] == problem) & (norms["m"] == m) & (norms["n"] == n) & (norms["method"] == method)]
    return chosen.pivot(index="seed", columns="K", values="nuclear")


def local_slopes(wide: pd.DataFrame) -> dict[int, tuple[float, float, float]]:
    """Return the slope from each horizon to the next, with its interval."""
    values, K = wide.to_numpy(), [int(k) for k in wide.columns]
    return {k: fit_slope(values[:, i : i + 2], np.array(K[i : i + 2], float)) for i, k in enumerate(K[:-1])}


def local_table(norms: pd.DataFrame, problem: str) -> pd.DataFrame:
    """Return one row per horizon but the last: the slope from it to the next, of each method."""
    columns = {}
    for method in METHODS:
        fits = local_slopes(wide_norms(norms, problem, method))
        columns[method] = {f"{k} to {2 * k}": format_fit(fit) for k, fit in fits.items()}
    return pd.DataFrame(columns).rename_axis("K").reset_index().fillna("")


def paired_table(norms: pd.DataFrame, last: int = 4) -> pd.DataFrame:
    """Return one row per problem: the slope over the last horizons minus that of SGD on the same seeds, of each method."""
    rows = []
    for problem in PROBLEMS:
        base = wide_norms(norms, problem, "SGD").iloc[:, -last:]
        ratios = {method: wide_norms(norms, problem, method).reindex(columns=base.columns) / base for method in METHODS}
        fits = {m: fit_slope(x.to_numpy(), x.columns.to_numpy(dtype=float)) for m, x in ratios.items() if m != "SGD"}
        horizons = f"{base.columns[0]} to {base.columns[-1]}"
        rows.append({"problem": problem, "K": horizons, **{m: format_fit(fit) for m, fit in fits.items() if fit[0] == fit[0]}})
    return pd.DataFrame(rows)


def effective_step(method: str, m: int, n: int, K: int, L: float, gap: float) -> float:
    """Return the step size of SGD with the same steps if white noise dominates the gradient: m n entries of variance 1 / (m n).

    For AdamW, the root of the second moment is then 1 / sqrt(m n).
    """
    exponents = METHODS[method]
    scale = gain(exponents, m, n) if exponents else 1.0 if method == "SGD" else math.sqrt(m * n)
    return scale * theory_rate(method, m, n, K, L, gap)


def nuclear_norm(X: Tensor) -> Tensor:
    """Return the nuclear norms of matrices."""
    singular_values: Tensor = torch.linalg.svdvals(X)
    return singular_values.sum(dim=-1)


def flow_gradients(problem: Problem, A: Tensor, B: Tensor, duration: float) -> Tensor:
    """Return the gradients along gradient flow from 0, every FLOW_STEP, of shape (steps, S, m, n)."""
    quiet = problem._replace(noise=lambda m, n, _: torch.zeros(m, n))
    steps = math.ceil(duration / FLOW_STEP)
    return torch.cat([G for _, G in trajectory(quiet, A, B, steps, lambda X, _: torch.optim.SGD(X, FLOW_STEP))])


def noise_gradients(A: Tensor, n: int, L: float, step: float, draws: int) -> Tensor:
    """Return sqrt(step L / (2 m n)) A^T Z, Z (m, n) standard normal, of shape (draws, S, m, n)."""
    Z = torch.randn(draws, *A.shape[:2], n, generator=torch.Generator().manual_seed(0))
    return math.sqrt(step * L / (2 * A.shape[-1] * n)) * A.mT @ Z


def expected_norms(methods: Sequence[str], horizons: Sequence[int]) -> pd.DataFrame:
    """Return one row per method, horizon, and seed: the mean nuclear norms of the gradient on the way to a minimizer, of what
    noise adds to it, and of their sum. First problem and first shape.
    """
    problem, (m, n) = next(iter(PROBLEMS.values())), next(iter(SHAPES))
    A, B = draw_data(m, n)
    L, gap = problem.smoothness, loss(problem, A, B, torch.zeros_like(B)).mean().item()
    steps = {(method, K): effective_step(method, m, n, K, L, gap) for method in methods for K in horizons}
    flow = flow_gradients(problem, A, B, max(K * step for (_, K), step in steps.items()))
    tables = []
    for (method, K), step in steps.items():
        way = flow[: round(K * step / FLOW_STEP)]
        noise = noise_gradients(A, n, L, step, len(way))
        parts = {"way": way, "noise": noise, "nuclear": way + noise}
        means = {name: nuclear_norm(G).mean(dim=0) for name, G in parts.items()}
        tables.append(pd.DataFrame({"method": method, "K": K, "seed": range(SEEDS), **means}))
    return pd.concat(tables, ignore_index=True)


def expected_table(norms: pd.DataFrame, expected: pd.DataFrame) -> pd.DataFrame:
    """Return one row per method and every second horizon: measured and expected means, and expected slopes to the next."""
    rows = []
    for method, chosen in expected.groupby("method", sort=False):
        measured, wide = (
            wide_norms(norms, next(iter(PROBLEMS)), method),
            chosen.pivot(index="seed", columns="K", values="nuclear"),
        )
        slopes = local_slopes(wide)
        parts = chosen.groupby("K")[["way", "noise", "nuclear"]].mean()
        for K in list(slopes)[::2]:
            rows.append(
                {
                    "1/p, 1/q": method,
                    "K": f"{K}",
                    "way": f"{parts['way'][K]:.3f}",
                    "noise": f"{parts['noise'][K]:.3f}",
                    "expected": f"{parts['nuclear'][K]:.3f}",
                    "measured": f"{measured[K].mean():.3f}" if K in measured else "",
                    "expected slope to 2 K": f"{slopes[K][0]:.3f}",
                    "measured slope": format_fit(local_slopes(measured)[K]) if 2 * K in measured else "",
                }
            )
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
        axes.yaxis.set_major_locator(ticker.FixedLocator([0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8]))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.set(title=f"{name}, {m} x {n}", xlabel="horizon K", ylabel="mean nuclear norm of the gradient")
        axes.grid(alpha=0.3)
    panels[-1].legend(title="1/p, 1/q")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_slopes(norms: pd.DataFrame, expected: pd.DataFrame, path: Path) -> None:
    """Plot slopes between consecutive horizons, measured with intervals and expected, for the first problem and shape."""
    problem, (m, n) = next(iter(PROBLEMS)), next(iter(SHAPES))
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for i, (method, chosen) in enumerate(expected.groupby("method", sort=False)):
        lines = {k: fit[0] for k, fit in local_slopes(chosen.pivot(index="seed", columns="K", values="nuclear")).items()}
        axes.plot([k * 2**0.5 for k in lines], list(lines.values()), color=f"C{i}", label=f"{method}, expected")
        fits = local_slopes(wide_norms(norms, problem, method))
        slope, low, high = np.array(list(fits.values())).T
        shifted = np.array(list(fits)) * 2 ** (0.5 + 0.1 * (i - 1))
        axes.errorbar(
            shifted, slope, (slope - low, high - slope), fmt="o", markersize=4, color=f"C{i}", label=f"{method}, measured"
        )
    axes.axhline(-0.25, color="black", linewidth=1, label="slope -1/4")
    axes.set_xscale("log", base=2)
    axes.set(title=f"{problem}, {m} x {n}", xlabel="K", ylabel="slope from K / sqrt 2 to K sqrt 2")
    axes.grid(alpha=0.3)
    axes.legend(ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(_: Any) -> None:
    """Measure the missing cells, then write the tables, the figure, and the page."""
    output = Path(FLAGS.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    horizons = [2**i for i in range(6, 17 if FLAGS.full else 13)]
    norms = measure(cells(horizons), output / "norms.csv", run)
    norms = norms[norms["K"].isin(horizons)]
    expected = expected_norms(EXPLAINED, [2**i for i in range(6, 25)])
    tables = {"slopes": slope_table(norms), "sizes": size_table(norms), "expected": expected_table(norms, expected)}
    tables |= {f"local_{name.split(',')[0]}": local_table(norms, name) for name in PROBLEMS} | {"paired": paired_table(norms)}
    for name, table in tables.items():
        table.to_csv(output / f"{name}.csv", index=False)
        print(table.to_string(), "\n")
    draw(norms, output / "convergence.png")
    draw_slopes(norms, expected, output / "slopes.png")
    page = [
        "# Mean nuclear norm of the gradient against the horizon",
        f"\nK = {horizons[0]} ... {horizons[-1]}, {SEEDS} seeds. Slopes are those of log(mean nuclear norm) against log K, or, "
        'in the column "Frobenius, all", of log(mean Frobenius norm). Parentheses give 95 % t intervals over seeds.\n',
        tables["slopes"].to_markdown(index=False, disable_numparse=True),
        f"\nSquare shapes at K = {FIXED_HORIZON}:\n",
        tables["sizes"].to_markdown(index=False, disable_numparse=True),
        "\n![mean nuclear norm against the horizon](convergence.png)\n",
        "# Slopes from each horizon to the next",
    ]
    for name in PROBLEMS:
        page += [f"\n{name}, 8 x 8:\n", tables[f"local_{name.split(',')[0]}"].to_markdown(index=False, disable_numparse=True)]
    page += [
        "\nSlopes minus those of SGD on the same seeds, 8 x 8:\n",
        tables["paired"].to_markdown(index=False, disable_numparse=True),
        "\n![slopes between horizons, measured and expected](slopes.png)\n",
        tables["expected"].to_markdown(index=False, disable_numparse=True),
    ]
    (output / "tables.md").write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    flags.DEFINE_boolean("full", False, "extend the horizons from 4,096 to 65,536 for five methods")
    flags.DEFINE_string(
        "output_dir", None, "folder for results; existing results are kept and only missing cells run", required=True
    )
    app.run(main)
