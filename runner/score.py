"""AlgoPerf's score: time to target on each workload, the performance profile, and the area under it.

`python -m runner.score --submission_directory=DIR --benchmark=0.6 --output_dir=OUT` reads the folders
DIR/SUBMISSION/STUDY/WORKLOAD_FRAMEWORK/trial_N/ written by AlgoPerf's runner or this one; `--times_csv=FILE` reads a table of
times instead. The rules are from AlgoPerf's documentation and scoring code, with held-out workloads in version 0.5 only;
`runner.times` says which trial counts.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from absl import flags

from .command import run
from .files import create, replacing
from .plots import colors, plot_profile, plot_times
from .times import (
    BENCHMARKS,
    MEASURES,
    Benchmark,
    Target,
    all_targets,
    median_times,
    parse_benchmark,
    read_logs,
    read_targets,
    read_times,
)

MAX_RATIO = 4.0  # a time above this multiple of the workload's best time is a miss
NUM_TAUS = 100

FLAGS = flags.FLAGS


# From times to scores. A table of times has one row per submission and one column per workload; inf is a miss.


def without_stragglers(times: pd.DataFrame) -> pd.DataFrame:
    """Return the times, with inf in place of those above MAX_RATIO times the workload's best."""
    return times.mask(times > MAX_RATIO * times.min(), np.inf)


def with_held_out(times: pd.DataFrame, held_out: Sequence[str]) -> pd.DataFrame:
    """Return the times on base workloads, with a miss where the held-out variant is missed (version 0.5).

    In this order: a held-out time becomes inf where the base time is inf; times above MAX_RATIO times the best become inf; a
    base time becomes inf where the held-out time is inf. The base of a variant is the workload with the longest name that
    starts the variant's name. Raise ValueError if there is none.
    """
    base = [name for name in times.columns if name not in held_out]
    base_of = {variant: max((name for name in base if variant.startswith(name)), key=len, default="") for variant in held_out}
    if orphans := [variant for variant, name in base_of.items() if not name]:
        raise ValueError(
            f"the held-out workloads {orphans} have no base: none of {base} starts their names; add it or drop them"
        )
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


def miss_limits(targets: dict[str, Target], ends: pd.Series, by: str) -> pd.Series:
    """Return what a miss counts as: the workload's budget if `by` is "time" and it is known, else the latest end of a trial."""
    budgets = pd.Series(
        {name: target.budget for name, target in targets.items() if target.budget and by == "time"}, dtype=float
    )
    return pd.concat([budgets, ends[~ends.index.isin(budgets.index)]])


# The command


def write_comparison(comparison: Comparison, by: str, folder: Path) -> None:
    """Write the tables as CSV files and the plots as PNG files to the folder."""
    create(folder)
    for name in ("times", "profile", "scores"):
        with replacing(folder / f"{name}.csv") as partial:
            getattr(comparison, name).to_csv(partial)
    color = colors(comparison.scores.index)
    plot_profile(comparison.profile, comparison.scores["score"], by, color, folder / "profile.png")
    plot_times(comparison.counted.loc[comparison.scores.index], by, color, folder / "times.png")


def define_flags() -> None:
    """Define the flags of this command."""
    flags.DEFINE_string("submission_directory", None, "folder that holds SUBMISSION/STUDY/WORKLOAD_FRAMEWORK/trial_N")
    flags.DEFINE_string(
        "times_csv", None, "table of times to read instead: one row per submission, one column per workload; inf or empty: miss"
    )
    flags.DEFINE_string("output_dir", None, "folder for the CSV and PNG files", required=True)
    flags.DEFINE_enum("benchmark", None, list(BENCHMARKS), "version of AlgoPerf whose workloads count (default: all that ran)")
    flags.DEFINE_string("workload_targets", None, "JSON file with the benchmark instead, in AlgoPerf's format")
    flags.DEFINE_list("held_out", [], "held-out workloads, if the benchmark has none; a miss is one on the base workload")
    flags.DEFINE_enum("by", "time", list(MEASURES), "what to compare")
    flags.DEFINE_enum(
        "trial_choice", "evals", ["evals", "best"], "trial of a study that counts: fewest evaluations to the target, or fastest"
    )
    flags.DEFINE_string("reference", None, "submission to compute speed-ups over (default: the first in the table)")
    flags.DEFINE_boolean("strict", False, "fail if anything is missing or does not count")


