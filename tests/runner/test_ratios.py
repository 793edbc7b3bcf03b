"""Ratios of steps, their intervals, and bounds from misses."""

import numpy as np
import pandas as pd
import pytest

from runner.ratios import ALL, format_ratio, interval, ratios, told_apart

LIMITS = pd.Series({"w1": 100.0, "w2": 400.0})


def table(**columns):
    index = pd.MultiIndex.from_product([["w1", "w2"], range(1, len(next(iter(columns.values()))) // 2 + 1)])
    return pd.DataFrame(columns, index=index.set_names(["workload", "study"]))


def test_ratios_are_geometric_means():
    found = ratios(table(a=[10.0, 40.0, 200.0, 200.0], b=[20.0, 20.0, 100.0, 50.0]), LIMITS, "a")["ratio"]
    assert found["b", "w1"] == pytest.approx(1.0)  # of 2 and 1/2
    assert found["b", "w2"] == pytest.approx(8**-0.5)  # of 1/2 and 1/4
    assert found["b", ALL] == pytest.approx(8**-0.25)
    assert (found["a"] == 1).all()


def test_the_interval_is_students():
    values = pd.Series([0.1, 0.4, 0.2, 0.3, 0.0])
    half = 2.776445 * values.std(ddof=1) / 5**0.5  # the 97.5 % quantile of t with 4 degrees of freedom, from a table
    assert interval(values) == pytest.approx((0.2 - half, 0.2 + half), rel=1e-5)
    assert np.isnan(interval(values[:1])).all()


def test_intervals_of_five_studies_cover_the_true_ratio():
    draw, covered, trials = np.random.default_rng(0), 0, 400
    for _ in range(trials):
        base, noise = np.exp(draw.normal(5, 0.1, 10)), np.exp(draw.normal(0, 0.1, 10))
        row = ratios(table(a=base, b=0.8 * base * noise), pd.Series({"w1": 1e9, "w2": 1e9}), "a").loc["b", ALL]
        covered += row["low"] <= 0.8 <= row["high"]
    assert 0.92 <= covered / trials <= 0.98  # three standard deviations


def test_a_miss_makes_a_bound_and_a_failure_no_ratio():
    steps = table(a=[50.0, 50.0, 200.0, np.inf], b=[50.0, np.inf, 200.0, 200.0], c=[50.0, np.nan, 100.0, np.inf])
    found = ratios(steps, LIMITS, "a").apply(format_ratio, axis=1)
    assert found["b", "w1"] == "> 1.41"  # of 1 and at least 100 / 50
    assert found["b", "w2"] == "< 0.71"  # of 1 and at most 200 / 400
    assert found["b", ALL].startswith("~ 1.00 [")
    assert found["c", "w1"] == "failed"
    assert found["c", "w2"].startswith("~ 0.71 [")
    assert found["c", ALL] == "failed"


def test_submissions_are_told_apart_when_they_differ_in_all_studies():
    draw = np.random.default_rng(1)
    base = np.exp(draw.normal(5, 0.05, 10))
    same, faster = base * np.exp(draw.normal(0, 0.05, 10)), 0.7 * base * np.exp(draw.normal(0, 0.05, 10))
    apart = told_apart(table(base=base, same=same, faster=faster), pd.Series({"w1": 1e9, "w2": 1e9}))
    assert apart == {("base", "same"): False, ("base", "faster"): True, ("same", "faster"): True}
    assert told_apart(table(a=[1.0, 2.0], b=[1.0, 3.0]), LIMITS) == {}  # one study


def test_a_submission_that_failed_somewhere_is_not_compared_on_the_other_workloads():
    steps = table(a=[10.0, 11.0, 50.0, 51.0], b=[20.0, 22.0, np.nan, 90.0], c=[10.0, 11.0, 50.0, 51.0])
    assert told_apart(steps, LIMITS) == {("a", "c"): False}
