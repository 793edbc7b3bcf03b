"""Times to target: what `runner.score` scores, read from evaluation logs or from a table.

The rules are those of AlgoPerf's scoring code (mlcommons/submissions_algorithms, June 2026). A trial reaches its target at the
first evaluation whose metric equals the target or is better; nothing is interpolated. In a study, the trial that counts is the
one with the fewest evaluations up to there, which need not be the fastest. In a tie, the one with the least time counts here,
and in AlgoPerf's code the one that the file system lists first. Trials that were never evaluated do not count, nor do studies
without other trials.
"""

import json
import math
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from .files import read_text
from .search_space import is_number
from .workloads import WORKLOADS, workload_class

MEASURES = {"time": "score", "steps": "global_step"}  # value of --by -> column; AlgoPerf's column `score` holds seconds
LOWER_IS_BETTER = ("ce_loss", "ctc_loss", "error_rate", "l1_loss", "loss", "ppl", "rmse", "wer")
HIGHER_IS_BETTER = ("accuracy", "bleu", "mean_average_precision", "ssim")
BENCHMARKS: dict[str, Any] = json.loads(Path(__file__).with_name("algoperf_targets.json").read_text())


class LogError(ValueError):
    """A part of the logs cannot be scored."""


# Benchmarks


class Target(NamedTuple):
    """A workload's validation metric, the value it must reach, and the time budget in seconds, if known."""

    metric: str
    value: float
    higher_is_better: bool
    budget: float | None = None


class Benchmark(NamedTuple):
    """The base workloads, of which a score is the average, their held-out variants, and the targets of both.

    Without base workloads, all workloads that have times count.
    """

    base: list[str]
    held_out: list[str]
    targets: dict[str, Target]


def parse_target(name: str, entry: Any) -> Target:
    """Parse a workload's entry in a file of targets. Raise ValueError for an unknown metric, or a target or budget that
    is no number.
    """
    entry = entry if isinstance(entry, dict) else {}
    metric, value, budget = map(entry.get, ("target_metric_name", "validation_target_value", "max_allowed_runtime_sec"))
    if metric not in (*LOWER_IS_BETTER, *HIGHER_IS_BETTER):
        allowed = ", ".join(sorted((*LOWER_IS_BETTER, *HIGHER_IS_BETTER)))
        raise ValueError(f"the target_metric_name of {name!r} is {metric!r}; it must be one of {allowed}")
    if not is_number(value):
        raise ValueError(f"the validation_target_value of {name!r} is {value!r}; it must be a number")
    if budget is not None and not (is_number(budget) and budget > 0):
        raise ValueError(f"the max_allowed_runtime_sec of {name!r} is {budget!r}; it must be above 0, or left out")
    return Target(metric, value, metric in HIGHER_IS_BETTER, budget)


def parse_benchmark(content: Any) -> Benchmark:
    """Parse targets in AlgoPerf's format, or an object with workloads only: {"wmt": {"target_metric_name": ...}, ...}.

    AlgoPerf's has "workloads", such an object, and the lists "base_workloads" and "held_out_workloads". Raise ValueError for
    anything else.
    """
    if isinstance(content, dict) and "workloads" not in content:
        content = {"base_workloads": [], "held_out_workloads": [], "workloads": content}
    if not isinstance(content, dict) or not isinstance(content["workloads"], dict) or not content["workloads"]:
        raise ValueError('it must be an object with an entry for each workload, or have one under "workloads"')
    targets = {name: parse_target(name, entry) for name, entry in content["workloads"].items()}
    for key in ("base_workloads", "held_out_workloads"):
        names = content.get(key)
        if not isinstance(names, list) or any(name not in list(targets) for name in names):
            raise ValueError(f"{key} is {names!r}; it must be a list of names in its workloads: {', '.join(targets)}")
    return Benchmark(content["base_workloads"], content["held_out_workloads"], targets)


