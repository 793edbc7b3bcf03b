"""AlgoPerf's score: time to target on each workload, the performance profile, and the area under it.

`python -m runner.score --submission_directory=DIR --output_dir=OUT` reads DIR/SUBMISSION/study_K/WORKLOAD_FRAMEWORK/trial_N/,
as AlgoPerf's runner and ours write it; `--times_csv=FILE` a ready table instead. The rules are those of AlgoPerf's
documentation and scoring code, version 0.6; for held-out workloads 0.5.
"""

import json
import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from absl import app, flags

from .workloads import WORKLOADS, workload_class

MAX_RATIO = 4.0  # a time beyond this multiple of the best submission's is a miss
NUM_TAUS = 100
LOWER_IS_BETTER = ("loss", "wer", "rmse")
MEASURES = {"time": "score", "steps": "global_step"}  # --by -> column; AlgoPerf's column `score` holds seconds

FLAGS = flags.FLAGS


# Times -> score. A table of times has a row for each submission and a column for each workload; inf is a miss.


def without_stragglers(times: pd.DataFrame) -> pd.DataFrame:
    """Times with those above MAX_RATIO x the workload's best made inf."""
    return times.mask(times > MAX_RATIO * times.min(), np.inf)


def with_held_out(times: pd.DataFrame, held_out: Sequence[str]) -> pd.DataFrame:
    """The times on base workloads that count when each must hold on its held-out variant too; the rule of version 0.5.

    In this order: a held-out time becomes inf where its base's is; stragglers become inf; a base time becomes inf where its
    held-out variant's is. The base of a variant is the longest workload name that its own name begins with.
    """
    base = [name for name in times.columns if name not in held_out]
    base_of = {variant: max((name for name in base if variant.startswith(name)), key=len) for variant in held_out}
    times = times.copy()
    for variant, name in base_of.items():
        times[variant] = times[variant].mask(np.isinf(times[name]), np.inf)
    times = without_stragglers(times)
    for variant, name in base_of.items():
        times[name] = times[name].mask(np.isinf(times[variant]), np.inf)
    return times[base]


def performance_profile(times: pd.DataFrame) -> pd.DataFrame:
    """rho(tau), the share of workloads on which a submission is within tau of the best: a row for each tau, 1 to MAX_RATIO."""
    ratios = without_stragglers(times) / times.min()
    taus = np.linspace(1.0, MAX_RATIO, NUM_TAUS)
    return pd.DataFrame([(ratios <= tau).mean(axis=1) for tau in taus], index=pd.Index(taus, name="tau"))


def scores(profile: pd.DataFrame) -> pd.Series:
    """The area under each submission's profile over its width: 1 for the best on every workload."""
    area = np.trapezoid(profile.to_numpy(), profile.index.to_numpy(), axis=0)
    return pd.Series(area / (MAX_RATIO - 1), index=profile.columns, name="score").sort_values(ascending=False)


def speed_ups(times: pd.DataFrame, limits: pd.Series, reference: str) -> pd.Series:
    """The geometric mean over workloads of the reference's time over each submission's; a miss counts as the limit + 1."""
    filled = times.apply(lambda row: row.where(np.isfinite(row), limits[times.columns] + 1), axis=1)
    ratios = filled.loc[reference] / filled
    return np.exp(np.log(ratios).mean(axis=1)).rename(f"speed-up over {reference}")


class Comparison(NamedTuple):
    """What a table of times comes to."""

    times: pd.DataFrame  # as given
    counted: pd.DataFrame  # what counts of them, without held-out workloads
    profile: pd.DataFrame
    scores: pd.DataFrame  # the score and, where limits are known, the speed-up; the best submission first


def compare(times: pd.DataFrame, limits: pd.Series, reference: str, held_out: Sequence[str] = ()) -> Comparison:
    """The profile, the scores, and speed-ups over the reference on the workloads whose limit, the value of a miss, is known."""
    counted = with_held_out(times, held_out)
    profile = performance_profile(counted)
    table = pd.DataFrame(scores(profile))
    with_limit = limits.dropna().index.intersection(counted.columns)
    if len(with_limit):
        table = table.join(speed_ups(times[with_limit], limits, reference))
    return Comparison(times, counted, profile, table)


# Logs -> times.


class Target(NamedTuple):
    """What a workload's validation metric has to reach, and the time budget where there is one."""

    metric: str
    value: float
    budget: float | None


class LogError(ValueError):
    """Something in the logs that cannot be scored."""


