"""The score, compared with AlgoPerf's published scores and with logs scored by hand."""

import numpy as np
import pandas as pd
import pytest
from commands import ROOT, call, error_of, start

from experiments.competition import published
from runner.score import (
    Target,
    median_times,
    performance_profile,
    read_studies,
    read_targets,
    scores,
    speed_ups,
    with_held_out,
    without_stragglers,
)

TIMES = ROOT / "experiments" / "competition" / "published_times_v05.csv"
HELD_OUT = published.HELD_OUT["0.5"]
TARGETS = {"a": Target("accuracy", 0.9, 100.0), "b": Target("loss", 1.0, None)}


def test_the_published_scores_of_version_05():
    """All eleven submissions of the external tuning track score as published, to four digits."""
    times = published.times("0.5")
    assert scores(performance_profile(with_held_out(times, HELD_OUT))).round(4).to_dict() == {
        "shampoo_submission": 0.7784,
        "schedule_free_adamw": 0.7077,
        "generalized_adam": 0.6383,
        "cyclic_lr": 0.6301,
        "nadamp": 0.5909,
        "baseline": 0.5707,
        "amos": 0.4918,
        "caspr_adaptive": 0.4722,
        "lawa_queue": 0.3699,
        "lawa_ema": 0.3384,
        "schedule_free_prodigy": 0.0,
    }


def test_the_published_scores_of_version_06():
    times = published.times("0.6")
    assert scores(performance_profile(times)).round(4).to_dict() == {"shampoo": 0.6244, "baseline": 0.4590}


def test_the_published_speed_up_of_version_05():
    """The winner takes 27.9% less time than the baseline, by geometric mean over the base workloads."""
    times = published.times("0.5").drop(columns=HELD_OUT)
    limits = pd.Series({name: target.budget for name, target in read_targets(None).items()}).reindex(times.columns)
    assert 1 - 1 / speed_ups(times, limits, "baseline")["shampoo_submission"] == pytest.approx(0.279, abs=5e-4)


def test_a_profile_computed_by_hand():
    times = pd.DataFrame({"w1": [10.0, 20.0], "w2": [30.0, 10.0], "w3": [5.0, 25.0], "w4": [np.inf, np.inf]}, index=["x", "y"])
    assert np.isinf(without_stragglers(times).loc["y", "w3"])  # five times the best time
    profile = performance_profile(times)
    assert list(profile.iloc[0]) == [0.5, 0.25]  # best on w1 and w3; best on w2
    assert list(profile.iloc[-1]) == [0.75, 0.5]
    # x: 1/2 up to tau = 3, then 3/4. y: 1/4 up to 2, then 1/2. The grid of 100 points blurs each step by up to 0.03.
    assert scores(profile).to_dict() == pytest.approx({"x": (0.5 * 2 + 0.75) / 3, "y": (0.25 + 0.5 * 2) / 3}, abs=0.01)


def write_trial(folder, values, metric="accuracy", columns=("score", "global_step")):
    """Write an evaluation log with these values of the metric, 2 s and 10 steps apart."""
    folder.mkdir(parents=True)
    steps = np.arange(1, len(values) + 1)
    table = {"score": 2.0 * steps, "global_step": 10 * steps, f"validation/{metric}": values}
    selected = [name for name in table if name in columns or name.startswith("validation")]
    pd.DataFrame(table)[selected].to_csv(folder / "eval_measurements.csv", index=False)


@pytest.fixture
def logs(tmp_path):
    """Write logs of submission s: three studies of two trials on a, with known times to target; on b it always misses."""
    hits = {
        0: ([0.5, 0.91, 0.92], [0.95]),
        1: ([0.1, 0.2], [0.0, 0.0, 0.95]),
        2: ([0.5, 0.91], [0.9, 0.9]),  # 0.9 does not exceed the target of 0.9
    }
    for study, trials in hits.items():
        for n, values in enumerate(trials, start=1):
            write_trial(tmp_path / "s" / f"study_{study}" / "a_pytorch" / f"trial_{n}", values)
            write_trial(tmp_path / "s" / f"study_{study}" / "b_jax" / f"trial_{n}", [5.0, 4.0], metric="loss")
    return tmp_path


def test_the_first_hit_of_the_best_trial_of_the_median_study_counts(logs):
    for by, unit in (("time", 2.0), ("steps", 10.0)):
        studies, problems = read_studies(logs, TARGETS, by, "best")
        assert not problems
        assert list(studies[studies["workload"] == "a"]["value"]) == [unit, 3 * unit, 2 * unit]
        assert median_times(studies).loc["s"].to_dict() == {"a": 2 * unit, "b": np.inf}


def test_the_choice_by_evaluations_may_pick_a_slower_trial(tmp_path):
    slow = tmp_path / "s/study_0/a_pytorch/trial_1"
    write_trial(slow, [0.95])
    pd.DataFrame({"score": [50.0], "global_step": [500], "validation/accuracy": [0.95]}).to_csv(
        slow / "eval_measurements.csv", index=False
    )
    write_trial(tmp_path / "s/study_0/a_pytorch/trial_2", [0.0, 0.95])
    assert read_studies(tmp_path, TARGETS, "time", "best")[0]["value"][0] == 4.0
    assert read_studies(tmp_path, TARGETS, "time", "evals")[0]["value"][0] == 50.0


def test_unusable_logs_are_named_and_the_rest_is_scored(logs):
    study = logs / "s" / "study_0"
    (study / "a_pytorch" / "trial_3").mkdir()  # never evaluated
    write_trial(study / "unheard_of_pytorch" / "trial_1", [1.0])
    write_trial(study / "a_pytorch" / "trial_4", [0.95], metric="loss")
    half = study / "a_pytorch" / "trial_1" / "eval_measurements.csv"
    half.write_text(half.read_text()[:-6])  # cut within the last row
    studies, problems = read_studies(logs, TARGETS, "time", "best")
    assert studies["value"][0] == 2.0  # trial 2's
    text = "\n".join(map(str, problems))
    assert "trial_3 has no evaluations" in text
    assert "trial_1/eval_measurements.csv is empty or half-written" in text
    assert "no target for the workload 'unheard_of'" in text
    assert "trial_4/eval_measurements.csv lacks the columns ['validation/accuracy']" in text
    assert "s has studies with different numbers of trials on a: {'study_0': 4, 'study_1': 2, 'study_2': 2}" in text


@pytest.mark.slow
def test_the_command_writes_tables_and_pictures(tmp_path):
    flags = [f"--times_csv={TIMES}", f"--held_out={','.join(HELD_OUT)}", f"--output_dir={tmp_path}", "--reference=baseline"]
    assert "0.7784" in start("runner.score", *flags).stdout
    assert pd.read_csv(tmp_path / "scores.csv", index_col=0).loc["shampoo_submission", "score"] == pytest.approx(
        0.7784, abs=5e-5
    )
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("profile.png", "times.png"))
    assert pd.read_csv(tmp_path / "profile.csv", index_col=0).shape == (100, 11)


def test_strict_fails_on_unusable_logs(logs, tmp_path):
    (logs / "s" / "study_0" / "a_pytorch" / "trial_3").mkdir()
    targets = tmp_path / "targets.json"
    targets.write_text('{"a": {"target_metric_name": "accuracy", "validation_target_value": 0.9}}')
    flags = [f"--submission_directory={logs}", f"--output_dir={tmp_path / 'out'}", f"--workload_targets={targets}"]
    assert "trial_3 has no evaluations" in call("runner.score", *flags)
    assert "--strict" in error_of("runner.score", *flags, "--strict")
