"""Reports: a table and a plot of the trials of a run, and a Markdown page about a suite."""

import json
import math
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from .score import (
    MEASURES,
    Comparison,
    LogError,
    compare,
    median_times,
    miss_limits,
    read_studies,
    read_targets,
    write_comparison,
)
from .workloads import workload_class
from .workloads.base import LaptopWorkload

Workload = LaptopWorkload | type[LaptopWorkload]  # targets are class attributes, so no data is needed
Trials = dict[int, tuple[dict[str, Any], pd.DataFrame]]  # number -> hyperparameters, evaluations


def read_trials(folder: Path) -> Trials:
    """Return the trials of a run that were evaluated at least once, in order of their numbers."""
    numbers = sorted(int(path.name.removeprefix("trial_")) for path in folder.glob("trial_*"))
    trials = {}
    for number in numbers:
        path = folder / f"trial_{number}" / "eval_measurements.csv"
        if path.exists():
            trials[number] = (json.loads((path.parent / "hparams.json").read_text()), pd.read_csv(path))
    return trials


def first_reaching_target(workload: Workload, evaluations: pd.DataFrame) -> pd.Series | None:
    """Return the first evaluation that reached the validation target, or None."""
    metric, target = evaluations[f"validation/{workload.target_metric_name}"], workload.validation_target_value
    reached = metric > target if workload.higher_is_better else metric < target
    return evaluations.loc[reached.idxmax()] if reached.any() else None


def trial_table(workload: LaptopWorkload, trials: Trials) -> pd.DataFrame:
    """Return a table with one column per trial: the hyperparameters that differ between trials, steps and seconds to the
    target, the best validation metric, and the step of the last evaluation.
    """
    metric = f"validation/{workload.target_metric_name}"
    columns = {}
    for number, (point, evaluations) in trials.items():
        hit = first_reaching_target(workload, evaluations)
        best = evaluations[metric].max() if workload.higher_is_better else evaluations[metric].min()
        columns[f"trial {number}"] = {
            **{name: format_value(value) for name, value in point.items()},
            "steps to target": "-" if hit is None else str(int(hit["global_step"])),
            "seconds to target": "-" if hit is None else f"{hit['score']:.1f}",
            f"best {metric}": f"{best:.4f}",
            "steps at the last evaluation": str(int(evaluations["global_step"].iloc[-1])),
        }
    table = pd.DataFrame(columns)
    points = [point for point, _ in trials.values()]
    same = [name for name in points[0] if all(point.get(name) == points[0][name] for point in points)]
    return table.drop(index=same)


def format_value(value: Any) -> str:
    """Format a float with four significant digits, and any other value with `str`."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot_trials(workload: LaptopWorkload, name: str, trials: Trials, path: Path) -> None:
    """Plot the validation metric of each trial against submission time, with the target, and save the plot as a PNG."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    draw_curves(axes, workload, {f"trial {number}": evaluations for number, (_, evaluations) in trials.items()}, "score")
    axes.set(xlabel="submission time in seconds", title=name)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_curves(axes: Axes, workload: Workload, curves: dict[str, pd.DataFrame], x: str) -> None:
    """Plot the validation metric of each table of evaluations against its column `x`, and the target as a dashed line.

    The y-axis spans the better two thirds of all values, target included, so that early evaluations and diverging trials do
    not compress it.
    """
    metric, target = f"validation/{workload.target_metric_name}", workload.validation_target_value
    for label, evaluations in curves.items():
        axes.plot(evaluations[x], evaluations[metric], marker="o", markersize=3, label=label)
    axes.axhline(target, color="black", linestyle="--", linewidth=1, label="target")
    values = pd.concat([pd.Series([target]), *(evaluations[metric] for evaluations in curves.values())])
    low, high = values.replace([math.inf, -math.inf], math.nan).quantile(
        [1 / 3, 1.0] if workload.higher_is_better else [0.0, 2 / 3]
    )
    axes.set_ylim(low - 0.1 * (high - low) - 1e-3, high + 0.1 * (high - low) + 1e-3)
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)


# Suites


def write_report(root: Path, folder: Path, reference: str = "nadamw") -> str:
    """Write README.md, tables, and plots of the suite in `root` to `folder`, and return the table of scores as text.

    Speed-ups are over `reference`, or over the first submission if the suite does not have it. Raise LogError if no trial was
    evaluated.
    """
    trials = read_suite(root)
    if trials.empty:
        raise LogError("\n".join(["no trial was evaluated", *list_errors(root)]))
    targets = read_targets(None)
    comparisons: dict[str, Comparison] = {}
    for by in MEASURES:
        studies, problems = read_studies(root, targets, by, "best")
        times = median_times(studies)
        limits = miss_limits(targets, studies.groupby("workload")["end"].max(), by)
        comparisons[by] = compare(times, limits, reference if reference in times.index else times.index[0])
        write_comparison(comparisons[by], by, folder / by)
    plot_suite(trials, folder / "curves.png")
    scores = pd.concat({f"by {by}": comparison.scores for by, comparison in comparisons.items()}, axis=1)
    scores.columns = [f"{name} {by}" for by, name in scores.columns]
    scores.insert(
        0, "targets reached", comparisons["steps"].times.apply(lambda row: f"{row.lt(math.inf).sum()} of {len(row)}", axis=1)
    )
    scores = scores.sort_values("score by steps", ascending=False).round(3)
    (folder / "README.md").write_text(format_page(scores, comparisons, trials, [str(problem) for problem in problems], root))
    return str(scores.to_string())


