"""The workloads' targets, and how they are computed from the table of runs."""

import pandas as pd
import pytest

from experiments import targets
from runner.workloads import WORKLOADS, workload_class

TABLE = pd.read_csv(targets.TABLE)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workloads_targets_follow_from_its_runs(name):
    row, workload = targets.targets(TABLE).loc[name], workload_class(name)
    assert workload.validation_target_value == pytest.approx(row["validation target"])
    assert workload.test_target_value == pytest.approx(row["test target"])
    assert workload.max_allowed_runtime_sec >= 3 * row["seconds"]
    assert 400 <= workload.step_hint <= 1000


@pytest.mark.parametrize("name", WORKLOADS)
def test_no_run_is_missing(name):
    runs = TABLE[TABLE["workload"] == name]
    assert targets.missing(TABLE, name) == []
    assert (runs[runs["seed"] == targets.TUNING_SEED].groupby("method").size() >= 8).all()


def test_the_target_is_the_median_of_the_best_points_seeds():
    name = "mnist_vit"
    point = {"workload": name, "method": "adamw", "weight_decay": 0.1, "seconds": 10.0, "standard_error": 0.01}
    tuning = [{**point, "learning_rate": rate, "seed": 1, "best_validation": rate} for rate in (0.5, 0.7, 0.6)]
    seeds = [
        {**point, "learning_rate": 0.7, "seed": seed, "best_validation": 0.6 + seed / 100, "test_there": seed / 100}
        for seed in targets.SEEDS
    ]
    other = [{**point, "learning_rate": 0.6, "seed": 11, "best_validation": 0.9, "test_there": 0.0}]  # from an earlier grid
    row = targets.targets(pd.DataFrame([*tuning, *seeds, *other])).loc[name]
    assert row["validation target"] == 0.7299  # 0.73 reaches it
    assert row["test target"] == 0.1099
    assert row["reached_by"] == "0 of 3"