def chosen_benchmark() -> Benchmark:
    """Return the benchmark that the flags name. Raise ValueError for flags that exclude each other."""
    if FLAGS.benchmark and FLAGS.workload_targets:
        raise ValueError("pass at most one of --benchmark and --workload_targets")
    if FLAGS.workload_targets:
        benchmark = read_targets(Path(FLAGS.workload_targets))
    else:
        benchmark = parse_benchmark(BENCHMARKS[FLAGS.benchmark]) if FLAGS.benchmark else all_targets()
    if FLAGS.held_out and benchmark.base:
        raise ValueError(f"--held_out is {','.join(FLAGS.held_out)}, but the benchmark has its own; drop one of the two flags")
    return benchmark


def read_input(benchmark: Benchmark) -> tuple[pd.DataFrame, pd.Series, list[str], list[str]]:
    """Return the times, the latest end of a trial per workload, notes, and errors.

    Raise ValueError if nothing can be scored.
    """
    if (FLAGS.submission_directory is None) == (FLAGS.times_csv is None):
        raise ValueError("pass exactly one of --submission_directory and --times_csv")
    if FLAGS.times_csv:
        return read_times(Path(FLAGS.times_csv)), pd.Series(dtype=float), [], []
    trials, notes, errors = read_logs(Path(FLAGS.submission_directory), benchmark, FLAGS.by)
    if trials.empty:
        raise ValueError("\n".join([f"{FLAGS.submission_directory} has no trial to score", *notes, *errors]))
    return median_times(trials, FLAGS.trial_choice), trials.groupby("workload")["end"].max(), notes, errors


def select(times: pd.DataFrame, benchmark: Benchmark) -> tuple[pd.DataFrame, list[str]]:
    """Return the times on the benchmark's workloads, with misses in place of NaN, and notes."""
    workloads = [*benchmark.base, *benchmark.held_out] or list(times.columns)
    notes = [f"{name!r} does not count: the benchmark has no such workload" for name in times.columns.difference(workloads)]
    times = times.reindex(columns=workloads)
    for name, row in times.iterrows():
        if len(absent := row.index[row.isna()]):
            notes.append(f"{name} has no trial on {', '.join(absent)}, which counts as a miss")
    return times.fillna(np.inf), notes


def main(_: Sequence[str]) -> None:
    """Read times, score them, and write tables and plots. Exit with status 1 if a trial could not be scored."""
    output = Path(FLAGS.output_dir)
    try:
        benchmark = chosen_benchmark()
        times, ends, notes, errors = read_input(benchmark)
        times, more = select(times, benchmark)
        if unknown := set(FLAGS.held_out) - set(times.columns):
            raise ValueError(f"--held_out has unknown workloads {sorted(unknown)}; it may have {sorted(times.columns)}")
        if (reference := FLAGS.reference or times.index[0]) not in times.index:
            raise ValueError(f"--reference is {reference!r}; it must be one of {', '.join(times.index)}")
        for text in [*notes, *more]:
            print(f"note: {text}")
        for text in errors:
            print(f"not scored: {text}")
        if FLAGS.strict and (notes or more or errors):
            raise ValueError("--strict is set, and it allows none of the above")
        limits = miss_limits(benchmark.targets, ends, FLAGS.by)
        comparison = compare(times, limits, reference, FLAGS.held_out or benchmark.held_out)
        write_comparison(comparison, FLAGS.by, output)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    unit = "seconds" if FLAGS.by == "time" else "steps"
    print(f"{unit} to target\n{times.round(1).T.to_string()}\n\n{comparison.scores.round(4).to_string()}\n")
    print(f"tables and plots: {output}")
    if errors:
        sys.exit(f"error: {len(errors)} trials could not be read, and the scores are without them")


if __name__ == "__main__":
    define_flags()
    run(main)
