"""Runs to a target by steps: what `runner.suite`, `runner.compare`, and `experiments.sensitivity` have in common.

A run trains one point of a submission on one workload with one seed, and evaluates the validation metric every EVAL_EVERY
steps. It ends at the target, or after the workload's `step_hint` steps; there is no time limit. Every finished run is a row of
a table with all its evaluations, from which steps to target are computed. Repeat a command to continue from its table, on any
machine. Only one command at a time can add to a table.

A name stands for one version of a submission's code: after a change, give it another name or delete its rows. Delete also the
rows of a workload whose data, model, or step hint changed; a new target needs no deletion.

A study compares submissions at their best points. All of a submission's points run on the first of SELECTION_SEEDS, and the
FINALISTS best on the others. Of those that ran on all, the one with the fewest steps to target on average, where a miss counts
as the step hint, then runs on the studies' seeds, FIRST_SEED and up. No reported run took part in the selection, or set a
target (`experiments.sensitivity` uses other seeds).
"""

import collections
import datetime
import functools
import hashlib
import json
import math
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from .command import end_with_parent
from .files import create, locked, read_text, replacing
from .logs import cpu_name, ended
from .loop import Settings, run_trial
from .search_space import read_points
from .submissions import check_point, known_batch_size, load_submission
from .workloads import known_class, load_workload, short_name, workload_class

EVAL_EVERY = 10  # steps
SELF = "self"  # in place of a search space
SELECTION_SEEDS, FIRST_SEED = (1001, 1002), 101
FINALISTS = 2
NAME = r"[\w .,=+()%@-]+"  # of a submission or workload: no characters of Markdown, HTML, or the terminal

Point = dict[str, Any] | None  # hyperparameters; None for a submission that tunes itself


class Entry(NamedTuple):
    """A submission under a name, with the points to try."""

    name: str
    path: Path
    points: tuple[Point, ...]


class Run(NamedTuple):
    """A run of one of an entry's points, which is named by its hash. The fields identify a row of the table."""

    submission: str
    workload: str
    point: str
    seed: int


COLUMNS = [*Run._fields, "learning_rate", "horizon", "ended", "steps", "seconds", "date", "machine", "curve"]
TYPES = dict.fromkeys(COLUMNS, str) | {
    "seed": int,
    "steps": int,
    **dict.fromkeys(("learning_rate", "horizon", "seconds"), float),
}


def parse_entry(text: str, num_points: int) -> Entry:
    """Parse [NAME=]PATH[:SEARCH_SPACE or :self]. The default name is that of the file's folder; the default search space is
    tuning_search_space.json in that folder. With :self, as under AlgoPerf's self-tuning ruleset, the only point is None.

    Raise ValueError for a file that does not exist, or a search space with fewer than `num_points` points.
    """
    name, equals, paths = text.partition("=")
    if not equals or "/" in name:  # folders may have "=" in their names
        name, paths = "", text
    path, _, space = paths.partition(":")
    submission = Path(path).expanduser().resolve()
    search_space = Path(space).expanduser().resolve() if space else submission.with_name("tuning_search_space.json")
    for file in (submission, search_space)[: 1 if space == SELF else 2]:
        if not file.is_file():
            raise ValueError(f"{text!r} names no submission: there is no file {file}; it must be [NAME=]PATH[:SEARCH_SPACE]")
    if space == SELF:
        return Entry(name or submission.parent.name, submission, (None,))
    points = tuple(point._asdict() for point in read_points(search_space, num_points, seed=0))
    return Entry(name or submission.parent.name, submission, points)


def check_entries(entries: Sequence[Entry], workloads: Sequence[str]) -> None:
    """Raise ValueError unless there are entries and workloads, with different names that fit into the page, and workloads have
    enough steps for an evaluation.
    """
    for flag, names in (("submissions", [entry.name for entry in entries]), ("workloads", list(map(short_name, workloads)))):
        if not names:
            raise ValueError(f"there are no {flag}; give at least one")
        if repeated := [name for name, count in collections.Counter(names).items() if count > 1]:
            raise ValueError(f"the {flag} have {repeated} more than once; each must have a name of its own")
        if odd := [name for name in names if not re.fullmatch(NAME, name)]:
            raise ValueError(
                f"the {flag} have the names {odd}; the page takes letters, digits, spaces, and any of _.,=+-()%@; give them as "
                "NAME=PATH"
            )
    for workload in workloads:
        if (hint := workload_class(workload).step_hint) < EVAL_EVERY:
            raise ValueError(
                f"{workload} has a step_hint of {hint}; it must be at least {EVAL_EVERY}, the steps between evaluations"
            )


