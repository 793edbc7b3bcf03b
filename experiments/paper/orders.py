"""Problems that tell methods apart: `python -m experiments.paper.orders --output_dir=DIR`; ten minutes on one core.

The problems are the members of `family`, which all have the same constants, and so the same bound on the mean nuclear norm.
Train each with all methods for K = 1,024 steps. Step sizes are powers of two: for each member, method, and metric, the best on
other seeds than the reported ones. Write runs.csv, from which the same command resumes, orders.csv, pairs.csv, and orders.png
to DIR, and print the tables.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
import torch
from absl import app, flags

from .family import HORIZON, condition, draw, gradient, loss, members, noise, predict
from .ladder import Interval, generator, ratio, trajectory, tune
from .methods import make

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker

FLAGS = flags.FLAGS

METRICS = {"nuclear": "mean nuclear norm", "loss": "final loss"}
START = {  # log2 of the middle of the first three step sizes
    "SGD": -4,
    "AdamW": -8,
    "1/4, 1/4": -5,
    "1/2, 0": -5,
    "0, 1/2": -5,
    "1/2, 1/2": -8,
    "1, 1": -12,
    "KL": -7,
    "SOAP": -8,
    "Muon": -8,
}
PAIRS = [  # member, and two methods to compare
    ("Kronecker 1e2, rotated", "1/4, 1/4", "AdamW"),
    ("Kronecker 1e4, rotated", "1/4, 1/4", "AdamW"),
    ("Kronecker 1e4, rotated", "1/2, 1/2", "1/4, 1/4"),
    ("Kronecker 1e4, aligned", "1/4, 1/4", "AdamW"),
    ("Kronecker 1e4, aligned", "1/2, 1/2", "AdamW"),
    ("rows 1e4, rotated", "1/2, 1/2", "1/2, 0"),
    ("checkerboard, rotated", "1/2, 1/2", "SOAP"),
    ("checkerboard, aligned", "1/2, 1/2", "AdamW"),
    ("two loud columns, rotated", "1/2, 1/2", "KL"),
    ("white noise, rotated", "1/4, 1/4", "SGD"),
    ("opposite noise, rotated", "1/4, 1/4", "SGD"),
]


class Cell(NamedTuple):
    """One run, for a set of seeds; the step size is 2^rung."""

    member: str
    method: str
    seeds: str
    rung: int


def run(name: str, method: str, seeds: str, rung: int) -> pd.DataFrame:
    """Return one row per seed: the nuclear norm of the noise-free gradient, averaged over K steps, and the loss after them."""
    problem, drawn = members()[name], generator(seeds, 1)
    U, W, target = draw(problem, seeds)
    X = torch.zeros_like(target)
    gradients = trajectory(
        X,
        lambda parameters: make(method, parameters, 2.0**rung, HORIZON),
        lambda X: gradient(problem, U, W, target, X),
        lambda: noise(problem, U, W, drawn),
        HORIZON,
    )
    nuclear = torch.linalg.svdvals(torch.stack(list(gradients))).sum(dim=2).mean(dim=0)
    final = loss(problem, U, W, target, X).nan_to_num(torch.inf).clamp(max=1e30)
    return pd.DataFrame({"seed": range(len(X)), "nuclear": nuclear.double().numpy(), "loss": final.double().numpy()})


def compare(values: pd.DataFrame, name: str, method: str, base: str, metric: str) -> Interval:
    """Return a metric of a method over that of another one, paired by seed; `values` is the table of `ladder.tune`."""
    chosen = values[(values["member"] == name) & (values["metric"] == metric)]
    wide = chosen.pivot(index="seed", columns="method", values="value")
    return ratio(wide[method].to_numpy(), wide[base].to_numpy())


def order_table(values: pd.DataFrame) -> pd.DataFrame:
    """Return one row per member and method: `condition`, and each metric over that of SGD, measured with its interval, and
    predicted, and log2 of the best step sizes."""
    rows = []
    best = values.groupby(["member", "method", "metric"])["rung"].first()
    for name, problem in members().items():
        of_sgd = predict(problem, "SGD")
        for method in START:
            row: dict[str, Any] = {"member": name, "method": method}
            row["condition"] = float(f"{condition(problem, method):.3g}")
            for metric, (expected, rung) in predict(problem, method).items():
                found = compare(values, name, method, "SGD", metric)
                row |= dict(zip((metric, f"{metric} low", f"{metric} high"), found, strict=True))
                row |= {f"{metric} predicted": expected / of_sgd[metric][0]}
                row |= {f"{metric} log2 step": best[name, method, metric], f"{metric} log2 step predicted": rung}
            rows.append(row)
    return pd.DataFrame(rows)


def pair_table(values: pd.DataFrame) -> pd.DataFrame:
    """Return one row per pair of PAIRS: each metric of the first method over that of the second, with its interval."""
    found = [
        {"member": name, "method": method, "over": base}
        | {title: "{:.3f} ({:.3f} to {:.3f})".format(*compare(values, name, method, base, x)) for x, title in METRICS.items()}
        for name, method, base in PAIRS
    ]
    return pd.DataFrame(found)


def page(table: pd.DataFrame) -> str:
    """Return Markdown: per metric, a row per member and a column per method, ratios to SGD with intervals, the lowest in bold,
    and how close predictions are; and condition numbers."""
    lines = []
    for metric, title in METRICS.items():
        wide: dict[str, dict[str, str]] = {}
        lowest = table.groupby("member")[metric].min()
        for _, row in table[table["method"] != "SGD"].iterrows():
            entry = "{:.2f} ({:.2f} to {:.2f})".format(*(row[metric + end] for end in ("", " low", " high")))
            bold = row[metric] == lowest[row["member"]]
            wide.setdefault(row["member"], {})[row["method"]] = f"**{entry}**" if bold else entry
        lines += [f"{title.capitalize()}, over that of SGD:\n", markdown(pd.DataFrame(wide).T.rename_axis("member"))]
        known = table[table[f"{metric} predicted"].notna() & (table["method"] != "SGD")]
        errors = np.exp(np.log(known[metric] / known[f"{metric} predicted"]).abs())
        away = (known[f"{metric} log2 step"] - known[f"{metric} log2 step predicted"]).abs()
        lines.append(
            f"Of {len(known)} predictions, {(errors < 1.1).sum()} are within 10 % and {(errors < 1.25).sum()} within 25 %; the "
            f"best step is as predicted in {(away == 0).sum()} cases, and within a factor of 2 in {(away <= 1).sum()}.\n"
        )
    conditions = by_member(table, "condition", "{:.2g}").assign(reason=[problem.reason for problem in members().values()])
    return "\n".join([*lines, "Condition number of the curvature that is left:\n", markdown(conditions)])


def by_member(table: pd.DataFrame, column: str, form: str) -> pd.DataFrame:
    """Return a column of the table, formatted, with a row per member and a column per method."""
    wide = table.pivot(index="member", columns="method", values=column).loc[list(members()), list(START)]
    return wide.map(lambda x: "" if np.isnan(x) else form.format(x))


def markdown(table: pd.DataFrame) -> str:
    """Return a table as Markdown, its entries as they are."""
    return f"{table.to_markdown(disable_numparse=True)}\n"


def figure(table: pd.DataFrame, path: Path) -> None:
    """Plot the ratios of both metrics to those of SGD, measured and predicted, one panel per member and one line per method."""
    canvas, panels = plt.subplots(3, 3, sharey=True, sharex=True, figsize=(13, 11), layout="constrained")
    for axes, name in zip(panels.flat, members(), strict=True):
        rows = table[table["member"] == name].iloc[::-1]
        places = np.arange(len(rows))
        for shift, shape, color, (metric, title) in zip((0.17, -0.17), "os", ("C0", "C1"), METRICS.items(), strict=True):
            x, ends = rows[metric], (rows[metric] - rows[f"{metric} low"], rows[f"{metric} high"] - rows[metric])
            style = {"fmt": shape, "color": color, "markersize": 5, "capsize": 2}
            axes.errorbar(x, places + shift, xerr=ends, label=title, **style)
            predicted = {"facecolor": "none", "edgecolor": "black", "s": 70, "linewidth": 0.8, "marker": shape}
            axes.scatter(rows[f"{metric} predicted"], places + shift, label=f"{title}, predicted", **predicted)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks(places, rows["method"])
        axes.set(title=name, xscale="log")
        axes.xaxis.set_major_locator(ticker.FixedLocator([0.05, 0.1, 0.2, 0.5, 1, 2]))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.grid(alpha=0.3)
    canvas.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    canvas.supxlabel("over that of SGD, each at its best step size (below 1: better)")
    canvas.savefig(path, dpi=90)
    plt.close(canvas)


def main(_: Any) -> None:
    """Tune, measure the missing cells, and write the tables and the figure."""
    output = Path(FLAGS.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    starts = {(name, method): start for name in members() for method, start in START.items()}
    values = tune(Cell, starts, list(METRICS), output / "runs.csv", run, FLAGS.max_workers)
    table, pairs = order_table(values), pair_table(values)
    for name, x in {"orders": table, "pairs": pairs}.items():
        x.to_csv(output / f"{name}.csv", index=False, float_format="%.5g")
    figure(table, output / "orders.png")
    print(page(table), "\n", pairs.to_markdown(index=False, disable_numparse=True), sep="")


if __name__ == "__main__":
    flags.DEFINE_integer("max_workers", os.cpu_count() or 1, "number of single-threaded processes", lower_bound=1)
    flags.DEFINE_string("output_dir", None, "folder for results; only missing cells run", required=True)
    app.run(main)
