"""Many submissions on many workloads: what is run, what is kept, what a failing trial does, and the page about it."""

import runner  # noqa: F401  brings algoperf.spec

# isort: split

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from runner.suite import BASELINES, OURS, Entry, is_finished, parse_entry, plan

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "runner" / "tuning_search_space.json"
SUBMISSIONS = {  # what each does at its third step
    "ends": "raise spec.TrainingCompleteError",
    "fails": "raise ArithmeticError('no more')",
    "crashes": "os._exit(7)",
    "broken": "pass\nimport no_such_module\ndef other(**arguments):\n    pass",
    "waits": "time.sleep(3)\n    if arguments['global_step'] == 26:\n        raise spec.TrainingCompleteError",
}


def write_submission(folder, name):
    """A submission that is ours up to its third step; its path."""
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


def suite(folder, submissions, *flags, start=subprocess.run):
    """The command on airports_dlrm, with one of our points."""
    command = [sys.executable, "-m", "runner.suite", f"--submissions={','.join(f'{path}:{SPACE}' for path in submissions)}"]
    command += ["--workloads=airports_dlrm", "--num_tuning_trials=1", f"--experiment_dir={folder}", *flags]
    captured = {"capture_output": True, "timeout": 200, "check": False}
    # A shell's background jobs ignore Ctrl-C, and what they start inherits that.
    heeding = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    options = captured if start is subprocess.run else heeding
    return start(command, cwd=ROOT, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, **options)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Four submissions of which one ends well, and what the command printed."""
    folder = tmp_path_factory.mktemp("suite")
    paths = [write_submission(folder / "submissions", name) for name in ("ends", "fails", "crashes", "broken")]
    result = suite(folder / "out", paths, "--max_workers=2")
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "out", paths, result.stdout


def trial(folder, name):
    return folder / name / "study_1" / "airports_dlrm_pytorch" / "trial_1"


def test_a_failing_trial_is_a_miss_and_stops_nothing(done):
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


def test_the_report_names_what_was_measured_and_what_failed(done):
    folder, _, output = done
    text = (folder / "report" / "README.md").read_text()
    assert re.search(r"\d{4}-\d\d-\d\d, .*, torch ", text)
    assert "- fails/study_1/airports_dlrm_pytorch/trial_1: ArithmeticError: no more" in text
    assert "0 of 1" in output
    for picture in re.findall(r"\]\((.*\.png)\)", text):
        assert (folder / "report" / picture).read_bytes().startswith(b"\x89PNG"), picture


def test_the_same_command_runs_only_what_is_not_finished(done):
    folder, paths, _ = done
    before = {name: (trial(folder, name) / "eval_measurements.csv").stat().st_mtime_ns for name in ("ends", "fails")}
    result = suite(folder, paths[:2])
    assert "2 trials, 1 finished" in result.stdout
    assert (trial(folder, "ends") / "eval_measurements.csv").stat().st_mtime_ns == before["ends"]
    assert (trial(folder, "fails") / "error.txt").exists()
    assert result.returncode == 0


def test_an_interrupted_trial_goes_on(tmp_path):
    path = write_submission(tmp_path / "submissions", "waits")
    process = suite(tmp_path / "out", [path], start=subprocess.Popen)
    folder = trial(tmp_path / "out", "waits")
    deadline = time.time() + 100
    while not any(folder.glob("checkpoint_25")) and time.time() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    assert process.wait(timeout=60) != 0
    assert not is_finished(folder)
    result = suite(tmp_path / "out", [path])
    assert result.returncode == 0, result.stdout + result.stderr
    assert is_finished(folder)
    steps = pd.read_csv(folder / "eval_measurements.csv")
    assert list(steps["global_step"]) == [1, 25, 27]
    assert steps["preemption_count"].iloc[-1] == 1


def test_the_default_is_ours_and_all_baselines_with_five_points_each(tmp_path):
    entries = [parse_entry(text) for text in (OURS, *BASELINES)]
    assert [entry.name for entry in entries] == ["shampoo", "adamw", "muon", "nadamw", "schedule_free_adamw", "soap"]
    runs = plan(entries, ["mnist_vit", "pydoc_lm"], 3, 5, 0, tmp_path)
    assert len({run.folder(tmp_path) for run in runs}) == len(runs) == 6 * 2 * 3 * 5


@pytest.fixture
def entry(tmp_path):
    space = tmp_path / "space.json"
    space.write_text(json.dumps([{"x": 1}, {"x": 2}]))
    return Entry("s", ROOT / "submission.py", space)


def test_another_space_in_the_same_folder_is_refused(tmp_path, entry):
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
