"""`python -m runner.compare`: compare the steps to target of variants with those of a base.

The base and each variant run at their own best learning rate, chosen from a ladder on a separate seed, on the same seeds (see
`runner.study`). Write the curves of the first seed to curves.png. Repeat the command to continue. For example:

    python -m runner.compare --output_dir=DIR --base=shampoo=submission.py:runner/tuning_search_space.json \\
        --variants='half={"exponents": 0.5}' --variants=runner/baselines/soap/submission.py --workloads=mnist_vit --seeds=5
"""

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from absl import flags

from .command import run
from .page import curves
from .plots import colors, plot_curves
from .ratios import ALL, format_ratio, ratios
from .search_space import is_number, parse
from .study import (
    Entry,
    best_trial,
    check_entries,
    parse_entry,
    read_table,
    reported,
    run_studies,
    steps_and_limits,
)
from .workloads import WORKLOADS

FLAGS = flags.FLAGS


def parse_variant(text: str, base: Entry) -> Entry:
    """Parse NAME={"hyperparameter": value, ...}, which changes hyperparameters of the base, or [NAME=]PATH[:SEARCH_SPACE].

    Raise ValueError for any other text.
    """
    name, _, changes = text.partition("=")
    if not name or not changes.startswith("{"):
        return parse_entry(text, 1)
    try:
        return Entry(name, base.path, ({**(base.points[0] or {}), **parse(changes)},))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{text!r} is not a variant: {error}; it must be NAME={{"hyperparameter": value, ...}}') from error


def with_ladder(entry: Entry, ladder: Sequence[float]) -> Entry:
    """Return the entry with one point per step of the ladder: its first point, with the learning rate times each number.

    Raise ValueError if the point has no learning rate.
    """
    point = entry.points[0]
    if point is None or not is_number(point.get("learning_rate")):
        raise ValueError(f"the first point of {entry.name} has no learning_rate; it must have one to build a ladder from")
    return entry._replace(points=tuple({**point, "learning_rate": point["learning_rate"] * factor} for factor in ladder))


def read_ladder(texts: Sequence[str]) -> list[float]:
    """Return the numbers of --ladder. Raise ValueError unless they are positive."""
    try:
        ladder = [float(text) for text in texts]
    except ValueError:
        ladder = []
    if not ladder or not all(0 < factor < math.inf for factor in ladder):
        raise ValueError(f"--ladder is {','.join(texts)}; it must be a list of positive numbers, such as 0.5,1,2")
    return ladder


def rates(table: pd.DataFrame, entries: Sequence[Entry], workloads: Sequence[str]) -> pd.DataFrame:
    """Return the best learning rate of each entry on each workload as text; a rate at an end of its ladder ends in "*"."""
    columns: dict[str, dict[str, Any]] = {entry.name: {} for entry in entries}
    for entry in entries:
        ladder = sorted(point["learning_rate"] for point in entry.points if point)
        for workload in workloads:
            trial = best_trial(table, entry, workload)
            if trial is not None:
                rate = trial["learning_rate"]
                at_end = math.isclose(rate, ladder[0]) or math.isclose(rate, ladder[-1])
                columns[entry.name][workload] = f"{rate:.4g}" + "*" * at_end
    return pd.DataFrame(columns).reindex(workloads).fillna("failed")


def print_comparison(path: Path, base: str, entries: Sequence[Entry], workloads: Sequence[str], seeds: int) -> None:
    """Print the tables of a study: median steps, best learning rates, and ratios of steps to those of the entry `base`.

    Raise ValueError if no run is in the table.
    """
    names, table = [entry.name for entry in entries], read_table(path)
    rows = reported(table, entries, workloads, seeds)
    if rows.empty:
        raise ValueError("no run finished")
    steps, limits = steps_and_limits(rows, names, workloads, seeds)
    medians = steps.fillna(np.inf).groupby(level="workload").median().reindex(workloads)
    shown = ratios(steps, limits, base).apply(format_ratio, axis=1).unstack("submission")
    shown = shown.loc[[*workloads, ALL], [name for name in names if name != base]]
    print(f"median steps to target over {seeds} seeds\n{medians.round(0).to_string()}\n")
    print(f"best learning rate (* at an end of its ladder)\n{rates(table, entries, workloads).to_string()}\n")
    print(f"steps over those of {base}, with 95 % t intervals over seeds\n{shown.to_string()}")


def main(_: Sequence[str]) -> None:
    """Run what is missing, print the tables, and plot the curves. Exit with status 1 if a run failed."""
    workloads = FLAGS.workloads
    path = Path(FLAGS.output_dir).expanduser().resolve() / "runs.csv"
    try:
        base = parse_entry(FLAGS.base, 1)
        variants = [parse_variant(text, base) for text in FLAGS.variants]
        entries = [with_ladder(entry, read_ladder(FLAGS.ladder)) for entry in (base, *variants)]
        check_entries(entries, workloads)
        failures = run_studies(path, entries, workloads, FLAGS.seeds, FLAGS.max_workers)
        print_comparison(path, base.name, entries, workloads, FLAGS.seeds)
        rows, color = reported(read_table(path), entries, workloads, FLAGS.seeds), colors([entry.name for entry in entries])
        plot_curves(curves(rows, workloads), "steps", color, path.with_name("curves.png"))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if failures:
        sys.exit(f"error: {len(failures)} runs failed")


def define_flags() -> None:
    """Define the flags of this command."""
    text = "submission to compare with, as [NAME=]PATH[:SEARCH_SPACE]; its first point counts"
    flags.DEFINE_string("base", None, text, required=True)
    flags.DEFINE_multi_string(
        "variants", None, 'NAME={"hyperparameter": value, ...}, or [NAME=]PATH[:SEARCH_SPACE]; may be repeated', required=True
    )
    flags.DEFINE_list("workloads", list(WORKLOADS), "workloads to run: names, or PATH.py:CLASS")
    flags.DEFINE_integer("seeds", 5, "number of seeds", lower_bound=2)
    flags.DEFINE_list("ladder", ["0.5", "1", "2"], "multiples of the first point's learning rate to choose from")
    flags.DEFINE_integer("max_workers", os.cpu_count() or 1, "number of single-threaded processes", lower_bound=1)
    flags.DEFINE_string("output_dir", None, "folder for the table of runs", required=True)


if __name__ == "__main__":
    define_flags()
    run(main)
