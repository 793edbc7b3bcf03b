"""Step sizes tuned on a ladder of factor 2, the run that they are tuned on, and ratios to a method with their intervals."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from .problems import measure

SEEDS = {"tuning": 5, "reported": 10}  # two sets without common draws
LARGEST = 1e15  # stands in for whatever is larger or not finite in a run that diverges
LONGEST = 12  # rungs of a ladder, which stops there if smaller steps are ever better

Starts = Mapping[Any, int]  # the middle of a ladder's first three rungs, by case
Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
Interval = tuple[float, float, float]  # an estimate, and the ends of its 95 % interval


def generator(seeds: str, stream: int) -> torch.Generator:
    """Return a generator of a set of seeds; streams differ in their draws."""
    return torch.Generator().manual_seed(1000 * list(SEEDS).index(seeds) + stream)


def trajectory(
    X: Tensor, make: Make, gradient: Callable[[Tensor], Tensor], noise: Callable[[], Tensor], K: int
) -> Iterator[Tensor]:
    """Train X (S, m, n) in place for K steps with `gradient` plus `noise`, and yield the noise-free gradient before each.

    One optimizer trains all S matrices. Before that, at X_1, sqrt(K) gradients only fill its averages (lr is 0), for all
    methods alike: with exponents (1/2, 1/2), the first step would otherwise be the inverse of a single gradient.
    """
    parameters, noisy = [torch.nn.Parameter(x) for x in X], torch.zeros_like(X)
    for x, G in zip(parameters, noisy, strict=True):
        x.grad = G
    optimizer, wait = make(parameters), round(K**0.5)
    rates = [group["lr"] for group in optimizer.param_groups]
    for k in range(wait + K):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate if k >= wait else 0.0
        G = gradient(X).nan_to_num(LARGEST, LARGEST, -LARGEST).clamp(-LARGEST, LARGEST)
        if k >= wait:
            yield G
        torch.add(G, noise(), out=noisy)
        optimizer.step()


def next_rungs(scores: Mapping[str, pd.Series]) -> set[int]:
    """Return the rungs that are missing: for each metric, the neighbors of the rung with the lowest score.

    `scores` maps metrics to scores, indexed by rung. There are none if every metric has its best rung inside the ladder, or if
    the ladder has LONGEST rungs.
    """
    best = {int(score.idxmin()) for score in scores.values()}
    measured = {int(rung) for score in scores.values() for rung in score.index}
    return {rung + step for rung in best for step in (-1, 1)} - measured if len(measured) < LONGEST else set()


def climb(starts: Starts, score: Callable[[dict[Any, set[int]]], dict[Any, dict[str, pd.Series]]]) -> dict[Any, dict[str, int]]:
    """Return the best rung of each case and metric; ladders start with three rungs around `starts` and grow.

    score(wanted) measures the wanted rungs of each case and returns its scores, by metric and rung; the lowest is best.
    """
    wanted = {case: {start - 1, start, start + 1} for case, start in starts.items()}
    while True:
        scores = score(wanted)
        missing = {case: next_rungs(scores[case]) for case in wanted}
        if not any(missing.values()):
            return {case: {metric: int(x.idxmin()) for metric, x in scores[case].items()} for case in wanted}
        wanted = {case: wanted[case] | missing[case] for case in wanted}


def tune(
    cell: Any, starts: Starts, metrics: list[str], path: Path, run: Callable[..., pd.DataFrame], max_workers: int
) -> pd.DataFrame:
    """Return, for each case and metric, the values of the reported seeds at the step size 2^rung that is best for this metric.

    `cell` is the type of the cells that `problems.measure` runs: the fields of a case, then `seeds` and `rung`. The best rung
    has the lowest mean log of the metric over the tuning seeds. Columns: the fields of a case, metric, rung, seed, and value.
    """
    names = list(cell._fields[:-2])

    def measured(wanted: Mapping[Any, set[int]], seeds: str) -> pd.DataFrame:
        cells = [cell(*case, seeds, rung) for case, rungs in wanted.items() for rung in sorted(rungs)]
        table = measure(cells, path, run, max_workers)
        return table[table["seeds"] == seeds]

    def score(wanted: dict[Any, set[int]]) -> dict[Any, dict[str, pd.Series]]:
        runs = measured(wanted, "tuning")
        means = runs[metrics].apply(np.log).groupby([runs[name] for name in [*names, "rung"]]).mean()
        return {case: {metric: means.loc[case][metric] for metric in metrics} for case in wanted}

    best = climb(starts, score)
    runs = measured({case: set(rungs.values()) for case, rungs in best.items()}, "reported")
    rows = [(*case, metric, rung) for case, rungs in best.items() for metric, rung in rungs.items()]
    chosen = pd.DataFrame(rows, columns=[*names, "metric", "rung"])
    return chosen.merge(runs.melt([*names, "rung", "seed"], metrics, "metric"), on=list(chosen.columns))


def mean_interval(x: np.ndarray) -> Interval:
    """Return the mean over seeds and its 95 % t interval."""
    low, high = stats.ttest_1samp(x, 0.0).confidence_interval(0.95)
    return float(x.mean()), float(low), float(high)


def ratio(values: np.ndarray, base: np.ndarray) -> Interval:
    """Return the geometric mean over seeds of value / base, paired by seed, and its 95 % t interval, that of the log ratio."""
    mean, low, high = np.exp(mean_interval(np.log(values) - np.log(base)))
    return float(mean), float(low), float(high)