def read_targets(path: Path | None) -> dict[str, Target]:
    """The targets of this project's workloads and AlgoPerf's, or those of a file of the form of `algoperf_targets.json`."""
    entries = json.loads((path or Path(__file__).with_name("algoperf_targets.json")).read_text())
    targets = {
        name: Target(entry["target_metric_name"], entry["validation_target_value"], entry.get("max_allowed_runtime_sec"))
        for name, entry in entries.items()
    }
    for name in () if path else WORKLOADS:
        workload = workload_class(name)
        metric, value = workload.target_metric_name, workload.validation_target_value
        targets[name] = Target(metric, value, workload.max_allowed_runtime_sec)
    return targets


def read_trial(folder: Path, target: Target, by: str) -> dict[str, float]:
    """What the target took (inf: not reached), after how many evaluations, and where the trial ended. Raises LogError."""
    path = folder / "eval_measurements.csv"
    try:
        text = path.read_text()
        table = pd.read_csv(StringIO(text))
    except (OSError, ValueError) as error:
        raise LogError(f"{folder} has no evaluations to read: {error}") from error
    if not text.endswith("\n") or table.empty:
        raise LogError(f"{path} is empty or half-written")
    metric, column = f"validation/{target.metric}", MEASURES[by]
    if missing := {metric, column} - set(table.columns):
        raise LogError(f"{path} lacks the columns {sorted(missing)}")
    better = table[metric] < target.value if target.metric in LOWER_IS_BETTER else table[metric] > target.value
    first = int(better.to_numpy().argmax()) if better.any() else None
    value = np.inf if first is None else float(table[column][first])
    return {"value": value, "evaluations": np.inf if first is None else first, "end": float(table[column].iloc[-1])}


def numbered(folder: Path, prefix: str) -> list[Path]:
    """The folder's entries PREFIX0, PREFIX1, ... in the order of their numbers."""
    found = [path for path in folder.glob(f"{prefix}*") if path.name.removeprefix(prefix).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(prefix)))


def read_studies(root: Path, targets: dict[str, Target], by: str, choice: str) -> tuple[pd.DataFrame, list[LogError]]:
    """A row for each submission, study and workload, with what the target took in the best trial; and what could not be read.

    The best trial is the one with the least time or steps; with choice "evals" the one with the fewest evaluations, the first
    of several, as AlgoPerf's published code has it.
    """
    rows: list[dict[str, Any]] = []
    problems: list[LogError] = []
    for submission in sorted(path for path in root.iterdir() if path.is_dir()):
        for study in numbered(submission, "study_"):
            for folder in sorted(path for path in study.iterdir() if path.is_dir()):
                workload = folder.name.rsplit("_", 1)[0]
                if workload not in targets:
                    problems.append(LogError(f"{folder}: there is no target for the workload {workload!r}"))
                    continue
                trials = []
                for trial in numbered(folder, "trial_"):
                    try:
                        trials.append(read_trial(trial, targets[workload], by))
                    except LogError as problem:
                        problems.append(problem)
                best = min(trials, key=lambda x: x["evaluations" if choice == "evals" else "value"], default={"value": np.inf})
                ends = [trial["end"] for trial in trials]
                row = {"submission": submission.name, "study": study.name, "workload": workload, "value": best["value"]}
                rows.append({**row, "trials": len(numbered(folder, "trial_")), "end": max(ends, default=np.nan)})
    if not rows:
        raise LogError(f"{root} holds no SUBMISSION/study_K/WORKLOAD_FRAMEWORK folders")
    studies = pd.DataFrame(rows)
    for (submission_name, workload), group in studies.groupby(["submission", "workload"]):
        if group["trials"].nunique() > 1:
            counts = dict(zip(group["study"], group["trials"], strict=True))
            problems.append(LogError(f"{submission_name} has studies with different numbers of trials on {workload}: {counts}"))
    return studies, problems


def median_times(studies: pd.DataFrame) -> pd.DataFrame:
    """The median over studies; a workload on which a submission was not run is a miss."""
    return studies.pivot_table(index="submission", columns="workload", values="value", aggfunc="median").fillna(np.inf)


def miss_limits(targets: dict[str, Target], ends: pd.Series, by: str) -> pd.Series:
    """What a miss counts as: by time the workload's budget; otherwise, and where none is known, the latest end of a trial."""
    budgets = pd.Series({name: target.budget for name, target in targets.items() if target.budget and by == "time"})
    return pd.concat([budgets, ends[~ends.index.isin(budgets.index)]])


