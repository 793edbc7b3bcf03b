"""AlgoPerf's score: time to target on each workload, the performance profile, and the area under it.

`python -m runner.score --submission_directory=DIR --output_dir=OUT` reads the folders
DIR/SUBMISSION/study_K/WORKLOAD_FRAMEWORK/trial_N/ written by AlgoPerf's runner or this one; `--times_csv=FILE` reads a table of
times instead. The rules are from AlgoPerf's documentation and scoring code, version 0.6, and 0.5 for held-out workloads.
"""

import json
import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from absl import app, flags

from .plots import colors, plot_profile, plot_times
from .workloads import WORKLOADS, workload_class

MAX_RATIO = 4.0  # a time above this multiple of the workload's best time is a miss
NUM_TAUS = 100
LOWER_IS_BETTER = ("loss", "wer", "rmse")
MEASURES = {"time": "score", "steps": "global_step"}  # value of --by -> column; AlgoPerf's column `score` holds seconds

FLAGS = flags.FLAGS


# From times to scores. A table of times has one row per submission and one column per workload; inf is a miss.


def without_stragglers(times: pd.DataFrame) -> pd.DataFrame:
    """Return the times, with inf in place of those above MAX_RATIO times the workload's best."""
    return times.mask(times > MAX_RATIO * times.min(), np.inf)


def with_held_out(times: pd.DataFrame, held_out: Sequence[str]) -> pd.DataFrame:
    """Return the times on base workloads, with a miss where the held-out variant is missed (version 0.5).

    In this order: a held-out time becomes inf where the base time is inf; times above MAX_RATIO times the best become inf; a
    base time becomes inf where the held-out time is inf. The base of a variant is the workload with the longest name that
    starts the variant's name.
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
    """Return rho(tau), the share of workloads on which time / best time <= tau, for each tau from 1 to MAX_RATIO (rows) and
    each submission (columns).
    """
    ratios = without_stragglers(times) / times.min()
    taus = np.linspace(1.0, MAX_RATIO, NUM_TAUS)
    return pd.DataFrame([(ratios <= tau).mean(axis=1) for tau in taus], index=pd.Index(taus, name="tau"))


def scores(profile: pd.DataFrame) -> pd.Series:
    """Return the area under each profile divided by MAX_RATIO - 1, best first; 1 is the best on every workload."""
    area = np.trapezoid(profile.to_numpy(), profile.index.to_numpy(), axis=0)
    return pd.Series(area / (MAX_RATIO - 1), index=profile.columns, name="score").sort_values(ascending=False)


def speed_ups(times: pd.DataFrame, limits: pd.Series, reference: str) -> pd.Series:
    """Return the geometric mean over workloads of (reference's time) / (submission's time); a miss counts as the limit + 1."""
    filled = times.apply(lambda row: row.where(np.isfinite(row), limits[times.columns] + 1), axis=1)
    ratios = filled.loc[reference] / filled
    return np.exp(np.log(ratios).mean(axis=1)).rename(f"speed-up over {reference}")


class Comparison(NamedTuple):
    """Scores of submissions, and the tables behind them."""

    times: pd.DataFrame  # as given
    counted: pd.DataFrame  # times that count, on base workloads only: see with_held_out
    profile: pd.DataFrame
    scores: pd.DataFrame  # score and, if limits are known, speed-up; best submission first


def compare(times: pd.DataFrame, limits: pd.Series, reference: str, held_out: Sequence[str] = ()) -> Comparison:
    """Score a table of times. `limits` holds what a miss counts as; speed-ups cover only workloads with a limit."""
    counted = with_held_out(times, held_out)
    profile = performance_profile(counted)
    table = pd.DataFrame(scores(profile))
    with_limit = limits.dropna().index.intersection(counted.columns)
    if len(with_limit):
        table = table.join(speed_ups(times[with_limit], limits, reference))
    return Comparison(times, counted, profile, table)


# From logs to times


class Target(NamedTuple):
    """A workload's validation metric, the value it must reach, and the time budget in seconds, if known."""

    metric: str
    value: float
    budget: float | None


class LogError(ValueError):
    """A part of the logs cannot be scored."""


def read_targets(path: Path | None) -> dict[str, Target]:
    """Return the targets in a file like `algoperf_targets.json`, or without a path those of AlgoPerf and the laptop suite."""
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
    """Return {"value": time or steps to the target, "evaluations": number of evaluations before that, "end": time or steps of
    the last evaluation}; the first two are inf if the target was not reached. Raise LogError for an unreadable trial.
    """
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


def numbered_entries(folder: Path, prefix: str) -> list[Path]:
    """Return the entries PREFIX0, PREFIX1, ... of a folder in order of their numbers."""
    found = [path for path in folder.glob(f"{prefix}*") if path.name.removeprefix(prefix).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(prefix)))


