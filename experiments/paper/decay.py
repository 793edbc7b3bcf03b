"""Measure what decoupled decay does to the paper's rate: `python -m experiments.paper.decay --output_dir=DIR`; six minutes.

X_{k+1} = (1 - eta lambda) X_k - eta D_k. For 1/p + 1/q = 1/2 and theta = beta, directions have ||D_k||_op <= 1, so that
||X_k||_op <= 1 / lambda from X_1 = 0 on. Problems and settings are those of `horizons`, for (1/4, 1/4), except that B = A X*
with ||X*||_op = 1, so that this bound excludes the minimizer X* for lambda > 1. Means over X_1, ..., X_K of

    ||G||_*                                      G = grad f(X), the norm in the paper's bound,
    ||G||_* + lambda <G, X>                      zero only at stationary points of min f subject to ||X||_op <= 1 / lambda,
    ||G + lambda Lbar^(1/4) X Rbar^(1/4)||_*     zero where the expected step is about zero,

where Lbar = G G^T + E N N^T and Rbar = G^T G + E N^T N, N being the noise: L and R of an X that stays. Without noise,
the last two are zero at the same points: lambda X = -U V^T for G = U S V^T of full rank.
"""

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
import torch
from absl import app, flags
from torch import Tensor

from .problems import (
    PROBLEMS,
    SEEDS,
    Problem,
    draw_data,
    fit_slope,
    format_fit,
    make_optimizer,
    measure,
    theory_rate,
    trajectory,
)

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker

FLAGS = flags.FLAGS

SIDE, METHOD = 8, "1/4, 1/4"
HORIZONS = [2**i for i in range(6, 14)]
LAST = 3  # number of horizons in the slopes at the end
SIGMAS = [1.0, 0.0]
DECAYS = [(0.0, 0.0), (0.25, 0.0), (0.5, 0.0), (2.0, 0.0), (4.0, 0.0), (1.0, -0.25), (4.0, -0.25)]  # lambda = c K^power
MEASURES = {"nuclear": "||G||_*", "gap": "||G||_* + lambda <G, X>", "residual": "||G + lambda Lbar^(1/4) X Rbar^(1/4)||_*"}


class Cell(NamedTuple):
    """One measurement, for all seeds: lambda = decay K^power."""

    problem: str
    sigma: float
    decay: float
    power: float
    K: int


def scale_noise(problem: Problem, sigma: float) -> Problem:
    """Return the problem with noise of E ||.||_F^2 = sigma^2."""
    return problem._replace(noise=lambda m, n, generator: sigma * problem.noise(m, n, generator))


def noise_moments(problem: Problem, m: int, n: int) -> tuple[Tensor, Tensor]:
    """Return E N N^T and E N^T N, estimated from 20,000 draws of the noise N."""
    generator = torch.Generator().manual_seed(0)
    N = torch.cat([problem.noise(m, n, generator) for _ in range(2000)])
    return (N @ N.mT).mean(dim=0), (N.mT @ N).mean(dim=0)


def fourth_root(A: Tensor) -> Tensor:
    """Return A^(1/4) of positive semidefinite matrices."""
    eigenvalues, Q = torch.linalg.eigh(A)
    root: Tensor = (Q * eigenvalues.clamp(min=0).pow(0.25).unsqueeze(-2)) @ Q.mT
    return root


