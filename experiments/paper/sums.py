"""Measure the step size that each sum of exponents needs: `python -m experiments.paper.sums --output_dir=DIR`; ten minutes.

If white noise of E ||N||_F^2 = sigma^2 dominates the gradient, L is about (sigma^2 / m) I and R about (sigma^2 / n) I, so that
the direction is c M with c = (m / sigma^2)^(1/p) (n / sigma^2)^(1/q): momentum SGD with step size c eta. SGD's step size in the
theory is sqrt(2 (f(X_1) - inf f) / (L K)) / sigma. Hence, with s = 1/p + 1/q, the prediction for the best step size is

    eta ~ K^(-1/2) sigma^(2 s - 1) m^(-1/p) n^(-1/q),

which is K^(-1/2) sigma^(2 s - 1) m^(-s) for m = n, one-sided or two-sided, and (m / n)^((1/q - 1/p) / 2) at fixed m n. Only for
s = 1/2 does it not depend on sigma. Relative to momentum SGD, s = 0, whose best step size is measured too, the powers of K,
sigma, m = n, and m / n are 0, 2 s, -s, and (1/q - 1/p) / 2, whatever the best step size of SGD itself is.

Problems and averages are those of `horizons`. For each cell, a ladder of step sizes with a factor of 2 is extended until the
best of every seed is inside. The best step size of a seed is the vertex of the parabola in log eta through its lowest three
points.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
import torch
from absl import app, flags

from .decay import scale_noise
from .ladder import ratio
from .problems import PROBLEMS, SEEDS, Problem, draw_data, fit_slope, format_fit, gain, measure, paper_shampoo, trajectory

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FLAGS = flags.FLAGS

SUMS = [0.25, 0.5, 0.75, 1.0]
PAIRS = [(0.0, 0.0), *((s / 2, s / 2) for s in SUMS), *((s, 0.0) for s in SUMS)]  # (1/p, 1/q); the first is momentum SGD
BASE: dict[str, float] = {"m": 8, "n": 8, "K": 1024, "sigma": 1.0}
AXES: dict[str, list[dict[str, float]]] = {  # settings that differ from BASE along each axis
    "K": [{"K": K} for K in (256, 1024, 4096)],
    "sigma": [{"sigma": sigma} for sigma in (0.25, 1.0, 4.0)],
    "sigma, 1 to 4": [{"sigma": sigma} for sigma in (1.0, 4.0)],
    "m = n": [{"m": width, "n": width} for width in (4, 8, 16, 32)],
    "m / n": [{"m": m, "n": 64 // m} for m in (4, 8, 16)],
}


class Cell(NamedTuple):
    """One ladder of step sizes, for all seeds."""

    problem: str
    inverse_p: float
    inverse_q: float
    m: int
    n: int
    K: int
    sigma: float


def guess_step(problem: Problem, exponents: tuple[float, float], m: int, n: int, K: int, sigma: float) -> float:
    """Return the prediction times 3 / sqrt(2), for f(X_1) - inf f = 1/2."""
    return 3 * math.sqrt(0.5 / (problem.smoothness * K)) / sigma / gain(exponents, m, n, sigma)


def predicted_powers(exponents: tuple[float, float]) -> dict[str, float]:
    """Return the powers of the best step size along AXES."""
    inverse_p, inverse_q = exponents
    s = inverse_p + inverse_q
    return {"K": -0.5, "sigma": 2 * s - 1, "sigma, 1 to 4": 2 * s - 1, "m = n": 0 - s, "m / n": (inverse_q - inverse_p) / 2}


def climb(norms: Callable[[np.ndarray], pd.DataFrame], guess: float) -> pd.DataFrame:
    """Return norms(steps), one row per step size and seed, for steps that have the best one of every seed inside.

    Steps are guess 2^i, at first from -2 to 2.
    """
    table, low, high = norms(guess * 2.0 ** np.arange(-2, 3)), -2, 2
    while True:
        best = np.log2(table.loc[table.groupby("seed")["nuclear"].idxmin(), "step"] / guess).round()
        below = [low - 2, low - 1] if best.min() == low else []
        above = [high + 1, high + 2] if best.max() == high else []
        if not below + above:
            return table.sort_values(["step", "seed"], ignore_index=True)
        table = pd.concat([table, norms(guess * 2.0 ** np.array(below + above))], ignore_index=True)
        low, high = min([low, *below]), max([high, *above])


def run(problem: str, inverse_p: float, inverse_q: float, m: int, n: int, K: int, sigma: float) -> pd.DataFrame:
    """Return the mean nuclear norms of one cell, one row per step size and seed."""
    chosen, exponents = scale_noise(PROBLEMS[problem], sigma), (inverse_p, inverse_q)
    A, B = draw_data(m, n)

    def norms(steps: np.ndarray) -> pd.DataFrame:
        scales = torch.tensor(steps, dtype=torch.float32)
        chunks = trajectory(chosen, A, B, K, lambda X, _: paper_shampoo(X, 1.0, K, exponents=exponents), scales)
        nuclear = torch.stack([torch.linalg.svdvals(G).sum(dim=-1).sum(dim=0) for _, G in chunks]).sum(dim=0) / K
        tables = [
            pd.DataFrame({"step": step, "seed": range(SEEDS), "nuclear": x.numpy()})
            for step, x in zip(steps, nuclear, strict=True)
        ]
        return pd.concat(tables, ignore_index=True)

    return climb(norms, guess_step(chosen, exponents, m, n, K, sigma))


def vertex(log_step: np.ndarray, log_norm: np.ndarray) -> tuple[float, float]:
    """Return the vertex of the parabola through the lowest point and its two neighbors, at equal distances."""
    i = int(log_norm.argmin())
    before, lowest, after = log_norm[i - 1 : i + 2]
    shift = (before - after) / (2 * (before - 2 * lowest + after))
    return log_step[i] + shift * (log_step[i + 1] - log_step[i]), lowest - (before - after) * shift / 4


def best_steps(ladders: pd.DataFrame) -> pd.DataFrame:
    """Return one row per cell and seed: the best step size and the mean nuclear norm there."""
    rows = []
    for keys, chosen in ladders.groupby([*Cell._fields, "seed"], sort=False):
        step, norm = np.exp(vertex(np.log(chosen["step"].to_numpy()), np.log(chosen["nuclear"].to_numpy())))
        rows.append((*keys, step, norm))
    return pd.DataFrame(rows, columns=[*Cell._fields, "seed", "step", "nuclear"])


def cells() -> list[Cell]:
    """Return every cell once, in order of increasing m n K."""
    settings = [BASE | change for axis in AXES.values() for change in axis]
    wanted = [Cell(name, *pair, **setting) for name in PROBLEMS for pair in PAIRS for setting in settings]  # type: ignore[arg-type]
    return sorted(dict.fromkeys(wanted), key=lambda cell: cell.m * cell.n * cell.K)


def along(best: pd.DataFrame, problem: str, pair: tuple[float, float], axis: str, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Return values of shape (seeds, points) along an axis, and the points."""
    chosen = best[(best["problem"] == problem) & (best["inverse_p"] == pair[0]) & (best["inverse_q"] == pair[1])]
    columns = []
    for change in AXES[axis]:
        setting = BASE | change
        rows = chosen[(chosen[list(setting)] == list(setting.values())).all(axis=1)].sort_values("seed")
        columns.append(rows[column].to_numpy())
    points = [c["m"] / c["n"] if axis == "m / n" else next(iter(c.values())) for c in AXES[axis]]
    return np.stack(columns, axis=1), np.array(points, dtype=float)


