"""Ratios of steps with intervals, paired by seed.

`steps` is a table with one row per workload and study, as its index, and one column per submission: steps to target, inf for a
miss, NaN for a run that failed. A miss is censored: it counts as `limits[workload]` steps, and what is computed from it is a
bound.

All intervals are Student's t intervals of 95 % on log ratios that are paired by study (`scipy.stats.ttest_1samp`). With five
studies they cover about 95 % if log ratios are roughly normal; a percentile bootstrap covers less. They cover the seeds only,
not the choice of points or workloads.
"""

from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

ALL = "all"
LEVEL = 0.95


def interval(values: pd.Series) -> tuple[float, float]:
    """Return the t interval of the mean of independent values; NaN if there are fewer than two."""
    if len(values) < 2:
        return np.nan, np.nan
    if values.nunique() == 1:  # scipy warns
        return float(values.iloc[0]), float(values.iloc[0])
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(LEVEL)
    return float(low), float(high)


def log_steps(steps: pd.DataFrame, limits: pd.Series) -> pd.DataFrame:
    """Return the logarithms of steps, where a miss counts as the workload's limit."""
    limit = limits.reindex(steps.index.get_level_values("workload")).to_numpy()
    return np.log(steps.apply(lambda column: column.where(column != np.inf, limit)))


def ratios(steps: pd.DataFrame, limits: pd.Series, base: str) -> pd.DataFrame:
    """Return the ratios of steps to those of `base`, per submission and workload, and over ALL workloads.

    A ratio is the geometric mean over studies; over all workloads, it is the geometric mean over studies of the geometric mean
    over workloads. The columns are ratio, low, high, and bound: "" if no run missed, ">" or "<" if the ratio is at least or at
    most this because runs of the submission or the base missed, "?" if runs of both did.
    """
    logs = log_steps(steps, limits)
    differences = logs.sub(logs[base], axis=0)
    missed = np.isinf(steps)
    groups = {workload: (rows, missed.loc[rows.index]) for workload, rows in differences.groupby(level="workload")}
    groups[ALL] = (differences.groupby(level="study").agg(lambda column: column.mean(skipna=False)), missed)
    rows = []
    for workload, (values, misses) in groups.items():
        for name in steps.columns:
            low, high = interval(values[name])
            bound = {(False, False): "", (True, False): ">", (False, True): "<", (True, True): "?"}[
                bool(misses[name].any()), bool(misses[base].any())
            ]
            rows.append((name, workload, np.exp(values[name].mean(skipna=False)), np.exp(low), np.exp(high), bound))
    table = pd.DataFrame(rows, columns=["submission", "workload", "ratio", "low", "high", "bound"])
    return table.set_index(["submission", "workload"])


def format_ratio(row: pd.Series) -> str:
    """Return a ratio as text, such as "0.84 [0.80, 0.89]"; "> 1.31" if it is a bound; "~ 0.84 [0.80, 0.89]", a ratio of steps
    up to the limit, if runs of both missed.
    """
    if np.isnan(row["ratio"]):
        return "failed"
    if row["bound"] in (">", "<"):
        return f"{row['bound']} {row['ratio']:.2f}"
    bounds = "" if np.isnan(row["low"]) else f" [{row['low']:.2f}, {row['high']:.2f}]"
    return f"{'~ ' if row['bound'] else ''}{row['ratio']:.2f}{bounds}"


def told_apart(steps: pd.DataFrame, limits: pd.Series) -> dict[tuple[str, str], bool]:
    """Return, for each pair of submissions that did not fail on any workload, whether their steps over all workloads differ.

    Pairs are tested by paired t tests on the studies' mean log steps, at a false discovery rate of 1 - LEVEL over all pairs
    (Benjamini and Hochberg 1995, `scipy.stats.false_discovery_control`). Steps count up to the limit. There are no pairs if
    there is only one study.
    """
    means = log_steps(steps, limits).groupby(level="study").agg(lambda column: column.mean(skipna=False)).dropna(axis=1)
    pairs = list(combinations(means.columns, 2)) if len(means) > 1 else []
    p = [stats.ttest_rel(means[a], means[b]).pvalue for a, b in pairs]
    adjusted = stats.false_discovery_control(np.nan_to_num(p, nan=1.0)) if pairs else []  # NaN: all studies are equal
    return {pair: bool(value < 1 - LEVEL) for pair, value in zip(pairs, adjusted, strict=True)}
