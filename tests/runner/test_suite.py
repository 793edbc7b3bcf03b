"""The suite of submissions and workloads: what it runs, what it keeps, how it handles failures, and its report."""

import runner  # noqa: F401  makes algoperf.spec importable

# isort: split

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from commands import ROOT, TIMEOUT, start

from runner.suite import BASELINES, OURS, Entry, is_finished, parse_entry, plan

SPACE = ROOT / "runner" / "tuning_search_space.json"
SUBMISSIONS = {  # what each does at its third step; "waits" at its 26th
    "ends": "raise spec.TrainingCompleteError",
    "fails": "raise ArithmeticError('no more')",
    "crashes": "os._exit(7)",
    "broken": "pass\nimport no_such_module\ndef other(**arguments):\n    pass",
    "waits": "while not os.path.exists(f'{__file__}.go'):\n        time.sleep(0.01)\n"
    "    if arguments['global_step'] == 26:\n        raise spec.TrainingCompleteError",
}


def write_submission(folder, name):
    """Write a submission that behaves like ours before that step. Return its path."""
    path = folder / name / "algorithm.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import os, time\n"
        "from algoperf import spec\n"
        "import submission as ours\n"
        "from submission import *\n"
        "def update_params(**arguments):\n"
        "    if arguments['global_step'] < 2 or arguments['global_step'] < 25 and 'waits' in __file__:\n"
        "        return ours.update_params(**arguments)\n"
        f"    {SUBMISSIONS[name]}\n"
        "    return ours.update_params(**arguments)\n"
    )
    return path


def arguments(folder, submissions, *flags):
    """Return the command line of a suite on airports_dlrm with one point of our search space."""
    names = ",".join(f"{path}:{SPACE}" for path in submissions)
    line = [f"--submissions={names}", "--workloads=airports_dlrm", "--num_tuning_trials=1", f"--experiment_dir={folder}"]
    return [*line, *flags]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Run four submissions, of which one ends normally. Return the folder, their paths and the output."""
    folder = tmp_path_factory.mktemp("suite")
    paths = [write_submission(folder / "submissions", name) for name in ("ends", "fails", "crashes", "broken")]
    result = start("runner.suite", *arguments(folder / "out", paths, "--max_workers=2"))
    return folder / "out", paths, result.stdout


def trial(folder, name):
    """Return the folder of a submission's only trial."""
    return folder / name / "study_1" / "airports_dlrm_pytorch" / "trial_1"


@pytest.mark.slow
def test_a_failing_trial_is_a_miss_and_stops_no_other(done):
    folder, _, output = done
    assert is_finished(trial(folder, "ends"))
    assert not is_finished(trial(folder, "fails"))
    assert "ArithmeticError: no more" in (trial(folder, "fails") / "error.txt").read_text()
    assert "exit status 7" in (trial(folder, "crashes") / "error.txt").read_text()
    assert "No module named 'no_such_module'" in (trial(folder, "broken") / "error.txt").read_text()
    assert "failed: " + str(trial(folder, "crashes")) in output
    scores = pd.read_csv(folder / "report" / "steps" / "scores.csv", index_col=0)
    assert set(scores.index) == {"ends", "fails", "crashes", "broken"}
    times = pd.read_csv(folder / "report" / "steps" / "times.csv", index_col=0)
    assert np.isinf(times["airports_dlrm"]).all()


@pytest.mark.slow
def test_the_report_states_what_was_measured_and_what_failed(done):
    folder, _, output = done
    text = (folder / "report" / "README.md").read_text()
    assert re.search(r"\d{4}-\d\d-\d\d, .*, torch ", text)
    assert "- fails/study_1/airports_dlrm_pytorch/trial_1: ArithmeticError: no more" in text
    assert "0 of 1" in output
    for picture in re.findall(r"\]\((.*\.png)\)", text):
        assert (folder / "report" / picture).read_bytes().startswith(b"\x89PNG"), picture