def format_pair(pair: tuple[float, float]) -> str:
    """Format 1/p and 1/q as fractions."""
    return ", ".join(f"{x.as_integer_ratio()[0]}/{x.as_integer_ratio()[1]}" if x % 1 else f"{x:g}" for x in pair)


def verdict(fit: tuple[float, float, float], predicted: float) -> str:
    """Format the prediction, and say whether the interval contains it, or how far the slope is from it."""
    return f"{predicted:g}, " + ("met" if fit[1] <= predicted <= fit[2] else f"off by {fit[0] - predicted:+.3f}")


def power_table(best: pd.DataFrame, relative: bool) -> pd.DataFrame:
    """Return one row per problem and pair: powers of the best step size (relative to momentum SGD) and predictions."""
    rows = []
    for name in PROBLEMS:
        for pair in PAIRS[relative:]:
            row = {"problem": name, "1/p, 1/q": format_pair(pair)}
            for axis in AXES:
                values, x = along(best, name, pair, axis, "step")
                predicted = predicted_powers(pair)[axis]
                if relative:
                    values = values / along(best, name, PAIRS[0], axis, "step")[0]
                    predicted -= predicted_powers(PAIRS[0])[axis]
                fit = fit_slope(values, x)
                row |= {axis: format_fit(fit), f"{axis}: predicted": verdict(fit, predicted)}
            rows.append(row)
    return pd.DataFrame(rows)


