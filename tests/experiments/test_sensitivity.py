"""The workloads' targets follow from the table of runs, and the suite is as sensitive as its page says."""

import numpy as np
import pandas as pd
import pytest

from experiments import sensitivity
from runner.study import finished, read_table
from runner.workloads import WORKLOADS, workload_class

TABLE = read_table(sensitivity.TABLE)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workloads_target_follows_from_its_runs(name):
    assert workload_class(name).validation_target_value == pytest.approx(sensitivity.target(TABLE, name))


def test_ten_seeds_reach_every_target_with_little_variation():
    rows = sensitivity.summary(TABLE, list(WORKLOADS))
    assert (rows["misses"] == 0).all()
    assert (rows["coefficient of variation"].str.rstrip("%").astype(float) <= 10).all()
    assert (rows["detectable"].astype(float) < 1.35).all()


def test_no_run_is_missing():
    tuning = [run for name in WORKLOADS for run in sensitivity.runs_at(name, sensitivity.RATES, sensitivity.TUNING_SEEDS)]
    assert finished(TABLE) >= {*tuning, *sensitivity.repeats(list(WORKLOADS))}


def test_the_target_is_a_median_at_a_share_of_the_step_hint():
    name, hint = "mnist_vit", workload_class("mnist_vit").step_hint
    rows = []
    for rate in sensitivity.RATES:
        for seed in (*sensitivity.TUNING_SEEDS, *sensitivity.SEEDS):
            curve = (1 + (rate != 0.008) + seed / 1e4) * np.linspace(1, 0.1, hint // 10)
            point = sensitivity.point_hash(sensitivity.point(rate))
            rows.append({"workload": name, "point": point, "seed": seed, "curve": " ".join(map(str, curve))})
    table = pd.DataFrame(rows)
    assert sensitivity.tuned_rate(table, name) == 0.008
    curves = sensitivity.curves_at(table, name, 0.008, sensitivity.SEEDS)
    assert sensitivity.target_share(curves, name) == 0.75  # curves are almost equal
    expected = 1.00055 * np.linspace(1, 0.1, hint // 10)[round(0.75 * hint / 10) - 1]
    assert sensitivity.target(table, name) == pytest.approx(expected, rel=1e-3)


def test_a_workload_without_a_target_that_all_seeds_reach_is_named():
    stuck = np.stack([np.linspace(1, 0.1, 40), *[np.ones(40)] * 9])
    with pytest.raises(ValueError, match="on mnist_vit, no target that all seeds reach"):
        sensitivity.target_share(stuck, "mnist_vit")
