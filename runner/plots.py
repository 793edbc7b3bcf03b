"""Pictures of runs and suites. `colors` gives each name the same color in all pictures of a page."""

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .files import replacing
from .workloads.base import LaptopWorkload

Workload = LaptopWorkload | type[LaptopWorkload]  # targets are class attributes, so no data is needed
Colors = Mapping[str, tuple[float, float, float, float]]
Curve = tuple[pd.Series, pd.Series]  # steps or seconds, and a metric
Curves = dict[str, tuple[Workload, dict[str, Curve]]]  # title -> a workload, and its curves by name


def colors(names: Sequence[str]) -> Colors:
    """Return a color for each name, up to 20 different ones."""
    order = [*range(0, 20, 2), *range(1, 20, 2)]
    return {name: plt.colormaps["tab20"](order[i % 20]) for i, name in enumerate(sorted(names))}


def label(name: str) -> str:
    """Return a name as matplotlib shows it: $ would begin a formula, and legends leave out names that begin with _."""
    return " " * name.startswith("_") + name.replace("$", r"\$")


def save(figure: Figure, path: Path, dpi: int) -> None:
    """Write a picture, and free its memory."""
    try:
        with replacing(path, durable=False) as partial:
            figure.savefig(partial, dpi=dpi)
    finally:
        plt.close(figure)


def plot_profile(profile: pd.DataFrame, scores: pd.Series, by: str, color: Colors, path: Path) -> None:
    """Plot rho(tau) of each submission, best score first. Lines are shifted slightly, so that equal ones stay visible."""
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    for i, name in enumerate(scores.index):
        shift = 0.006 * (i - (len(scores) - 1) / 2)
        axes.step(
            profile.index, profile[name] + shift, where="post", color=color[name], label=label(f"{scores[name]:.4f}  {name}")
        )
    axes.set(
        xlabel=f"tau: {by} to target over the best submission's", ylabel="share of workloads within tau", ylim=(-0.05, 1.05)
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", title="score")
    save(figure, path, 120)


def plot_times(times: pd.DataFrame, by: str, color: Colors, path: Path) -> None:
    """Plot one bar per workload and submission: time / best time, or no bar for a miss."""
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    (times / times.min()).replace(np.inf, np.nan).rename(index=label, columns=label).T.plot.bar(
        ax=axes, width=0.85, legend=False, color=[color[name] for name in times.index]
    )
    axes.set(xlabel="", ylabel=f"{by} to target over the best", title="no bar: target not reached")
    axes.axhline(1, color="black", linewidth=0.8)
    figure.legend(loc="outside right upper")
    save(figure, path, 120)


def plot_intervals(table: pd.DataFrame, reference: str, color: Colors, path: Path) -> None:
    """Plot the ratio of steps to those of `reference` with its interval, one row per submission; table: `ratios` of ALL."""
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.4 * len(table)), layout="constrained")
    for row, (name, values) in enumerate(table.sort_values("ratio", ascending=False).iterrows()):
        if values["bound"] in ("", "?"):
            axes.plot([values["low"], values["high"]], [row, row], color=color[str(name)], linewidth=2)
        marker = {"": "o", ">": ">", "<": "<", "?": "o"}[values["bound"]]
        axes.plot(values["ratio"], row, marker=marker, color=color[str(name)])
    axes.set_yticks(range(len(table)), map(label, table.sort_values("ratio", ascending=False).index))
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_ylim(-0.6, len(table) - 0.4)
    axes.set(xlabel=f"steps to target over those of {label(reference)}; arrows are bounds, because runs missed")
    axes.grid(axis="x", alpha=0.3)
    save(figure, path, 120)


def draw_curves(axes: Axes, workload: Workload, curves: Mapping[str, Curve], color: Colors) -> None:
    """Plot each curve (x, validation metric), and the target as a dashed line.

    The y-axis spans the better two thirds of all values, target included, so that early evaluations and diverging trials do
    not compress it.
    """
    target = workload.validation_target_value
    for name, (x, metric) in curves.items():
        axes.plot(x, metric, marker="o", markersize=3, color=color[name])
    axes.axhline(target, color="black", linestyle="--", linewidth=1, label="target")
    values = pd.concat([pd.Series([target]), *(metric for _, metric in curves.values())])
    low, high = values.replace([math.inf, -math.inf], math.nan).quantile(
        [1 / 3, 1.0] if workload.higher_is_better else [0.0, 2 / 3]
    )
    axes.set_ylim(low - 0.1 * (high - low) - 1e-3, high + 0.1 * (high - low) + 1e-3)
    axes.set_ylabel(f"validation/{workload.target_metric_name}")
    axes.grid(alpha=0.3)


def plot_curves(panels: Curves, x: str, color: Colors, path: Path) -> None:
    """Plot one panel per title, each with a workload's curves against `x`; one panel takes the whole width."""
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(5.5 * columns + 2, 3.2 * rows + 1), layout="constrained", squeeze=False)
    for axes, title in zip_longest(grid.flat, panels):
        if title is None:
            axes.set_axis_off()
            continue
        workload, curves = panels[title]
        draw_curves(axes, workload, curves, color)
        axes.set(xlabel=x, title=title)
    names = sorted({name for _, curves in panels.values() for name in curves})
    lines = [Line2D([], [], color=color[name], marker="o", markersize=3, label=label(name)) for name in names]
    lines.append(Line2D([], [], color="black", linestyle="--", linewidth=1, label="target"))
    figure.legend(handles=lines, loc="outside upper center", ncols=4)
    save(figure, path, 110)
