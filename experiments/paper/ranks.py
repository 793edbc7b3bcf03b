"""The paper's condition on norms, by the rank of the gradient: `python -m experiments.paper.ranks --output_dir=DIR`.

It takes a quarter of an hour on one core. The paper's bound sqrt(m + n) C / K^(1/4) on the mean nuclear norm of the gradient is
also one on its Frobenius norm, and it is that of SGD, C / K^(1/4), if ||G||_* = Theta(sqrt(min(m, n))) ||G||_F and m and n are
comparable. For gradients of rank r, the ratio of the norms is at most sqrt(r). With U (m, r) and V (n, r) of random orthonormal
columns, take

    flat:    f(X) = g(U^T X V),                                       noise Z,
    curved:  f(X) = g(U^T X V) + ||X - U U^T X V V^T||_F^2,           noise (1 - t)^(1/2) U Z_r V^T + t^(1/2) Z,  t = 1e-4,

where Z (m, n) and Z_r (r, r) are Gaussian with E ||.||_F^2 = 1, so that sigma = 1, and
g(Y) = d^2 sum log(1 + ((A Y - B) / d)^2) with d = 1 / r, A (r, r) orthogonal, and entries d or -d of B. Hence L = 2,
f(X_1) - inf f = log 2, and ||grad f(X_1)||_F = 1 for all shapes and ranks, and so C is the same.

The theory speaks about any noise. In the flat family, gradients have rank r (at X_1 at most r). If its noise were U Z_r V^T,
Shampoo would run as it does on g alone, whatever m and n. In the curved family, they nearly do, and a little noise acts where
the gradient hardly does.

Step sizes are powers of two: for each case, method, and norm, the best on other seeds than the reported ones. Write runs.csv,
from which the same command resumes, ranks.csv, slopes.csv, and ranks.png to DIR.
"""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
import torch
from absl import app, flags
from torch import Tensor

from . import problems
from .ladder import SEEDS, generator, ratio, trajectory, tune
from .methods import make
from .problems import PROBLEMS, fit_slope, format_fit

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker

FLAGS = flags.FLAGS

HORIZON = 64
LOG = PROBLEMS["log, Gaussian noise"]
GAP = math.log(2)
C = (LOG.smoothness * GAP) ** 0.25  # with sigma = 1
OUTSIDE = 1e-4  # share t of the noise's variance that is everywhere, for the curved family
METHODS = ["1/4, 1/4", "SGD"]
NORMS = {"nuclear": "nuclear norm", "frobenius": "Frobenius norm"}
CASES: dict[str, dict[tuple[int, int], tuple[int, ...]]] = {  # ranks by family and (m, n)
    "flat": {
        (8, 8): (1, 2, 4, 8),
        (32, 32): (1, 2, 4, 8, 16, 32),
        (128, 128): (1, 8, 32, 128),
        (512, 512): (1, 512),
        (8, 32): (1, 8),
        (8, 128): (1, 8),
        (8, 512): (1, 8),
    },
    "curved": {(8, 8): (1, 4), (32, 32): (1, 16), (128, 128): (1, 64), (256, 256): (1, 128)},
}


class Case(NamedTuple):
    """A problem: its family, shape, and rank."""

    family: str
    m: int
    n: int
    r: int


class Cell(NamedTuple):
    """One run, for a set of seeds; the step size is 2^rung."""

    family: str
    m: int
    n: int
    r: int
    method: str
    seeds: str
    rung: int


class Data(NamedTuple):
    """The problem's matrices for all seeds: U (S, m, r), V (S, n, r), A (S, r, r), B (S, r, r)."""

    U: Tensor
    V: Tensor
    A: Tensor
    B: Tensor


def draw(case: Case, seeds: str) -> Data:
    """Return the data of a case, the same for every method and step size."""
    S, drawn = SEEDS[seeds], generator(seeds, 0)
    U, V, A = (
        torch.linalg.qr(torch.randn(S, *shape, generator=drawn)).Q
        for shape in [(case.m, case.r), (case.n, case.r), (case.r, case.r)]
    )
    return Data(U, V, A, torch.randn(S, case.r, case.r, generator=drawn).sign() / case.r)


def outside(data: Data, X: Tensor) -> Tensor:
    """Return X - U U^T X V V^T."""
    return X - data.U @ (data.U.mT @ X @ data.V) @ data.V.mT


