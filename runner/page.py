"""The page of a suite: scores, ratios with intervals, steps to target, the best points, and curves."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from .files import replacing
from .plots import Curves, colors, plot_curves, plot_intervals, plot_profile
from .ratios import ALL, format_ratio, interval, ratios, told_apart
from .report import format_target
from .score import performance_profile, scores
from .study import (
    EVAL_EVERY,
    FINALISTS,
    FIRST_SEED,
    SELECTION_SEEDS,
    Entry,
    best_trial,
    read_curve,
    read_table,
    reported,
    steps_and_limits,
)
from .workloads import short_name, workload_class

EXPLANATION = """\
The score is AlgoPerf's formula, the area under the performance profile, on median steps over studies; it is 1 for a submission
that is fastest on every workload. Unlike there, points are not tuned again in each study. Next to it is the mean of the scores
of single studies. Ratios of steps to {base}'s are geometric means over workloads and studies. A miss counts as the step hint:
the ratio is then a bound (> or <), or if runs of both missed, one of steps up to the hint (~). Brackets are 95 % intervals,
Student's t over studies; those of ratios are paired by seed. They cover the seeds only, not the choice of points or
workloads. Training time is steps times the seconds per step of the submission's fastest run on the workload, since other work
on the machine slows runs down."""


def fastest(table: pd.DataFrame) -> pd.Series:
    """Return the least seconds per step of each submission on each workload."""
    per_step = table.assign(seconds_per_step=table["seconds"] / table["steps"])
    return per_step.groupby(["submission", "workload"])["seconds_per_step"].min()


def medians_of(steps: pd.DataFrame) -> pd.DataFrame:
    """Return the medians over studies, one row per submission and one column per workload. A run that failed is a miss."""
    return steps.fillna(np.inf).groupby(level="workload", sort=False).median().T


def score_table(steps: pd.DataFrame) -> pd.DataFrame:
    """Return each submission's score, of its median steps over studies, and the mean and the t interval of the scores of single
    studies; best first.
    """
    single = pd.DataFrame(
        {study: scores(performance_profile(medians_of(rows))) for study, rows in steps.groupby(level="study")}
    )
    table = pd.DataFrame({"score": scores(performance_profile(medians_of(steps))), "mean": single.mean(axis=1)})
    table[["low", "high"]] = np.clip([interval(single.loc[name]) for name in table.index], 0, 1)
    return table.sort_values("score", ascending=False)


def with_interval(value: float, low: float, high: float) -> str:
    """Return a score with its interval as text."""
    return f"{value:.3f}" if math.isnan(low) else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def format_steps(steps: pd.Series, limits: pd.Series) -> dict[str, str]:
    """Return the median and the range of steps over studies as text, per workload; a miss is "> limit"."""
    texts = {}
    for workload, limit in limits.items():
        values = steps.loc[workload]
        shown = [f"{x:.0f}" if math.isfinite(x) else f"> {limit:.0f}" for x in (values.median(), values.min(), values.max())]
        texts[str(workload)] = shown[0] if len(values) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"
        if values.isna().any():
            texts[str(workload)] = "failed"
    return texts


def describe_pairs(apart: dict[tuple[str, str], bool]) -> str:
    """Return which pairs of submissions are told apart as text; `apart` is from `told_apart`."""
    if not apart:
        return "No pair of submissions can be compared: that takes two studies, and two submissions that did not fail."
    equal = "; ".join(f"{a} and {b}" for (a, b), differ in apart.items() if not differ) or "none"
    return (
        f"Told apart by their steps over all workloads: {sum(apart.values())} of {len(apart)} pairs (paired t tests, false "
        f"discovery rate of 5 % over all pairs that did not fail). Not told apart: {equal}."
    )


def write_page(
    folder: Path, entries: Sequence[Entry], workloads: Sequence[str], count: int, base: str, failures: Sequence[str]
) -> str:
    """Write README.md and pictures of the studies in runs.csv to the folder, and return the table of scores as text.

    Ratios are to the entry named `base`. Raise ValueError if no run is in the table.
    """
    table = read_table(folder / "runs.csv")
    rows = reported(table, entries, workloads, count)
    if rows.empty:
        raise ValueError("\n".join(["no run finished", *failures]))
    names = [entry.name for entry in entries]
    rows = rows.join(fastest(table), on=["submission", "workload"])
    steps, limits = steps_and_limits(rows, names, workloads, count)
    ratio, summary = ratios(steps, limits, base), score_table(steps)
    order, color = list(summary.index), colors(names)
    plot_profile(performance_profile(medians_of(steps)), summary["score"], "steps", color, folder / "profile.png")
    plot_intervals(ratio.xs(ALL, level="workload").drop(base), base, color, folder / "ratios.png")
    plot_curves(curves(rows, workloads), "steps", color, folder / "curves.png")

    per_workload = pd.DataFrame({name: format_steps(steps[name], limits) for name in order})
    per_workload.insert(0, "target", [format_target(workload_class(workload)) for workload in workloads])
    relative = ratio.apply(format_ratio, axis=1).unstack("submission").loc[workloads, [name for name in order if name != base]]
    shown = score_columns(rows, steps, summary, ratio, base, names, workloads, count)
    paragraphs = [
        "# Steps to target",
        describe(rows, entries, count),
        shown,
        EXPLANATION.format(base=base),
        describe_pairs(told_apart(steps[order], limits)),
        f"![steps over those of {base}](ratios.png)",
        "![performance profile](profile.png)",
        "## Workload by workload",
        "Median steps over studies, with the range. A miss is a bound.",
        per_workload,
        f"## Steps over those of {base}",
        relative,
        "## Best points",
        "Learning rate, and the length of the schedule over the step hint if the point has one.",
        best_points(table, entries, workloads)[order],
        "## Curves of the first study",
        "![validation metric over steps](curves.png)",
        "## What failed",
        "\n".join(f"- {as_code(text)}" for text in failures) or "Nothing.",
    ]
    texts = [x if isinstance(x, str) else x.rename(index=short_name).to_markdown(disable_numparse=True) for x in paragraphs]
    with replacing(folder / "README.md") as partial:
        partial.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return str(shown.to_string())


def score_columns(
    rows: pd.DataFrame,
    steps: pd.DataFrame,
    summary: pd.DataFrame,
    ratio: pd.DataFrame,
    base: str,
    names: Sequence[str],
    workloads: Sequence[str],
    count: int,
) -> pd.DataFrame:
    """Return the table of scores as text, best first. There is a score by time if all runs are from one machine."""
    order, medians = list(summary.index), medians_of(steps)
    columns = {
        "targets reached": [f"{np.isfinite(medians.loc[name]).sum()} of {len(workloads)}" for name in order],
        "runs that reached": [f"{np.isfinite(steps[name]).sum()} of {len(steps)}" for name in order],
        "score": [f"{summary['score'][name]:.3f}" for name in order],
        "of single studies": [with_interval(*summary.loc[name, ["mean", "low", "high"]]) for name in order],
        f"steps / {base}'s": ["1" if name == base else format_ratio(ratio.loc[name, ALL]) for name in order],
    }
    if rows["machine"].nunique() == 1:
        seconds = rows.assign(steps_to_target=rows["steps_to_target"] * rows["seconds_per_step"])
        by_time = score_table(steps_and_limits(seconds, names, workloads, count)[0])
        columns["score by training time"] = [f"{by_time['score'][name]:.3f}" for name in order]
    return pd.DataFrame(columns, index=pd.Index(order, name="submission"))


def as_code(text: str) -> str:
    """Return text of any origin as one line of code in Markdown, which contains no markup."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def as_text(text: str) -> str:
    """Return text of any origin without what could be markup."""
    return re.sub(r"[^\w .,:;@()/+-]", "", str(text))


