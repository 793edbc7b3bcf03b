"""The score, compared with AlgoPerf's published scores and with profiles computed by hand."""

import numpy as np
import pandas as pd
import pytest
from commands import ROOT, call, error_of, start

from experiments.competition import published
from runner.score import performance_profile, scores, select, speed_ups, with_held_out, without_stragglers
from runner.times import BENCHMARKS, parse_benchmark

TABLES = {
    version: ROOT / "experiments" / "competition" / f"published_times_v{version.replace('.', '')}.csv" for version in BENCHMARKS
}
PUBLISHED = {  # mlcommons/submissions_algorithms, external tuning
    "0.5": {
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
    },
    "0.6": {"shampoo": 0.6244, "baseline": 0.4590},
}


def written_scores(folder):
    """Return the scores that the command wrote, to four digits."""
    return pd.read_csv(folder / "scores.csv", index_col=0)["score"].round(4).to_dict()


def write_trial(folder, target, time):
    """Write the log of a trial that reaches this entry of a file of targets after `time` seconds, or never (inf)."""
    folder.mkdir(parents=True)
    value = target["validation_target_value"]
    worse = value + 1 if target["target_metric_name"] in ("loss", "wer", "ppl") else value - 1
    values, seconds = ([worse, value], [0.5, time]) if np.isfinite(time) else ([worse, worse], [0.5, 1e5])
    table = {"score": seconds, "global_step": [1, 100], f"validation/{target['target_metric_name']}": values}
    pd.DataFrame(table).to_csv(folder / "eval_measurements.csv", index=False)


@pytest.mark.parametrize("version", PUBLISHED)
def test_the_published_scores(version, tmp_path):
    """All submissions to the external tuning track score as published, to four digits, from logs that have their times."""
    targets = BENCHMARKS[version]["workloads"]
    for submission, row in published.times(version).iterrows():
        for workload, time in row.items():
            write_trial(tmp_path / "logs" / submission / "study_0" / f"{workload}_jax" / "trial_1", targets[workload], time)
    flags = [f"--benchmark={version}", f"--submission_directory={tmp_path / 'logs'}", f"--output_dir={tmp_path / 'out'}"]
    assert "note" not in call("runner.score", *flags)
    assert written_scores(tmp_path / "out") == PUBLISHED[version]


@pytest.mark.parametrize("version", PUBLISHED)
def test_the_published_scores_from_the_published_times(version, tmp_path):
    call("runner.score", f"--benchmark={version}", f"--times_csv={TABLES[version]}", f"--output_dir={tmp_path}")
    assert written_scores(tmp_path) == PUBLISHED[version]


def test_the_published_speed_up_of_version_05():
    """The winner takes 27.9% less time than the baseline, by geometric mean over the base workloads."""
    times = published.times("0.5")[BENCHMARKS["0.5"]["base_workloads"]]
    assert 1 - 1 / speed_ups(times, published.budgets("0.5"), "baseline")["shampoo_submission"] == pytest.approx(
        0.279, abs=5e-4
    )


def test_a_workload_that_nobody_ran_is_a_miss_of_all():
    times, notes = select(published.times("0.6").assign(mnist=1.0), parse_benchmark(BENCHMARKS["2026"]))
    assert notes == [
        "'mnist' does not count: the benchmark has no such workload",
        "baseline has no trial on finewebedu_lm, which counts as a miss",
        "shampoo has no trial on finewebedu_lm, which counts as a miss",
    ]
    nine = scores(performance_profile(times))
    assert nine.to_dict() == pytest.approx({name: score * 8 / 9 for name, score in PUBLISHED["0.6"].items()}, abs=5e-5)


def test_a_profile_computed_by_hand():
    times = pd.DataFrame({"w1": [10.0, 20.0], "w2": [30.0, 10.0], "w3": [5.0, 25.0], "w4": [np.inf, np.inf]}, index=["x", "y"])
    assert np.isinf(without_stragglers(times).loc["y", "w3"])  # five times the best time
    profile = performance_profile(times)
    assert list(profile.iloc[0]) == [0.5, 0.25]  # best on w1 and w3; best on w2
    assert list(profile.iloc[-1]) == [0.75, 0.5]
    # x: 1/2 up to tau = 3, then 3/4. y: 1/4 up to 2, then 1/2. The grid of 100 points blurs each step by up to 0.03.
    assert scores(profile).to_dict() == pytest.approx({"x": (0.5 * 2 + 0.75) / 3, "y": (0.25 + 0.5 * 2) / 3}, abs=0.01)