def loss(family: str, data: Data, X: Tensor) -> Tensor:
    """Return f(X) for each seed."""
    inside = problems.loss(LOG, data.A, data.B, data.U.mT @ X @ data.V)
    return inside if family == "flat" else inside + outside(data, X).square().sum(dim=(1, 2))


def gradient(family: str, data: Data, X: Tensor) -> Tensor:
    """Return grad f(X) for each seed: U grad g(U^T X V) V^T, plus 2 (X - U U^T X V V^T) in the curved family."""
    inside = data.U @ problems.gradient(LOG, data.A, data.B, data.U.mT @ X @ data.V) @ data.V.mT
    return inside if family == "flat" else inside + 2 * outside(data, X)


def noise(family: str, data: Data, drawn: torch.Generator) -> Tensor:
    """Return gradient noise for each seed, with E ||.||_F^2 = 1."""
    (S, m, r), n = data.U.shape, data.V.shape[1]
    everywhere = torch.randn(S, m, n, generator=drawn) / math.sqrt(m * n)
    if family == "flat":
        return everywhere
    inside = data.U @ torch.randn(S, r, r, generator=drawn) @ data.V.mT / r
    return math.sqrt(1 - OUTSIDE) * inside + math.sqrt(OUTSIDE) * everywhere


def run(family: str, m: int, n: int, r: int, method: str, seeds: str, rung: int) -> pd.DataFrame:
    """Return one row per seed: the nuclear and Frobenius norms of the noise-free gradient, averaged over K steps."""
    data, drawn = draw(Case(family, m, n, r), seeds), generator(seeds, 1)
    gradients = trajectory(
        torch.zeros(SEEDS[seeds], m, n),
        lambda parameters: make(method, parameters, 2.0**rung, HORIZON),
        lambda X: gradient(family, data, X),
        lambda: noise(family, data, drawn),
        HORIZON,
    )
    found = [torch.linalg.svdvals(data.U.mT @ G @ data.V if family == "flat" else G) for G in gradients]
    means = {
        "nuclear": torch.stack([x.sum(dim=1) for x in found]).mean(dim=0),
        "frobenius": torch.stack([torch.linalg.vector_norm(x, dim=1) for x in found]).mean(dim=0),
    }
    return pd.DataFrame({"seed": range(SEEDS[seeds]), **{norm: x.double().numpy() for norm, x in means.items()}})


def start(m: int, n: int, method: str) -> int:
    """Return log2 of a first step size: with white noise, Shampoo is SGD with (m n)^(1/4) times the step."""
    return -3 if method == "SGD" else round(-2 - math.log2(m * n) / 4)


def by_case(values: pd.DataFrame) -> dict[Case, pd.DataFrame]:
    """Return the table of `ladder.tune` by case: one row per seed and one column per (method, norm)."""
    return {
        Case(*case): rows.pivot(index="seed", columns=["method", "metric"], values="value")
        for case, rows in values.groupby(list(Case._fields), sort=False)
    }


def rank_table(values: pd.DataFrame) -> pd.DataFrame:
    """Return one row per case: both mean norms, those of Shampoo over those of SGD with intervals, and Shampoo's mean nuclear
    norm over the bound sqrt(m + n) C / K^(1/4)."""
    rows = []
    for case, wide in by_case(values).items():
        row: dict[str, Any] = case._asdict()
        for norm in NORMS:
            found = ratio(*(wide[method, norm].to_numpy() for method in METHODS))
            row |= dict(zip((norm, f"{norm} low", f"{norm} high"), found, strict=True))
        row |= {f"mean {norm}, {method}": wide[method, norm].mean() for norm in NORMS for method in METHODS}
        row["over bound"] = wide[METHODS[0], "nuclear"].mean() / (math.sqrt(case.m + case.n) * C / HORIZON**0.25)
        rows.append(row)
    return pd.DataFrame(rows)