@pytest.mark.slow
def test_the_same_command_runs_only_unfinished_trials(done):
    folder, paths, _ = done
    before = {name: (trial(folder, name) / "eval_measurements.csv").stat().st_mtime_ns for name in ("ends", "fails")}
    assert "2 trials, 1 finished" in start("runner.suite", *arguments(folder, paths[:2])).stdout
    assert (trial(folder, "ends") / "eval_measurements.csv").stat().st_mtime_ns == before["ends"]
    assert (trial(folder, "fails") / "error.txt").exists()


@pytest.mark.slow
def test_an_interrupted_trial_resumes(tmp_path):
    path = write_submission(tmp_path / "submissions", "waits")
    argv, folder = arguments(tmp_path / "out", [path]), trial(tmp_path / "out", "waits")
    process = subprocess.Popen(
        [sys.executable, "-m", "runner.suite", *argv],
        cwd=ROOT,
        start_new_session=True,
        # A shell's background jobs ignore Ctrl-C, and child processes inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not (folder / "checkpoint_25").exists():  # after it, the trial waits for a file
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # like Ctrl-C
        assert process.wait(TIMEOUT) != 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert not is_finished(folder)
    path.with_name(f"{path.name}.go").touch()
    start("runner.suite", *argv)
    assert is_finished(folder)
    steps = pd.read_csv(folder / "eval_measurements.csv")
    assert list(steps["global_step"]) == [1, 25, 27]
    assert steps["preemption_count"].iloc[-1] == 1


def test_the_default_is_ours_and_all_baselines_with_five_points_each(tmp_path):
    entries = [parse_entry(text) for text in (OURS, *BASELINES)]
    assert [entry.name for entry in entries] == [
        "shampoo", "adamw", "kl_soap", "muon", "muon_conv", "nadamw", "nadamw_averaged", "psgd_kron", "schedule_free_adamw",
        "soap", "soap_averaged", "soap_lookahead",
    ]  # fmt: skip
    runs = plan(entries, ["mnist_vit", "pydoc_lm"], 3, 5, 0, tmp_path)
    assert len({run.folder(tmp_path) for run in runs}) == len(runs) == 12 * 2 * 3 * 5


@pytest.fixture
def entry(tmp_path):
    """Return an entry with two points."""
    space = tmp_path / "space.json"
    space.write_text(json.dumps([{"x": 1}, {"x": 2}]))
    return Entry("s", ROOT / "submission.py", space)


def test_a_different_space_in_the_same_folder_is_refused(tmp_path, entry):
    folder = tmp_path / "s" / "study_1" / "mnist_vit_pytorch" / "trial_2"
    folder.mkdir(parents=True)
    (folder / "hparams.json").write_text('{"x": 2}')
    assert len(plan([entry], ["mnist_vit"], 1, 2, 0, tmp_path)) == 2
    (folder / "hparams.json").write_text('{"x": 3}')
    with pytest.raises(ValueError, match=r"is not point 2 of .*space\.json; give another --experiment_dir"):
        plan([entry], ["mnist_vit"], 1, 2, 0, tmp_path)


def test_bad_input_is_named(tmp_path, entry):
    with pytest.raises(ValueError, match=r"unknown workload 'mnist_vt'; .*did you mean mnist_vit"):
        plan([entry], ["mnist_vt"], 1, 1, 0, tmp_path)
    with pytest.raises(ValueError, match=r"\['s'\] more than once; give them names"):
        plan([entry, entry._replace(search_space=SPACE)], ["mnist_vit"], 1, 1, 0, tmp_path)
    with pytest.raises(ValueError, match=r"space\.json has 2 points; --num_tuning_trials=3 needs at least 3"):
        plan([entry], ["mnist_vit"], 1, 3, 0, tmp_path)
    with pytest.raises(ValueError, match=r"no file /nowhere/submission\.py; it must be \[NAME=\]PATH\[:SEARCH_SPACE\]"):
        parse_entry("x=/nowhere/submission.py")


@pytest.mark.parametrize("name", ["..", "../x", "/tmp/x", "a/b", "."])
def test_a_submission_stays_inside_the_experiment(name):
    with pytest.raises(ValueError, match=f"--submissions has the name {re.escape(repr(name))}"):
        parse_entry(f"{name}={ROOT / 'submission.py'}:{SPACE}")