def test_a_held_out_workload_needs_a_base():
    with pytest.raises(ValueError, match=r"\['w_wide'\] have no base: none of \['v'\] starts their names"):
        with_held_out(pd.DataFrame({"v": [1.0], "w_wide": [1.0]}, index=["x"]), ["w_wide"])


@pytest.mark.slow
def test_the_command_writes_tables_and_pictures(tmp_path):
    flags = ["--benchmark=0.5", f"--times_csv={TABLES['0.5']}", f"--output_dir={tmp_path}", "--reference=baseline"]
    assert "0.7784" in start("runner.score", *flags).stdout
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("profile.png", "times.png"))
    assert pd.read_csv(tmp_path / "profile.csv", index_col=0).shape == (100, 11)


def test_names_are_shown_as_they_are_and_their_number_is_not_limited(tmp_path, monkeypatch):
    """Signs of matplotlib's formulas and of tables are part of a name; there are more names than colors."""
    names = ["a$_$b", "$\\frac$", "c|d", "_e", *map(str, range(21))]
    pd.DataFrame({"w$": np.arange(1.0, 26.0)}, index=names).to_csv(tmp_path / "times.csv")
    shown = []

    def savefig(figure, path, **_):
        shown.append(texts(figure))
        path.touch()

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    call("runner.score", f"--times_csv={tmp_path / 'times.csv'}", f"--output_dir={tmp_path / 'out'}")
    assert set(pd.read_csv(tmp_path / "out" / "scores.csv", index_col=0).index) == set(names)
    profile, bars = shown
    assert {name.split("  ")[1] for name in profile} == set(names) == {name.strip() for name in bars}


def texts(figure):
    """Return the entries of a figure's legend, without the backslash before a dollar sign that is not one of a formula."""
    figure.canvas.draw()
    return [text.get_text().replace(r"\$", "$") for text in figure.legends[0].get_texts()]


@pytest.fixture
def logs(tmp_path):
    """Write logs of submissions s and t on the workload a, whose accuracy reaches 0.9 after 5 and 10 s, and its targets."""
    target = {"target_metric_name": "accuracy", "validation_target_value": 0.9}
    for name, time in (("s", 5.0), ("t", 10.0)):
        write_trial(tmp_path / "logs" / name / "study_0" / "a_pytorch" / "trial_1", target, time)
    (tmp_path / "targets.json").write_text('{"a": {"target_metric_name": "accuracy", "validation_target_value": 0.9}}')
    return tmp_path


def flags_for(folder):
    """Return flags that score the logs in a folder."""
    return [
        f"--submission_directory={folder / 'logs'}",
        f"--output_dir={folder / 'out'}",
        f"--workload_targets={folder / 'targets.json'}",
    ]


def test_strict_fails_where_logs_do_not_count(logs):
    (logs / "logs" / "s" / "study_0" / "a_pytorch" / "trial_2").mkdir()
    assert "s has 1 trials without an eval_measurements.csv" in call("runner.score", *flags_for(logs))
    assert "--strict is set" in error_of("runner.score", *flags_for(logs), "--strict")


def test_a_trial_that_cannot_be_read_fails_the_command_after_the_rest_is_scored(logs):
    bad = logs / "logs" / "t" / "study_1" / "a_pytorch" / "trial_1"
    bad.mkdir(parents=True)
    (bad / "eval_measurements.csv").write_text("score,global_step,validation/accuracy\n,1,0.95\n")
    with pytest.raises(SystemExit) as stopped:
        call("runner.score", *flags_for(logs))
    assert stopped.value.code == "error: 1 trials could not be read, and the scores are without them"
    assert f"not scored: {bad}/eval_measurements.csv: score of row 1 is nan" in stopped.value.__notes__[0]
    assert set(written_scores(logs / "out")) == {"s", "t"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--benchmark=0.5"], "at most one of --benchmark and --workload_targets"),
        (["--times_csv=x.csv"], "exactly one of --submission_directory and --times_csv"),
        (["--held_out=b"], r"--held_out has unknown workloads ['b']; it may have ['a']"),
        (["--held_out=a"], "have no base"),
        (["--reference=u"], "--reference is 'u'; it must be one of s, t"),
        (["--submission_directory=absent"], "absent contains no logs"),
        (["--workload_targets=absent.json"], "absent.json"),
        (["--output_dir=README.md"], "README.md"),
    ],
)
def test_wrong_flags_are_errors(logs, flags, message):
    assert message in error_of("runner.score", *flags_for(logs), *flags)


def test_held_out_workloads_of_a_benchmark_are_its_own(tmp_path):
    flags = ["--benchmark=0.6", f"--times_csv={TABLES['0.6']}", f"--output_dir={tmp_path}", "--held_out=wmt"]
    assert "the benchmark has its own" in error_of("runner.score", *flags)