def stationarity(X: Tensor, G: Tensor, decay: float, moments: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Return MEASURES at points X with noise-free gradients G; `moments` are those of the noise."""
    nuclear = torch.linalg.svdvals(G).sum(dim=-1)
    if not decay:
        return dict.fromkeys(MEASURES, nuclear)
    left, right = fourth_root(G @ G.mT + moments[0]), fourth_root(G.mT @ G + moments[1])
    residual = torch.linalg.svdvals(G + decay * left @ X @ right).sum(dim=-1)
    return {"nuclear": nuclear, "gap": nuclear + decay * (G * X).sum(dim=(-2, -1)), "residual": residual}


def run(problem: str, sigma: float, decay: float, power: float, K: int) -> pd.DataFrame:
    """Return one row per seed: the mean of each measure, and the largest and the last operator norm of X."""
    chosen, weight_decay = scale_noise(PROBLEMS[problem], sigma), decay * K**power
    A, X_star = draw_data(SIDE, SIDE)
    X_star /= torch.linalg.matrix_norm(X_star, 2, keepdim=True)
    moments = noise_moments(chosen, SIDE, SIDE)

    def factory(X: list[torch.nn.Parameter], gap: float) -> torch.optim.Optimizer:
        return make_optimizer(METHOD, X, theory_rate(METHOD, SIDE, SIDE, K, chosen.smoothness, gap), K, weight_decay)

    means, norms = dict.fromkeys(MEASURES, torch.zeros(SEEDS)), []
    for X, G in trajectory(chosen, A, A @ X_star, K, factory):
        norms.append(torch.linalg.matrix_norm(X, 2))
        for name, values in stationarity(X, G, weight_decay, moments).items():
            means[name] = means[name] + values.sum(dim=0) / K
    operator = torch.cat(norms)
    columns = {**means, "largest": operator.amax(dim=0), "last": operator[-1]}
    return pd.DataFrame({"seed": range(SEEDS), **{name: x.double().numpy() for name, x in columns.items()}})


def cells() -> list[Cell]:
    """Return all cells, in order of increasing K. Without noise, lambda does not depend on K."""
    wanted = [(sigma, *decay) for sigma in SIGMAS for decay in DECAYS if sigma or not decay[1]]
    return [Cell(name, *case, K) for K in HORIZONS for name in PROBLEMS for case in wanted]


def label(decay: float, power: float) -> str:
    """Format lambda."""
    return f"{decay:g} K^(-1/4)" if power else f"{decay:g}"


def decay_table(norms: pd.DataFrame) -> pd.DataFrame:
    """Return one row per problem, noise, and lambda: means at the last horizon, slopes at the end, and operator norms."""
    rows = []
    for (name, sigma, decay, power), chosen in norms.groupby(["problem", "sigma", "decay", "power"], sort=False):
        at_last = chosen[chosen["K"] == HORIZONS[-1]]
        row = {"problem": name, "sigma": f"{sigma:g}", "lambda": label(decay, power)}
        for measure_name in MEASURES:
            values = chosen.pivot(index="seed", columns="K", values=measure_name).iloc[:, -LAST:]
            row[f"mean {measure_name}"] = f"{at_last[measure_name].mean():.3f}"
            row[f"slope of {measure_name}"] = format_fit(fit_slope(values.to_numpy(), values.columns.to_numpy(float)))
        bound = chosen["largest"] * chosen["decay"] * chosen["K"] ** chosen["power"]
        row["largest lambda ||X||_op, any K"] = f"{bound.max():.3f}"
        row["||X_K||_op"] = f"{at_last['last'].mean():.2f}"
        rows.append(row)
    return pd.DataFrame(rows)


def draw(norms: pd.DataFrame, path: Path) -> None:
    """Plot measures against K for the first problem: with noise the first and the third, without it the first and second."""
    name = next(iter(PROBLEMS))
    cases = [(1.0, "nuclear"), (1.0, "residual"), (0.0, "nuclear"), (0.0, "gap")]
    figure, panels = plt.subplots(2, 2, sharex=True, figsize=(12, 9), layout="constrained")
    for axes, (sigma, column) in zip(panels.flat, cases, strict=True):
        for i, (decay, power) in enumerate(DECAYS):
            chosen = norms[(norms["problem"] == name) & (norms["sigma"] == sigma)]
            means = chosen[(chosen["decay"] == decay) & (chosen["power"] == power)].groupby("K")[column].mean()
            axes.loglog(
                means.index, means, "--" if power else "-", color=f"C{i}", marker="o", markersize=4, label=label(decay, power)
            )
        K = np.array(HORIZONS, float)
        axes.loglog(K, 0.95 * axes.get_ylim()[1] * (K / K[0]) ** -0.25, color="black", linewidth=1, label="slope -1/4")
        axes.set_xscale("log", base=2)
        axes.yaxis.set_major_locator(ticker.FixedLocator([0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1]))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.set_title(f"mean {column}, {'noise' if sigma else 'no noise'} ({name.split(',')[0]}, {SIDE} x {SIDE})")
        axes.grid(alpha=0.3)
    for axes in panels[1]:
        axes.set_xlabel("horizon K")
    panels[0, 0].legend(title="lambda", fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(_: Any) -> None:
    """Measure the missing cells, then write the table, the figure, and the page."""
    output = Path(FLAGS.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    norms = measure(cells(), output / "norms.csv", run)
    table = decay_table(norms)
    table.to_csv(output / "decay.csv", index=False)
    print(table.to_string())
    draw(norms, output / "decay.png")
    page = [
        "# Decoupled decay",
        f"\n{SIDE} x {SIDE}, exponents {METHOD}, {SEEDS} seeds. Means at K = {HORIZONS[-1]}; slopes over the last {LAST} "
        f"horizons, K = {HORIZONS[-LAST]} to {HORIZONS[-1]}, with 95 % t intervals over seeds.\n",
        *(f"- {name}: mean over X_1, ..., X_K of {formula}" for name, formula in MEASURES.items()),
        "",
        table.to_markdown(index=False, disable_numparse=True),
        "\n![means of the measures against the horizon](decay.png)\n",
    ]
    (output / "tables.md").write_text("\n".join(page))


if __name__ == "__main__":
    flags.DEFINE_string(
        "output_dir", None, "folder for results; existing results are kept and only missing cells run", required=True
    )
    app.run(main)