def norm_table(best: pd.DataFrame) -> pd.DataFrame:
    """Return one row per problem and pair: the mean nuclear norm at the best step size, over momentum SGD's, and powers."""
    rows = []
    for name in PROBLEMS:
        for pair in PAIRS:
            norms, K = along(best, name, pair, "K", "nuclear")
            steps = along(best, name, pair, "K", "step")[0]
            of_sgd = along(best, name, PAIRS[0], "K", "nuclear")[0]
            width, x = along(best, name, pair, "m = n", "nuclear")
            rows.append(
                {
                    "problem": name,
                    "1/p, 1/q": format_pair(pair),
                    **{f"norm, K = {k:.0f}": f"{value:.3f}" for k, value in zip(K, norms.mean(axis=0), strict=True)},
                    "over momentum SGD's, last": format_fit(ratio(norms[:, -1], of_sgd[:, -1])),
                    "power of K": format_fit(fit_slope(norms, K)),
                    "power of m = n": format_fit(fit_slope(width, x)),
                    "best step, K = 1024": f"{np.exp(np.log(steps[:, 1]).mean()):.4f}",
                }
            )
    return pd.DataFrame(rows)


def draw(best: pd.DataFrame, path: Path) -> None:
    """Plot best step sizes over those of momentum SGD, scaled to 1 at the smallest point, with the predictions."""
    drawn = ["K", "sigma", "m = n", "m / n"]
    figure, panels = plt.subplots(len(PROBLEMS), len(drawn), figsize=(17, 8.5), layout="constrained")
    for row, name in zip(panels, PROBLEMS, strict=True):
        for axes, axis in zip(row, drawn, strict=True):
            for pair in PAIRS[1:]:
                values, x = along(best, name, pair, axis, "step")
                steps = np.exp(np.log(values / along(best, name, PAIRS[0], axis, "step")[0]).mean(axis=0))
                one_sided, color = pair[1] == 0, f"C{SUMS.index(sum(pair))}"
                power = predicted_powers(pair)[axis] - predicted_powers(PAIRS[0])[axis]
                axes.loglog(x, steps / steps[0], "^" if one_sided else "o", mfc="none", color=color, label=format_pair(pair))
                axes.loglog(x, (x / x[0]) ** power, "--" if one_sided else "-", color=color, linewidth=1)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set(title=name, xlabel=axis)
            axes.grid(alpha=0.3)
        row[0].set_ylim(0.5, 2)
        row[0].set_ylabel("best step over momentum SGD's, scaled")
    panels[0, 0].legend(title="1/p, 1/q", fontsize=8, ncols=2, loc="lower left")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(_: Any) -> None:
    """Measure the missing ladders, then write the tables, the figure, and the page."""
    output = Path(FLAGS.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    best = best_steps(measure(cells(), output / "ladders.csv", run))
    tables = {"relative": power_table(best, True), "absolute": power_table(best, False), "norms": norm_table(best)}
    for name, table in tables.items():
        table.to_csv(output / f"{name}.csv", index=False)
        print(table.to_string(), "\n")
    draw(best, output / "sums.png")
    to_markdown = partial(pd.DataFrame.to_markdown, index=False, disable_numparse=True)
    page = [
        "# Step sizes for exponents with other sums",
        f"\n{SEEDS} seeds; K = 1024, sigma = 1, and m = n = 8 unless varied. Powers of the best step size over that of "
        "momentum SGD, (0, 0), with 95 % t intervals over seeds, next to the prediction, which is met if the interval "
        "contains it.\n",
        to_markdown(tables["relative"]),
        "\nPowers of the best step size itself:\n",
        to_markdown(tables["absolute"]),
        "\nMean nuclear norms at the best step size:\n",
        to_markdown(tables["norms"]),
        "\n![best step sizes over those of momentum SGD](sums.png)\n",
    ]
    (output / "tables.md").write_text("\n".join(page))


if __name__ == "__main__":
    flags.DEFINE_string(
        "output_dir", None, "folder for results; existing results are kept and only missing cells run", required=True
    )
    app.run(main)