def read_times(path: Path) -> pd.DataFrame:
    """A table of times: submissions in the first column, a column for each workload; an empty cell or inf is a miss."""
    return pd.read_csv(path, index_col=0).astype(float).fillna(np.inf)


# Pictures and the command.


def plot_profile(profile: pd.DataFrame, by: str, path: Path) -> None:
    """Draw rho(tau) of each submission, best score first."""
    ranking = scores(profile)
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    for name, color in zip(ranking.index, colors(len(ranking)), strict=True):
        axes.step(profile.index, profile[name], where="post", color=color, label=f"{ranking[name]:.4f}  {name}")
    axes.set(
        xlabel=f"tau: {by} to target over the best submission's", ylabel="share of workloads within tau", ylim=(-0.02, 1.02)
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", title="score")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_times(times: pd.DataFrame, by: str, path: Path) -> None:
    """A bar for each workload and submission, over the workload's best; none for a miss."""
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    (times / times.min()).replace(np.inf, np.nan).T.plot.bar(ax=axes, width=0.85, legend=False, color=colors(len(times)))
    axes.set(xlabel="", ylabel=f"{by} to target over the best", title="no bar: target not reached")
    axes.axhline(1, color="black", linewidth=0.8)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(comparison: Comparison, by: str, folder: Path) -> None:
    """Write the tables as CSV and the pictures as PNG into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("times", "profile", "scores"):
        getattr(comparison, name).to_csv(folder / f"{name}.csv")
    plot_profile(comparison.profile, by, folder / "profile.png")
    plot_times(comparison.counted.loc[comparison.scores.index], by, folder / "times.png")


def colors(count: int) -> list[tuple[float, ...]]:
    """As many colours, in the same order every time."""
    return [plt.colormaps["tab20"](i % 20) for i in [*range(0, 20, 2), *range(1, 20, 2)][:count]]


def define_flags() -> None:
    """The flags of this command."""
    flags.DEFINE_string("submission_directory", None, "SUBMISSION/study_K/WORKLOAD_FRAMEWORK/trial_N folders")
    flags.DEFINE_string(
        "times_csv", None, "a ready table instead: a row per submission, a column per workload, inf or empty: miss"
    )
    flags.DEFINE_string("output_dir", None, "where CSV and PNG files go", required=True)
    flags.DEFINE_enum("by", "time", list(MEASURES), "what to compare")
    flags.DEFINE_enum("trial_choice", "best", ["best", "evals"], "the trial of a study that counts: see read_studies")
    flags.DEFINE_list("held_out", [], "held-out workloads, which their base workloads must hold on too")
    flags.DEFINE_string("workload_targets", None, "JSON with targets, in the form of runner/algoperf_targets.json")
    flags.DEFINE_string("reference", None, "the submission that speed-ups are over; the first in the table by default")
    flags.DEFINE_boolean("strict", False, "fail on anything in the logs that cannot be scored")


def main(_: Sequence[str]) -> None:
    """Read times, score them, write tables and pictures."""
    if (FLAGS.submission_directory is None) == (FLAGS.times_csv is None):
        sys.exit("error: give either --submission_directory or --times_csv")
    try:
        targets = read_targets(Path(FLAGS.workload_targets) if FLAGS.workload_targets else None)
        ends, problems = pd.Series(dtype=float), list[LogError]()
        if FLAGS.times_csv:
            times = read_times(Path(FLAGS.times_csv))
        else:
            studies, problems = read_studies(Path(FLAGS.submission_directory), targets, FLAGS.by, FLAGS.trial_choice)
            times, ends = median_times(studies), studies.groupby("workload")["end"].max()
        if unknown := set(FLAGS.held_out) - set(times.columns):
            raise LogError(f"--held_out names {sorted(unknown)}; the workloads are {sorted(times.columns)}")
        if (reference := FLAGS.reference or times.index[0]) not in times.index:
            raise LogError(f"--reference is {reference!r}; the submissions are {', '.join(times.index)}")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    for problem in problems:
        print(f"not scored: {problem}")
    if problems and FLAGS.strict:
        sys.exit(f"error: --strict, and {len(problems)} things could not be scored")

    comparison = compare(times, miss_limits(targets, ends, FLAGS.by), reference, FLAGS.held_out)
    output = Path(FLAGS.output_dir)
    write(comparison, FLAGS.by, output)
    unit = "seconds" if FLAGS.by == "time" else "steps"
    print(f"{unit} to target\n{times.round(1).T.to_string()}\n\n{comparison.scores.round(4).to_string()}\n")
    print(f"tables and pictures: {output}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