def point_hash(point: Point) -> str:
    """Return eight hexadecimal digits that stand for a point in the table."""
    return hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:8]


# One run

cached_workload = functools.lru_cache(load_workload)
cached_submission = functools.lru_cache(load_submission)


def train(entry: Entry, run: Run, to_target: bool) -> dict[str, Any]:
    """Train until the validation target if `to_target`, and for at most `step_hint` steps. Return the run's row.

    `horizon` is the length of the schedule over the step hint; `ended` says what ended the run: target, steps, or submission;
    `steps` and `seconds` are those at the end; `curve` is the validation metric at every EVAL_EVERY-th step and at the end.
    """
    torch.set_num_threads(1)
    point = next(point for point in entry.points if point_hash(point) == run.point)
    workload, submission = cached_workload(run.workload), cached_submission(str(entry.path))
    unreachable = math.inf if workload.higher_is_better else -math.inf
    workload.validation_target_value = workload_class(run.workload).validation_target_value if to_target else unreachable
    workload.eval_splits = ("validation",)
    workload.max_allowed_runtime_sec = math.inf
    settings = Settings(
        batch_size=known_batch_size(submission, short_name(run.workload)) or workload.default_batch_size,
        max_global_steps=workload.step_hint,
        eval_every_steps=EVAL_EVERY,
    )
    hyperparameters = None if point is None else collections.namedtuple("Hyperparameters", point)(**point)
    check_point(workload, submission, hyperparameters, str(entry.path))
    with tempfile.TemporaryDirectory() as folder:
        run_trial(workload, submission, hyperparameters, run.seed, Path(folder), settings, progress=lambda *_: None)
        evaluations = pd.read_csv(Path(folder) / "eval_measurements.csv")
        reason = ended(Path(folder))
    steps = evaluations["global_step"]
    kept = (steps % EVAL_EVERY == 0) | (steps == steps.iloc[-1])
    return {
        **run._asdict(),
        "learning_rate": (point or {}).get("learning_rate", math.nan),
        "horizon": (point or {}).get("step_hint_factor", math.nan),
        "ended": reason,
        "steps": int(steps.iloc[-1]),
        "seconds": round(evaluations["score"].iloc[-1], 2),
        "date": datetime.date.today().isoformat(),
        "machine": f"{cpu_name()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "curve": " ".join(map(str, evaluations[f"validation/{workload.target_metric_name}"][kept])),
    }


def steps_to_target(values: np.ndarray, steps: int, target: float, higher_is_better: bool) -> float:
    """Return the step at which a curve of `steps` steps first crosses a target, or inf.

    The step is interpolated between the first evaluation that is better than the target and the one before it.
    """
    reached = values > target if higher_is_better else values < target
    if not reached.any():
        return math.inf
    at = np.minimum(EVAL_EVERY * np.arange(1, len(values) + 1), steps)
    first = int(reached.argmax())
    if first == 0 or not math.isfinite(values[first - 1]):
        return float(at[first])
    share = (target - values[first - 1]) / (values[first] - values[first - 1])
    return float(at[first - 1] + share * (at[first] - at[first - 1]))


def read_curve(text: str) -> np.ndarray:
    """Return the values of a row's curve."""
    return np.array(text.split(), dtype=float)


# Tables of runs


