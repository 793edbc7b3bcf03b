"""Set the laptop targets, and measure how well they tell learning rates apart: `python -m experiments.sensitivity`.

On each workload, NadamW runs for `step_hint` steps at each of RATES on two seeds; the rate with the best mean of final
validation metrics is its tuned point. It, and half and twice its rate, then run on ten other seeds. The target is the median of
the tuned point's ten curves at a share of the step hint, rounded to four digits: the largest of SHARES at which all ten seeds
reach it, with a coefficient of variation of at most MOST_VARIATION. `experiments/sensitivity.csv` has every run; the command
runs those that it lacks, prints the table, and writes it to `results/sensitivity/README.md`.
"""

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from absl import app, flags
from scipy import stats

from runner.ratios import format_ratio, log_steps, ratios
from runner.study import EVAL_EVERY, Entry, Run, complete, point_hash, read_curve, read_table, steps_to_target
from runner.workloads import WORKLOADS, workload_class

FLAGS = flags.FLAGS

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name("sensitivity.csv")
PAGE = ROOT / "results" / "sensitivity" / "README.md"
RATES = (0.002, 0.004, 0.008, 0.016, 0.032)
FIXED = {
    "beta1": 0.9,
    "beta2": 0.999,
    "weight_decay": 0.01,
    "warmup_factor": 0.05,
    "step_hint_factor": 1.0,
    "label_smoothing": 0.0,
    "dropout_rate": 0.0,
}
TUNING_SEEDS, SEEDS = (1001, 1002), tuple(range(1, 11))
SHARES = (0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
MOST_VARIATION = 0.1
FACTORS = {"half": 0.5, "tuned": 1.0, "twice": 2.0}  # learning rates over the tuned one


def point(rate: float) -> dict[str, Any]:
    """Return NadamW's point with a learning rate."""
    return {"learning_rate": rate, **FIXED}


ALL_RATES = sorted({rate * factor for rate in RATES for factor in (0.5, 1, 2)})
NADAMW = Entry("nadamw", ROOT / "runner" / "baselines" / "nadamw" / "submission.py", tuple(map(point, ALL_RATES)))


def runs_at(workload: str, rates: Sequence[float], seeds: Sequence[int]) -> list[Run]:
    """Return the runs of a workload at these learning rates and seeds."""
    return [Run(NADAMW.name, workload, point_hash(point(rate)), seed) for rate in rates for seed in seeds]


def curves_at(table: pd.DataFrame, workload: str, rate: float, seeds: Sequence[int]) -> np.ndarray:
    """Return the curves of a workload's runs at a learning rate, shape (seeds, evaluations)."""
    rows = table[(table["workload"] == workload) & (table["point"] == point_hash(point(rate)))].set_index("seed")
    return np.stack([read_curve(rows["curve"][seed]) for seed in seeds])


def tuned_rate(table: pd.DataFrame, workload: str) -> float:
    """Return the learning rate with the best mean of final metrics over TUNING_SEEDS."""
    sign = 1 if workload_class(workload).higher_is_better else -1
    return max(RATES, key=lambda rate: sign * curves_at(table, workload, rate, TUNING_SEEDS)[:, -1].mean())


def target_share(curves: np.ndarray, workload: str) -> float:
    """Return the largest of SHARES at which all curves reach the target, with a variation of at most MOST_VARIATION.

    Raise ValueError if there is none.
    """
    for share in SHARES:
        steps = crossings(curves, median_at(curves, share), workload)
        if np.isfinite(steps).all() and variation(steps) <= MOST_VARIATION:
            return share
    raise ValueError(
        f"on {workload}, no target that all seeds reach has a coefficient of variation of {MOST_VARIATION} or less"
    )


def median_at(curves: np.ndarray, share: float) -> float:
    """Return the median of curves at a share of their length, with four digits."""
    return float(f"{np.median(curves[:, round(share * curves.shape[1]) - 1]):.4g}")


def crossings(curves: np.ndarray, target: float, workload: str) -> np.ndarray:
    """Return each curve's steps to a target; inf for a miss."""
    chosen = workload_class(workload)
    return np.array([steps_to_target(curve, chosen.step_hint, target, chosen.higher_is_better) for curve in curves])


def variation(steps: np.ndarray) -> float:
    """Return the coefficient of variation, standard deviation / mean."""
    return float(steps.std(ddof=1) / steps.mean())


def target(table: pd.DataFrame, workload: str) -> float:
    """Return the validation target that follows from the table."""
    curves = curves_at(table, workload, tuned_rate(table, workload), SEEDS)
    return median_at(curves, target_share(curves, workload))


def steps_table(table: pd.DataFrame, workloads: Sequence[str]) -> tuple[pd.DataFrame, pd.Series]:
    """Return steps to target as `runner.ratios` takes them: a column for half, one, and two times the tuned rate."""
    found = {}
    for workload in workloads:
        rate, value = tuned_rate(table, workload), target(table, workload)
        steps = {
            name: crossings(curves_at(table, workload, factor * rate, SEEDS), value, workload)
            for name, factor in FACTORS.items()
        }
        found[workload] = pd.DataFrame(steps, index=pd.Index(SEEDS, name="study"))
    return pd.concat(found, names=["workload"]), pd.Series(
        {name: workload_class(name).step_hint for name in workloads}, dtype=float
    )


def summary(table: pd.DataFrame, workloads: Sequence[str]) -> pd.DataFrame:
    """Return one row per workload: the tuned rate, the target, steps of the ten seeds, and ratios at half and twice the rate.

    `detectable` is the smallest ratio of two submissions' steps that five seeds tell from 1: exp(t sd / sqrt(5)), where sd is
    the standard deviation of log ratios over seeds, and t the 97.5 % quantile of Student's t with 4 degrees of freedom.
    """
    steps, limits = steps_table(table, workloads)
    shown = ratios(steps, limits, "tuned").apply(format_ratio, axis=1)
    logs = log_steps(steps, limits)
    differences = logs.sub(logs["tuned"], axis=0).groupby(level="workload")
    spread = differences[["half", "twice"]].std().mean(axis=1)
    p = {(name, key): stats.ttest_1samp(x[name], 0.0).pvalue for key, x in differences for name in ("half", "twice")}
    rows = {}
    for workload in workloads:
        tuned = steps.loc[workload, "tuned"].to_numpy()
        rows[workload] = {
            "metric": workload_class(workload).target_metric_name,
            "tuned rate": f"{tuned_rate(table, workload):g}",
            "target": f"{target(table, workload):g}",
            "at share of the step hint": target_share(curves_at(table, workload, tuned_rate(table, workload), SEEDS), workload),
            "step hint": workload_class(workload).step_hint,
            "median steps": f"{np.median(tuned):.0f}",
            "range": f"{tuned.min():.0f} to {tuned.max():.0f}",
            "misses": int(np.isinf(tuned).sum()),
            "coefficient of variation": f"{variation(tuned):.1%}",
            "steps at half the rate / tuned": shown["half", workload],
            "steps at twice the rate / tuned": shown["twice", workload],
            "told apart from tuned": ", ".join(name for name in ("half", "twice") if p[name, workload] < 0.05) or "-",
            "detectable": f"{math.exp(stats.t.ppf(0.975, 4) * spread[workload] / math.sqrt(5)):.2f}",
        }
    return pd.DataFrame(rows).T.rename_axis("workload")


def format_page(table: pd.DataFrame) -> str:
    """Return the page, with the summary of all workloads."""
    return f"""# What the laptop suite can tell apart

`python -m experiments.sensitivity` wrote this page from `experiments/sensitivity.csv`. On each workload, NadamW's learning rate
is tuned on two seeds ({TUNING_SEEDS[0]} and {TUNING_SEEDS[1]}) among {", ".join(f"{rate:g}" for rate in RATES)}, by the final
validation metric. The tuned point, and half and twice its rate, then run for the whole step hint on seeds {SEEDS[0]} to
{SEEDS[-1]}. The target is the median of the tuned point's curves at a share of the step hint: the largest of
{", ".join(map(str, SHARES))} at which all seeds reach it with a coefficient of variation of at most {MOST_VARIATION:.0%}. The
share was chosen on these runs, so the true variation is somewhat larger; studies use other seeds. Steps are interpolated
between evaluations every {EVAL_EVERY} steps.

Ratios are geometric means of steps, paired by seed, with 95 % t intervals; ">" marks a bound, because runs missed. A rate is
told apart if p < 0.05 in a paired t test, where a miss counts as the step hint; rates around an optimum need not differ.
`detectable` is the smallest ratio that five seeds tell from 1, from the spread of the paired log ratios.

{summary(table, list(WORKLOADS)).T.to_markdown(disable_numparse=True)}
"""


def repeats(workloads: Sequence[str]) -> list[Run]:
    """Return the runs of the tuned points, then those of half and twice their learning rates."""
    table = read_table(TABLE)
    tuned = {name: tuned_rate(table, name) for name in workloads}
    return [run for factor in (1.0, 0.5, 2.0) for name, rate in tuned.items() for run in runs_at(name, [factor * rate], SEEDS)]


def main(_: Any) -> None:
    """Run what the table lacks, print the summary, and write the page if all workloads are in the table."""
    tuning = [run for name in FLAGS.workloads for run in runs_at(name, RATES, TUNING_SEEDS)]
    failures = complete(TABLE, NADAMW, tuning, FLAGS.max_workers, to_target=False)
    if not failures:
        failures = complete(TABLE, NADAMW, repeats(FLAGS.workloads), FLAGS.max_workers, to_target=False)
    if failures:
        sys.exit(f"error: {len(failures)} runs failed")
    table = read_table(TABLE)
    print(summary(table, FLAGS.workloads).T.to_string())
    if set(table["workload"]) == set(WORKLOADS):
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(format_page(table))


if __name__ == "__main__":
    flags.DEFINE_list("workloads", list(WORKLOADS), "workloads to run")
    flags.DEFINE_integer("max_workers", os.cpu_count() or 1, "number of single-threaded processes", lower_bound=1)
    app.run(main)