def read_targets(path: Path) -> Benchmark:
    """Return the benchmark in a file of targets. Raise ValueError for another kind of file."""
    try:
        return parse_benchmark(json.loads(read_text(path)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no file of targets: {error}") from error


def all_targets() -> Benchmark:
    """Return the newest targets of AlgoPerf's workloads, and those of the laptop suite; no base workloads."""
    targets = {name: target for version in BENCHMARKS.values() for name, target in parse_benchmark(version).targets.items()}
    for name in WORKLOADS:
        w = workload_class(name)
        targets[name] = Target(w.target_metric_name, w.validation_target_value, w.higher_is_better, w.max_allowed_runtime_sec)
    return Benchmark([], [], targets)


# Logs


class Logs(NamedTuple):
    """What a folder of logs holds."""

    trials: pd.DataFrame  # one row per evaluated trial of a scored workload: see `trial_folders` and `read_trial`
    notes: list[str]  # what AlgoPerf's code leaves out, too
    errors: list[str]  # trials that cannot be scored


def trial_folders(root: Path) -> pd.DataFrame:
    """Return the folders root/SUBMISSION/STUDY/WORKLOAD_FRAMEWORK/trial_N, with columns submission, study, folder, trial, path,
    and workload. Names that begin with a dot, such as .git, are left out.
    """
    found = sorted(path for path in root.glob("*/*/*/trial_*") if path.name.removeprefix("trial_").isdigit())
    rows = [(*path.relative_to(root).parts, path) for path in found]
    rows = [row for row in rows if not any(str(part).startswith(".") for part in row[:4])]
    table = pd.DataFrame(rows, columns=["submission", "study", "folder", "trial", "path"], dtype=object)
    check_names(table[["submission", "study", "folder"]].stack(), root)
    return table.assign(workload=table["folder"].str.replace(r"_(jax|pytorch)$", "", regex=True))


def check_names(names: Iterable[str], path: Path) -> None:
    """Raise LogError for a name with line breaks or codes that a terminal obeys."""
    if odd := sorted({name for name in names if not name.isprintable()}):
        raise LogError(f"{path} has the names {odd}; each must consist of printable characters: rename them")


def numbers(table: pd.DataFrame, column: str, path: Path) -> pd.Series:
    """Return a column as numbers. Raise LogError for text, such as a repeated header."""
    values = pd.to_numeric(table[column], errors="coerce")
    if (text := values.isna() & table[column].notna()).any():
        row = int(text.argmax())
        raise LogError(f"{path}: {column} of row {row + 1} is {table[column][row]!r}; it must be a number: correct the row")
    return values


def read_trial(path: Path, target: Target, by: str) -> dict[str, Any]:
    """Read eval_measurements.csv of a trial. Raise LogError if it cannot be scored.

    Return {"value": seconds or steps to the target, "evaluations": number of evaluations before that, "end": seconds or steps
    of the last evaluation, "whole": whether the last row is complete}; the first two are inf if the target was not reached. A
    row is an evaluation, even if it repeats another. A row without a newline at its end may be cut, and does not count.
    """
    try:
        text = read_text(path)
        whole_rows = text[: text.rfind("\n") + 1]
        table = pd.read_csv(StringIO(whole_rows))
    except (OSError, ValueError) as error:
        raise LogError(f"{path} cannot be read: {error}") from error
    metric, column = f"validation/{target.metric}", MEASURES[by]
    if missing := {metric, column} - set(table.columns):
        raise LogError(f"{path} lacks the columns {sorted(missing)}; it has {list(table.columns)}")
    if table.empty or not isinstance(table.index, pd.RangeIndex):
        raise LogError(f"{path} has no complete row, or rows with more values than columns; correct it, or move the trial away")
    values, times = numbers(table, metric, path), numbers(table, column, path)
    if (wrong := ~((times > 0) & np.isfinite(times))).any():
        row = int(wrong.argmax())
        raise LogError(f"{path}: {column} of row {row + 1} is {times[row]}; it must be above 0: correct or delete the row")
    reached = values >= target.value if target.higher_is_better else values <= target.value
    first = int(reached.argmax())
    value, evaluations = (float(times[first]), float(first)) if reached.any() else (math.inf, math.inf)
    return {"value": value, "evaluations": evaluations, "end": float(times.iloc[-1]), "whole": whole_rows == text}


def describe_folders(folders: pd.DataFrame, evaluated: pd.Series, scored: pd.Series) -> list[str]:
    """Return notes on trials that do not count, and on studies with different numbers of trials."""
    notes = []
    for workload, group in folders[~scored].groupby("workload"):
        names = ", ".join(group["submission"].unique())
        notes.append(f"{workload!r} of {names} does not count: the benchmark has no such workload; --workload_targets sets one")
    for submission, group in folders[scored & ~evaluated].groupby("submission"):
        notes.append(f"{submission} has {len(group)} trials without an eval_measurements.csv, such as {group['path'].iloc[0]}")
    for (submission, workload), group in folders[scored].groupby(["submission", "workload"]):
        if (counts := group.groupby("study").size()).nunique() > 1:
            notes.append(f"{submission} has studies with different numbers of trials on {workload}: {counts.to_dict()}")
    return notes


def read_logs(root: Path, benchmark: Benchmark, by: str) -> Logs:
    """Read the trials in root/SUBMISSION/STUDY/WORKLOAD_FRAMEWORK/trial_N.

    Raise LogError if there are none, or if a submission has trials of one workload in two frameworks.
    """
    folders = trial_folders(root)
    if folders.empty:
        raise LogError(f"{root} contains no logs; they must be in SUBMISSION/STUDY/WORKLOAD_FRAMEWORK/trial_N")
    scored = folders["workload"].isin([*benchmark.base, *benchmark.held_out] or list(benchmark.targets))
    evaluated = pd.Series([(path / "eval_measurements.csv").exists() for path in folders["path"]], dtype=bool)
    notes, errors, rows = describe_folders(folders, evaluated, scored), [], []
    for folder in folders[scored & evaluated].to_dict("records"):
        file = folder["path"] / "eval_measurements.csv"
        try:
            rows.append({**folder, **read_trial(file, benchmark.targets[folder["workload"]], by)})
        except LogError as error:
            errors.append(str(error))
            continue
        if not rows[-1]["whole"]:
            notes.append(f"the last row of {file} does not count: it has no newline at its end, so it may be half-written")
    trials = pd.DataFrame(rows, columns=[*folders, "value", "evaluations", "end", "whole"])
    for (submission, workload), found in trials.groupby(["submission", "workload"])["folder"]:
        if found.nunique() > 1:
            names = ", ".join(sorted(found.unique()))
            raise LogError(f"{submission} has trials of {workload} in {names}; keep one, and move the others to a submission")
    present = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    check_names(present, root)
    notes += [f"{name} has no trial that counts, and is left out" for name in present if name not in set(trials["submission"])]
    return Logs(trials, notes, errors)


def best_trials(trials: pd.DataFrame, choice: str) -> pd.DataFrame:
    """Return the trial of each study and workload that counts: the one with the least time or steps, or with choice "evals" the
    one with the fewest evaluations to the target and, among those, the least time or steps.
    """
    ordered = trials.sort_values(["evaluations", "value"] if choice == "evals" else "value", kind="stable")
    return ordered.drop_duplicates(["submission", "workload", "study"]).sort_index()


def median_times(trials: pd.DataFrame, choice: str) -> pd.DataFrame:
    """Return the median over studies, one row per submission and one column per workload; inf is a miss, and NaN no
    trial.
    """
    medians: pd.Series = best_trials(trials, choice).groupby(["submission", "workload"])["value"].median()
    return medians.unstack()


# Tables


def read_times(path: Path) -> pd.DataFrame:
    """Read a table of times: submissions in the first column, then one column per workload; an empty cell or inf is a miss.

    Raise ValueError for anything but positive numbers, and for repeated submissions or workloads.
    """
    try:
        cells = pd.read_csv(StringIO(read_text(path)), header=None, dtype=str, keep_default_na=False)
    except ValueError as error:
        raise ValueError(f"{path} is no table of times: {error}") from error
    table = cells.iloc[1:, 1:].set_axis(cells.iloc[0, 1:], axis=1).set_axis(cells.iloc[1:, 0], axis=0)
    if table.empty:
        raise ValueError(f"{path} has no times; it must have a submission per row and a workload per column")
    for what, names in (("submissions", table.index), ("workloads", table.columns)):
        if repeated := sorted(names[names.duplicated()].unique()):
            raise ValueError(f"{path} has the {what} {repeated} more than once; keep one of each")
        if "" in names:
            raise ValueError(f"{path} has {what} without a name; each must have one")
        check_names(names, path)
    times: pd.DataFrame = table.replace("", "inf").apply(pd.to_numeric, errors="coerce")
    for name, row in (times > 0).iterrows():
        if not row.all():
            workload = row.idxmin()
            value = table.loc[name, workload]
            raise ValueError(
                f"{path}: {workload} of {name} is {value!r}; it must be above 0, or empty or inf if the target was missed"
            )
    times.index.name, times.columns.name = "submission", "workload"
    return times