def read_table(path: Path) -> pd.DataFrame:
    """Return the rows of a table, with a column steps_to_target; no rows if the file does not exist.

    Raise ValueError for another kind of file.
    """
    if not path.exists():
        return with_steps(pd.DataFrame(columns=COLUMNS))
    try:
        table = pd.read_csv(
            StringIO(read_text(path)),
            dtype=TYPES,
            keep_default_na=False,
            na_values={"learning_rate": [""], "horizon": [""]},
        )
        if list(table.columns) != COLUMNS:
            raise ValueError(f"its columns are {list(table.columns)}; a table of runs has {COLUMNS}")
        return with_steps(table.drop_duplicates([*Run._fields], keep="last"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read; move it away to begin a new table: {error}") from error


def with_steps(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with a column steps_to_target: steps to today's target, inf for a miss, NaN for a workload that is
    unknown, or in a file that this command did not name.
    """
    found = []
    for name, curve, steps in zip(table["workload"], table["curve"], table["steps"], strict=True):
        values, workload = read_curve(curve), known_class(name)
        found.append(
            math.nan
            if workload is None
            else steps_to_target(values, steps, workload.validation_target_value, workload.higher_is_better)
        )
    return table.assign(steps_to_target=np.array(found, dtype=float))


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table, sorted."""
    with replacing(path) as partial:
        table[COLUMNS].sort_values([*Run._fields]).to_csv(partial, index=False)


def finished(table: pd.DataFrame) -> set[Run]:
    """Return the runs that need not be repeated.

    A run that misses today's target is repeated if it ended at an earlier target, or under another step hint.
    """
    known = table.loc[table["steps_to_target"].notna(), "workload"].unique()
    hints = table["workload"].map({name: workload_class(name).step_hint for name in known})
    reached, full = np.isfinite(table["steps_to_target"]), (table["ended"] == "steps") & (table["steps"] == hints)
    done = table[reached | full | (table["ended"] == "submission")]
    return {Run(*row) for row in done[[*Run._fields]].itertuples(index=False)}


def workers(count: int) -> ProcessPoolExecutor:
    """Return a pool of new processes."""
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=end_with_parent)


def complete(path: Path, entry: Entry, runs: Sequence[Run], max_workers: int, to_target: bool = True) -> list[str]:
    """Run what the table lacks in `max_workers` single-threaded processes, and write each row at once. Return the failures.

    The processes are new, so that no submission gets the modules of another. Raise OSError if another process adds to the
    table, or if it cannot be written even after the last run.
    """
    if not set(runs) - finished(read_table(path)):
        return []
    create(path.parent)
    with locked(path):
        table = read_table(path)
        done, failures, unwritten = finished(table), [], False
        left = [run for run in runs if run not in done]
        with workers(max_workers) as pool, tqdm(total=len(left), desc=entry.name, unit="run") as bar:
            futures = {pool.submit(train, entry, run, to_target): run for run in left}
            try:
                for future in as_completed(futures):
                    run = futures[future]
                    if error := future.exception():
                        failures.append(f"{run.submission} on {run.workload}, point {run.point}, seed {run.seed}: {error!r}")
                        tqdm.write(f"failed: {failures[-1]}", file=sys.stdout)
                    else:
                        table = with_row(table, run, future.result())
                        unwritten = not try_to_write(table, path)
                    bar.update()
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()
                sys.exit("interrupted; repeat the command to continue")
        if unwritten:
            write_table(table, path)
    return failures


def with_row(table: pd.DataFrame, run: Run, row: dict[str, Any]) -> pd.DataFrame:
    """Return the table with this row in place of the run's earlier one."""
    others = table[(table[[*Run._fields]] != list(run)).any(axis=1)]
    return pd.concat([others, pd.DataFrame([row])], ignore_index=True) if len(others) else pd.DataFrame([row])


def try_to_write(table: pd.DataFrame, path: Path) -> bool:
    """Write a table. If the disk is full, say so and return False; the next run writes this run's row, too."""
    try:
        write_table(table, path)
    except OSError as error:
        tqdm.write(f"not written, make room: {error}", file=sys.stdout)
        return False
    return True


# Studies


def run_studies(path: Path, entries: Sequence[Entry], workloads: Sequence[str], count: int, max_workers: int) -> list[str]:
    """Complete the runs of `count` studies in the table at `path`. Return the failures."""
    failures, (first, *others) = [], SELECTION_SEEDS
    for entry in entries:
        trials = [Run(entry.name, workload, point_hash(point), first) for workload in workloads for point in entry.points]
        failures += complete(path, entry, trials, max_workers)
        table = read_table(path)
        finals = [
            Run(entry.name, workload, point, seed)
            for workload in workloads
            for point in ranking(table, entry, workload, [first]).index[:FINALISTS]
            for seed in others
        ]
        failures += complete(path, entry, finals, max_workers)
        failures += complete(path, entry, best_runs(read_table(path), entry, workloads, count), max_workers)
    return failures


def best_runs(table: pd.DataFrame, entry: Entry, workloads: Sequence[str], count: int) -> list[Run]:
    """Return the runs to report: the entry's best point on each workload, with one seed per study."""
    best = {workload: best_trial(table, entry, workload) for workload in workloads}
    return [
        Run(entry.name, workload, trial["point"], seed)
        for seed in range(FIRST_SEED, FIRST_SEED + count)
        for workload, trial in best.items()
        if trial is not None
    ]


def best_trial(table: pd.DataFrame, entry: Entry, workload: str) -> pd.Series | None:
    """Return a row of the entry's best point, or None if no point ran on all SELECTION_SEEDS."""
    points = ranking(table, entry, workload, SELECTION_SEEDS).index
    return None if points.empty else trials_of(table, entry, workload).query("point == @points[0]").iloc[0]


def trials_of(table: pd.DataFrame, entry: Entry, workload: str) -> pd.DataFrame:
    """Return the rows of the entry's points on a workload and SELECTION_SEEDS."""
    own = (table["submission"] == entry.name) & table["point"].isin([point_hash(point) for point in entry.points])
    return table[own & (table["workload"] == workload) & table["seed"].isin(SELECTION_SEEDS)]


def ranking(table: pd.DataFrame, entry: Entry, workload: str, seeds: Sequence[int]) -> pd.DataFrame:
    """Return the entry's points that ran on all of `seeds`, as an index from best to worst.

    The best point has the fewest mean steps to target, where a miss counts as the step hint; on a tie, such as no hits, it has
    the best mean of best metrics.
    """
    chosen = workload_class(workload)
    rows = trials_of(table, entry, workload).query("seed in @seeds")
    sign = -1 if chosen.higher_is_better else 1
    rows = rows.assign(
        capped=rows["steps_to_target"].clip(upper=chosen.step_hint),
        metric=[sign * best_value(curve, chosen.higher_is_better) for curve in rows["curve"]],
    )
    means = rows.groupby("point").agg(capped=("capped", "mean"), metric=("metric", "mean"), runs=("seed", "size"))
    return means[means["runs"] == len(seeds)].sort_values(["capped", "metric"])


def best_value(curve: str, higher_is_better: bool) -> float:
    """Return the best value of a curve, or the worst possible one if it has no finite value."""
    values = read_curve(curve)
    worst = -math.inf if higher_is_better else math.inf
    values = np.append(values[np.isfinite(values)], worst)
    return float(values.max() if higher_is_better else values.min())


def reported(table: pd.DataFrame, entries: Sequence[Entry], workloads: Sequence[str], count: int) -> pd.DataFrame:
    """Return the rows of the runs to report that are in the table."""
    wanted = {run for entry in entries for run in best_runs(table, entry, workloads, count)}
    return table[[Run(*row) in wanted for row in table[[*Run._fields]].itertuples(index=False)]].reset_index(drop=True)


def steps_and_limits(
    rows: pd.DataFrame, names: Sequence[str], workloads: Sequence[str], count: int
) -> tuple[pd.DataFrame, pd.Series]:
    """Return reported rows as the tables that `runner.ratios` takes: steps, NaN where no run finished, and step hints."""
    wide = rows.assign(study=rows["seed"] - FIRST_SEED + 1)
    wide = wide.pivot(index=["workload", "study"], columns="submission", values="steps_to_target")
    index = pd.MultiIndex.from_product([workloads, range(1, count + 1)], names=["workload", "study"])
    limits = pd.Series({workload: workload_class(workload).step_hint for workload in workloads}, dtype=float)
    return wide.reindex(index=index, columns=list(names)), limits
