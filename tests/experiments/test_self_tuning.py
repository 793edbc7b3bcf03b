"""The self-tuning leaderboard of 2026: published scores, and the arithmetic of the projection."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments.competition import self_tuning
from runner.score import compare
from runner.times import LogError, parse_benchmark

EXAMPLE = Path(__file__).parents[2] / "runner" / "algoperf_targets.json"
PUBLISHED = {  # artifacts/leaderboard_v2/scores.csv of the leaderboard's repository
    "ademamix": 0.5190796857463527,
    "cautious_nadamw": 0.31425364758698043,
    "lion": 0.27833894500561146,
    "muon_torch": 0.4231200897867556,
    "nadamw": 0.384399551066217,
    "nadamw_baselinev05": 0.4506172839506181,
    "schedule_free_adamw": 0.466891133557801,
    "schedule_free_adamw_v2": 0.5679012345679016,
    "single_worker_diloco": 0.1369248035914701,
}


def test_scores_are_the_published_ones():
    times = self_tuning.medians("seconds")
    scores = compare(times, self_tuning.BUDGETS, "nadamw").scores["score"]
    assert scores[list(PUBLISHED)].to_dict() == pytest.approx(PUBLISHED, abs=1e-4)


def test_no_trial_ran_longer_than_one_and_a_half_budgets():
    latest = self_tuning.fitting()["latest evaluation over the budget"]
    assert latest.max() < 1.5
    assert (latest > 1).all()


def test_the_score_beside_others_is_that_of_all_together():
    others, rng = self_tuning.medians("seconds"), np.random.default_rng(0)
    for _ in range(3):
        times = others.min().to_numpy() * rng.uniform(0.5, 5, size=9)
        times[rng.integers(9)] = np.inf
        times[np.isinf(others.min().to_numpy())] = np.inf
        together = pd.concat([others, pd.DataFrame([times], index=["ours"], columns=others.columns)])
        expected = compare(together, self_tuning.BUDGETS, "nadamw").scores["score"]["ours"]
        assert self_tuning.score_beside(times, others) == pytest.approx(expected)
        assert self_tuning.score_beside(np.stack([times, times]), others) == pytest.approx([expected, expected])


def test_projected_times_follow_from_their_assumptions():
    same = np.zeros(9)
    times = self_tuning.projected_times(same, misses_count=False, slowdown=1.0)
    steps = self_tuning.reference_steps(False)
    assert (np.isinf(times) >= np.isinf(steps.to_numpy())).all()
    hit = list(self_tuning.WORKLOADS).index("ogbg")
    assert times[hit] == pytest.approx(20879 * 0.229, rel=0.01)  # NadamW's steps, and the seconds of a step in torch
    assert self_tuning.projected_times(same + np.log(0.5), False, 2.0)[hit] == pytest.approx(times[hit])
    longer = self_tuning.reference_steps(True)
    assert np.isfinite(longer).all()
    assert (longer[np.isfinite(steps)] == steps[np.isfinite(steps)]).all()


def test_laptop_ratios_are_those_of_the_page():
    """results/laptop_suite/README.md has them with two digits."""
    found = np.exp(self_tuning.laptop_ratios("shampoo_self")["mean"]).round(2)
    assert found[["mnist_unet", "mnist_vit", "pydoc_lm", "solubility_gnn"]].tolist() == [0.39, 0.26, 0.56, 0.24]


def test_trials_are_read_from_logs_with_seconds_and_steps(tmp_path):
    trial = tmp_path / "lion" / "study_0" / "ogbg_pytorch" / "trial_1"
    trial.mkdir(parents=True)
    rows = [
        "accumulated_eval_time,global_step,score,validation/mean_average_precision",
        "1,10,2,0.1",
        "2,30,6,0.3",
        "3,40,9,0.2",
    ]
    (trial / "eval_measurements.csv").write_text("\n".join(rows) + "\n")
    benchmark = parse_benchmark(json.loads(EXAMPLE.read_text())["2026"])
    (found,) = self_tuning.read_published(tmp_path, benchmark).to_dict("records")
    assert found == {
        "submission": "lion", "framework": "pytorch", "workload": "ogbg", "study": "study_0", "seconds": 6, "steps": 30,
        "last_seconds": 9, "last_step": 40, "evaluation_seconds": 3,
    }  # fmt: skip
    (trial / "eval_measurements.csv").write_text("global_step\n1\n")
    with pytest.raises(ValueError, match="lacks the columns"):
        self_tuning.read_published(tmp_path, benchmark)
    shutil.rmtree(trial)
    with pytest.raises(LogError, match="contains no logs"):
        self_tuning.read_published(tmp_path, benchmark)