def slope_table(values: pd.DataFrame) -> pd.DataFrame:
    """Return, per family and choice of ranks, the slopes over square shapes of the log ratio of Shampoo's mean norms to SGD's,
    and of Shampoo's and SGD's log mean norms, against log m."""
    cases, rows = by_case(values), []
    for (family, label), chosen in series(list(cases)).items():
        row: dict[str, Any] = {"family": family, "rank": label, "m = n": ", ".join(str(case.m) for case in chosen)}
        sizes = np.array([case.m for case in chosen], dtype=float)
        for norm, title in NORMS.items():
            shampoo, sgd = (np.stack([cases[case][method, norm] for case in chosen], axis=1) for method in METHODS)
            for name, x in {"ratio": shampoo / sgd, "Shampoo": shampoo, "SGD": sgd}.items():
                row[f"{title}, {name}"] = format_fit(fit_slope(x, sizes))
        rows.append(row)
    return pd.DataFrame(rows)


def series(cases: list[Case]) -> dict[tuple[str, str], list[Case]]:
    """Return the cases with square shapes by family and choice of ranks, of those choices that several sizes have."""
    square = sorted((case for case in cases if case.m == case.n), key=lambda case: case.m)
    found = {
        (family, f"r = {label}"): [case for case in square if case.family == family and case.r in (fixed, share * case.m)]
        for family in CASES
        for label, fixed, share in [("1", 1, 0), ("8", 8, 0), ("m / 2", 0, 0.5), ("m", 0, 1)]
    }
    return {key: chosen for key, chosen in found.items() if len(chosen) > 2}


def figure(table: pd.DataFrame, path: Path) -> None:
    """Plot both ratios to SGD against m = n, one line per family and choice of ranks, and the mean over its bound against r."""
    cases = [Case(*row) for row in table[list(Case._fields)].itertuples(index=False)]
    rows = dict(zip(cases, table.to_dict("records"), strict=True))
    canvas, panels = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    for axes, (norm, title) in zip(panels, NORMS.items(), strict=False):
        for (family, label), chosen in series(cases).items():
            found = [rows[case] for case in chosen]
            middle, low, high = (np.array([row[norm + end] for row in found]) for end in ("", " low", " high"))
            style = "-o" if family == "flat" else "--s"
            sizes = [case.m for case in chosen]
            axes.errorbar(sizes, middle, [middle - low, high - middle], fmt=style, capsize=2, label=f"{family}, {label}")
        axes.axhline(1, color="black", linewidth=1)
        axes.set(title=f"mean {title}, (1/4, 1/4) over SGD", xlabel="m = n", yscale="log")
        axes.set_xscale("log", base=2)
        axes.yaxis.set_major_locator(ticker.FixedLocator([1, 1.2, 1.5, 2, 3, 4, 5]))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.grid(alpha=0.3)
    panels[0].legend()
    panels[1].sharey(panels[0])
    for family, marker in zip(CASES, "os", strict=True):
        some = table[table["family"] == family]
        panels[2].loglog(some["r"] / some[["m", "n"]].sum(axis=1), some["over bound"], marker, base=2, label=family)
    share = np.array([2.0**-10, 0.5])
    panels[2].loglog(share, share**0.5, color="black", linewidth=1, base=2, label="(r / (m + n))^(1/2)")
    panels[2].set(title="mean nuclear norm, (1/4, 1/4), over its bound", xlabel="r / (m + n)")
    panels[2].grid(alpha=0.3)
    panels[2].legend()
    canvas.savefig(path, dpi=90)
    plt.close(canvas)


def main(_: Any) -> None:
    """Tune, measure the missing cells, and write the tables and the figure."""
    output = Path(FLAGS.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    cases = [Case(family, m, n, r) for family, shapes in CASES.items() for (m, n), ranks in shapes.items() for r in ranks]
    starts = {(*case, method): start(case.m, case.n, method) for case in cases for method in METHODS}
    values = tune(Cell, starts, list(NORMS), output / "runs.csv", run, FLAGS.max_workers)
    tables = {"ranks": rank_table(values), "slopes": slope_table(values)}
    for name, table in tables.items():
        table.to_csv(output / f"{name}.csv", index=False, float_format="%.4g")
        print(table.to_markdown(index=False, floatfmt=".3g"), "\n")
    figure(tables["ranks"], output / "ranks.png")


if __name__ == "__main__":
    flags.DEFINE_integer("max_workers", os.cpu_count() or 1, "number of single-threaded processes", lower_bound=1)
    flags.DEFINE_string("output_dir", None, "folder for results; only missing cells run", required=True)
    app.run(main)