def read_studies(root: Path, targets: dict[str, Target], by: str, choice: str) -> tuple[pd.DataFrame, list[LogError]]:
    """Return one row per submission, study, and workload with the best trial's time or steps to the target, and the problems.

    The best trial is the one with the least time or steps, or with choice "evals" the first one with the fewest evaluations to
    the target, as in AlgoPerf's published code. Raise LogError if there are no logs at all.
    """
    rows: list[dict[str, Any]] = []
    problems: list[LogError] = []
    for submission in sorted(path for path in root.iterdir() if path.is_dir()):
        for study in numbered_entries(submission, "study_"):
            for folder in sorted(path for path in study.iterdir() if path.is_dir()):
                workload = folder.name.rsplit("_", 1)[0]
                if workload not in targets:
                    problems.append(LogError(f"{folder}: no target for the workload {workload!r}; --workload_targets sets one"))
                    continue
                trials = []
                for trial in numbered_entries(folder, "trial_"):
                    try:
                        trials.append(read_trial(trial, targets[workload], by))
                    except LogError as problem:
                        problems.append(problem)
                best = min(trials, key=lambda x: x["evaluations" if choice == "evals" else "value"], default={"value": np.inf})
                ends = [trial["end"] for trial in trials]
                row = {"submission": submission.name, "study": study.name, "workload": workload, "value": best["value"]}
                rows.append({**row, "trials": len(numbered_entries(folder, "trial_")), "end": max(ends, default=np.nan)})
    if not rows:
        raise LogError(f"{root} contains no logs; they must be in SUBMISSION/study_K/WORKLOAD_FRAMEWORK/trial_N")
    studies = pd.DataFrame(rows)
    for (submission_name, workload), group in studies.groupby(["submission", "workload"]):
        if group["trials"].nunique() > 1:
            counts = dict(zip(group["study"], group["trials"], strict=True))
            problems.append(LogError(f"{submission_name} has studies with different numbers of trials on {workload}: {counts}"))
    return studies, problems


def median_times(studies: pd.DataFrame) -> pd.DataFrame:
    """Return the median time over studies; a workload that a submission did not run on is a miss."""
    return studies.pivot_table(index="submission", columns="workload", values="value", aggfunc="median").fillna(np.inf)


def miss_limits(targets: dict[str, Target], ends: pd.Series, by: str) -> pd.Series:
    """Return what a miss counts as: the workload's budget if `by` is "time" and it is known, else the latest end of a trial."""
    budgets = pd.Series({name: target.budget for name, target in targets.items() if target.budget and by == "time"})
    return pd.concat([budgets, ends[~ends.index.isin(budgets.index)]])


def read_times(path: Path) -> pd.DataFrame:
    """Read a table of times: submissions in the first column, then one column per workload; an empty cell or inf is a miss."""
    return pd.read_csv(path, index_col=0).astype(float).fillna(np.inf)


# The command


def write_comparison(comparison: Comparison, by: str, folder: Path) -> None:
    """Write the tables as CSV files and the plots as PNG files to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("times", "profile", "scores"):
        getattr(comparison, name).to_csv(folder / f"{name}.csv")
    color = colors(comparison.scores.index)
    plot_profile(comparison.profile, comparison.scores["score"], by, color, folder / "profile.png")
    plot_times(comparison.counted.loc[comparison.scores.index], by, color, folder / "times.png")


def define_flags() -> None:
    """Define the flags of this command."""
    flags.DEFINE_string("submission_directory", None, "folder that holds SUBMISSION/study_K/WORKLOAD_FRAMEWORK/trial_N")
    flags.DEFINE_string(
        "times_csv", None, "table of times to read instead: one row per submission, one column per workload; inf or empty: miss"
    )
    flags.DEFINE_string("output_dir", None, "folder for the CSV and PNG files", required=True)
    flags.DEFINE_enum("by", "time", list(MEASURES), "what to compare")
    flags.DEFINE_enum(
        "trial_choice", "best", ["best", "evals"], "trial of a study that counts: fastest, or fewest evaluations to the target"
    )
    flags.DEFINE_list("held_out", [], "held-out workloads; a miss on one is a miss on its base workload")
    flags.DEFINE_string("workload_targets", None, "JSON file with targets, in the format of runner/algoperf_targets.json")
    flags.DEFINE_string("reference", None, "submission to compute speed-ups over (default: the first in the table)")
    flags.DEFINE_boolean("strict", False, "fail if any part of the logs cannot be scored")


def main(_: Sequence[str]) -> None:
    """Read times, score them, and write tables and plots."""
    if (FLAGS.submission_directory is None) == (FLAGS.times_csv is None):
        sys.exit("error: pass exactly one of --submission_directory and --times_csv")
    try:
        targets = read_targets(Path(FLAGS.workload_targets) if FLAGS.workload_targets else None)
        ends, problems = pd.Series(dtype=float), list[LogError]()
        if FLAGS.times_csv:
            times = read_times(Path(FLAGS.times_csv))
        else:
            studies, problems = read_studies(Path(FLAGS.submission_directory), targets, FLAGS.by, FLAGS.trial_choice)
            times, ends = median_times(studies), studies.groupby("workload")["end"].max()
        if unknown := set(FLAGS.held_out) - set(times.columns):
            raise LogError(f"--held_out has unknown workloads {sorted(unknown)}; it may have {sorted(times.columns)}")
        if (reference := FLAGS.reference or times.index[0]) not in times.index:
            raise LogError(f"--reference is {reference!r}; it must be one of {', '.join(times.index)}")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    for problem in problems:
        print(f"not scored: {problem}")
    if problems and FLAGS.strict:
        sys.exit(f"error: --strict is set, and {len(problems)} parts of the logs could not be scored")

    comparison = compare(times, miss_limits(targets, ends, FLAGS.by), reference, FLAGS.held_out)
    output = Path(FLAGS.output_dir)
    write_comparison(comparison, FLAGS.by, output)
    unit = "seconds" if FLAGS.by == "time" else "steps"
    print(f"{unit} to target\n{times.round(1).T.to_string()}\n\n{comparison.scores.round(4).to_string()}\n")
    print(f"tables and plots: {output}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
