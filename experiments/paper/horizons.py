"""Measure the paper's convergence rate: `python -m experiments.paper.horizons --output_dir=DIR`; five minutes, `--full` hours.

For X of shape (m, n) and 1/p + 1/q = 1/2, Li, Dong & Lin (arXiv 2601.07326) bound the mean nuclear norm of the gradient,
(1/K) sum_k E ||grad f(X_k)||_*, by O(sqrt(m + n) C / K^(1/4)), where C^4 is of order sigma^2 L (f(X_1) - inf f). Measure this
mean for `AdamWShampoo` with the paper's settings over horizons K, shapes, exponents, and ten seeds. As in the theory,

    1 - theta = 1 - beta = K^(-1/2),    eta = sqrt((f(X_1) - inf f) / (L K (m + n))),    lambda = 0;

the powers of K and m + n come from the theory, the constants do not. epsilon = 1e-6 sigma^2 / (m n) is a millionth of the
noise variance of an entry: far below the eigenvalues of the factors, which the noise bounds from below, so that the method does
not reduce to SGD, and above the float32 rounding error of the factors. Finished cells are read from DIR/norms.csv, so that the
same command resumes an interrupted run.
"""

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import pandas as pd
from absl import app, flags

from .problems import METHODS, PROBLEMS, SEEDS, fit_slope, format_fit, make_optimizer, mean_norms, measure, theory_rate

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker

FLAGS = flags.FLAGS

LAST = 3  # number of horizons in the slope at the end
SUM_HALF = ["1/4, 1/4", "1/2, 0"]
SHAPES = {(8, 8): list(METHODS), (16, 4): SUM_HALF, (4, 16): SUM_HALF}
WIDTHS, FIXED_HORIZON = [4, 8, 16, 32], 1024  # square matrices at one horizon


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
    wanted = [(m, n, method, K) for K in horizons for (m, n), methods in SHAPES.items() for method in methods]
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
    output = Path(FLAGS.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    horizons = [2**i for i in range(6, 17 if FLAGS.full else 13)]
    norms = measure(cells(horizons), output / "norms.csv", run)
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