def read_suite(root: Path) -> pd.DataFrame:
    """Return one row per trial of a suite, with the columns submission, study, workload, trial, point (hyperparameters),
    evaluations, best (validation metric), and steps (to the target; inf if not reached).
    """
    rows = []
    for path in sorted(root.glob("*/study_*/*_pytorch/trial_*/eval_measurements.csv")):
        submission, study, run, trial = path.parent.relative_to(root).parts
        workload = workload_class(run.removesuffix("_pytorch"))
        try:
            evaluations = pd.read_csv(path)
            metric = evaluations[f"validation/{workload.target_metric_name}"]
        except (ValueError, KeyError):
            continue  # read_studies reports it
        hit = first_reaching_target(workload, evaluations)
        rows.append(
            {
                "submission": submission,
                "study": study,
                "workload": run.removesuffix("_pytorch"),
                "trial": trial,
                "point": json.loads((path.parent / "hparams.json").read_text()),
                "evaluations": evaluations,
                "best": metric.max() if workload.higher_is_better else metric.min(),
                "steps": math.inf if hit is None else hit["global_step"],
            }
        )
    return pd.DataFrame(rows)


def best_trial(trials: pd.DataFrame) -> pd.Series:
    """Return the trial with the fewest steps to the target; ties, or trials that all miss it, go by the best metric."""
    sign = -1 if workload_class(trials["workload"].iloc[0]).higher_is_better else 1
    return trials.iloc[np.lexsort([sign * trials["best"], trials["steps"]])[0]]


def plot_suite(trials: pd.DataFrame, path: Path) -> None:
    """Plot one panel per workload: the validation metric of each submission's best trial against steps."""
    workloads = sorted(trials["workload"].unique())
    height = math.ceil(len(workloads) / 2)
    figure, panels = plt.subplots(height, 2, figsize=(11, 3.2 * height), layout="constrained", squeeze=False)
    for axes, name in zip_longest(panels.flat, workloads):
        if name is None:
            axes.set_axis_off()
            continue
        groups = trials[trials["workload"] == name].groupby("submission")
        draw_curves(axes, workload_class(name), {key: best_trial(group)["evaluations"] for key, group in groups}, "global_step")
        axes.set(xlabel="steps", title=name)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def format_page(
    scores: pd.DataFrame, comparisons: dict[str, Comparison], trials: pd.DataFrame, problems: list[str], root: Path
) -> str:
    """Return the Markdown report of a suite; it links to the plots that `write_report` saves in the same folder."""
    order = list(scores.index)
    best = trials.groupby(["workload", "submission"])[trials.columns].apply(best_trial)
    rates = best["point"].map(lambda point: f"{point['learning_rate']:g}" if "learning_rate" in point else "-")
    metrics = best["best"].map("{:.4g}".format).unstack().reindex(columns=order)
    metrics.insert(0, "target", [format_target(workload_class(name)) for name in metrics.index])
    return "\n".join(
        [
            "# The laptop suite",
            "",
            describe_suite(root, trials),
            "",
            scores.to_markdown(),
            "",
            "The score is the area under the performance profile; it is 1 for a submission that is fastest on every workload.",
            "",
            "![profile by steps](steps/profile.png)",
            "",
            "![profile by time](time/profile.png)",
            "",
            *format_table("Steps to target", comparisons["steps"].times[list(metrics.index)].T[order], "{:.0f}"),
            *format_table("Seconds to target", comparisons["time"].times[list(metrics.index)].T[order], "{:.1f}"),
            *format_table("Best validation metric of the best trial", metrics.fillna("-")),
            *format_table("Learning rate of the best trial", rates.unstack().reindex(columns=order).fillna("-")),
            "## Curves of the best trials",
            "",
            "![validation metric over steps](curves.png)",
            "",
            "## What failed",
            "",
            *([f"- {text}" for text in (*list_errors(root), *problems)] or ["Nothing."]),
            "",
        ]
    )


def format_target(workload: Workload) -> str:
    """Return the validation target as text, such as "accuracy > 0.98"."""
    return f"{workload.target_metric_name} {'>' if workload.higher_is_better else '<'} {workload.validation_target_value:g}"


def describe_suite(root: Path, trials: pd.DataFrame) -> str:
    """Return the date, the machine, and the size of a suite as text; date and machine are those of one of its trials."""
    meta = json.loads(next(root.glob("*/study_*/*/trial_*/meta_data_0.json")).read_text())
    return (
        f"{meta['date']}, {meta['cpu']}, {meta['cpu_count']} cores, torch {meta['torch_version']}. "
        f"Studies: {trials['study'].nunique()}. Trials per submission and workload: {trials['trial'].nunique()}; the best one "
        f"counts. Threads per trial: {meta['num_threads']}. Seconds are training time, measured while other trials run on the "
        "same cores, so steps are the more reliable measure."
    )


def list_errors(root: Path) -> list[str]:
    """Return the trials of a suite that ended in an error, each as "FOLDER: ERROR"."""
    paths = sorted(root.glob("*/study_*/*/trial_*/error.txt"))
    return [f"{path.parent.relative_to(root)}: {last_line(path)}" for path in paths]


def format_table(title: str, values: pd.DataFrame, number_format: str | None = None) -> list[str]:
    """Return a heading and a Markdown table as lines. With `number_format`, values that are not finite become dashes."""
    if number_format:
        values = values.map(lambda x: number_format.format(x) if math.isfinite(x) else "-")
    return [f"## {title}", "", values.to_markdown(disable_numparse=True), ""]


def last_line(path: Path) -> str:
    """Return the last line of a file; in a traceback this is the error."""
    return path.read_text().strip().splitlines()[-1]