def describe(rows: pd.DataFrame, entries: Sequence[Entry], count: int) -> str:
    """Return when, where, and how the studies ran as text."""
    dates, machines = (sorted(map(as_text, rows[name].unique())) for name in ("date", "machine"))
    counts = sorted({len(entry.points) for entry in entries})
    first, *others = map(str, SELECTION_SEEDS)
    return (
        f"{' to '.join(sorted({dates[0], dates[-1]}))}; {'; '.join(machines)}. Studies: {count}. Each submission has "
        f"{' or '.join(map(str, counts))} points. They run on seed {first}, the {FINALISTS} best on {' and '.join(others)}; "
        f"the one with the fewest mean steps then runs on the studies' seeds, {FIRST_SEED} to {FIRST_SEED + count - 1}. A "
        "run ends at the target, after the step hint, or where the submission ends it; steps are interpolated between "
        f"evaluations every {EVAL_EVERY} steps."
    )


def best_points(table: pd.DataFrame, entries: Sequence[Entry], workloads: Sequence[str]) -> pd.DataFrame:
    """Return the learning rate and the horizon of each entry's best point on each workload as text."""
    columns: dict[str, list[str]] = {entry.name: [] for entry in entries}
    for entry in entries:
        for workload in workloads:
            trial = best_trial(table, entry, workload)
            found = [] if trial is None else [trial["learning_rate"], trial["horizon"]]
            columns[entry.name].append(", ".join(f"{x:.4g}" for x in found if not math.isnan(x)) or "-")
    return pd.DataFrame(columns, index=pd.Index(workloads, name="workload"))


def curves(rows: pd.DataFrame, workloads: Sequence[str]) -> Curves:
    """Return the curves of the first study, per workload and submission, as `plot_curves` takes them."""
    panels: Curves = {}
    for workload in workloads:
        found = rows[(rows["workload"] == workload) & (rows["seed"] == FIRST_SEED)]
        values = {name: pd.Series(read_curve(curve)) for name, curve in zip(found["submission"], found["curve"], strict=True)}
        panels[short_name(workload)] = (
            workload_class(workload),
            {name: (EVAL_EVERY * (y.index.to_series() + 1), y) for name, y in values.items()},
        )
    return panels
