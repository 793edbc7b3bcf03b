"""The local runner from outside: its files, its clock, resuming, bad input; and its workloads."""

import runner  # noqa: F401  brings algoperf.spec

# isort: split

import inspect
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from algoperf import spec

import submission
from runner import loop, report
from runner.logs import MetricLogger, append_row, drop_rows_after, experiment_folder, latest_checkpoint
from runner.search_space import read_points
from runner.workloads import WORKLOADS, load_workload
from runner.workloads.base import rows

ROOT = Path(__file__).parents[2]


def run(folder, *flags, name="e", workload="pydoc_lm", timeout=120, check=True):
    """Run the command line on one thread; the completed process."""
    command = [sys.executable, "-m", "runner", f"--workload={workload}", "--submission_path=submission.py"]
    if not any(flag.startswith("--tuning_search_space") for flag in flags):
        command.append("--tuning_search_space=tuning_search_space.json")
    command += [f"--experiment_dir={folder}", f"--experiment_name={name}", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two points, three steps each: its output and its folder."""
    folder = tmp_path_factory.mktemp("run")
    flags = (
        "--num_tuning_trials=2",
        "--max_global_steps=3",
        "--set_pytorch_max_split_size",
        "--rng_seed=7",
        "--data_dir=/nowhere",
    )
    return run(folder, *flags), folder / "e" / "pydoc_lm_pytorch"


def test_first_line_says_where_spec_comes_from(finished):
    result, _ = finished
    assert "algoperf" in result.stdout.splitlines()[0]
    assert "--data_dir has no meaning here" in result.stdout


def test_the_files_are_algoperfs(finished):
    _, folder = finished
    for trial in ("trial_1", "trial_2"):
        names = {re.sub(r"tfevents.*", "tfevents", path.name) for path in (folder / trial).iterdir()}
        assert names == {
            "hparams.json", "meta_data_0.json", "flags_0.json", "measurements.csv", "eval_measurements.csv", "checkpoint_3",
            "events.out.tfevents",
        }  # fmt: skip
    assert (
        json.loads((folder / "trial_2" / "hparams.json").read_text())
        == json.loads((ROOT / "tuning_search_space.json").read_text())[1]
    )


def test_the_columns_are_algoperfs(finished):
    """As AlgoPerf's own runner wrote them for mnist; its metrics there are accuracy and loss, here the loss alone."""
    evaluations = pd.read_csv(finished[1] / "trial_1" / "eval_measurements.csv")
    assert list(evaluations.columns) == [
        "accumulated_eval_time", "accumulated_logging_time", "accumulated_submission_time", "global_step", "preemption_count",
        "score", "test/loss", "test/num_examples", "total_duration", "train/loss", "validation/loss", "validation/num_examples",
    ]  # fmt: skip
    assert list(evaluations["global_step"]) == [1, 3]  # the first step is always followed by an evaluation, and the last
    assert (evaluations["score"] == evaluations["accumulated_submission_time"]).all()
    assert evaluations["score"].is_monotonic_increasing
    everything = pd.read_csv(finished[1] / "trial_1" / "measurements.csv")
    assert list(everything.columns[:4]) == ["global_step", "grad_norm", "learning_rate", "loss"]
    assert len(everything) == 1 + 2 + 1  # one logged step, two evaluations, the final score


def test_it_ends_with_a_table_and_a_picture(finished):
    result, folder = finished
    table = result.stdout[result.stdout.index("trial 1 ") :]
    assert all(row in table for row in ("learning_rate", "steps to target", "best validation/loss", "0 of 2 trials reached"))
    assert "epsilon" not in table  # only what differs
    assert (folder / "validation.png").read_bytes().startswith(b"\x89PNG")


def test_an_existing_experiment_is_not_touched(finished):
    _, folder = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    result = run(folder.parents[1], "--max_global_steps=1", check=False)
    assert result.returncode == 1
    assert all(word in result.stderr for word in (str(folder), "--resume_last_run", "--overwrite"))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_resumed_trial_equals_an_uninterrupted_one(tmp_path, name):
    """Bit for bit: weights, optimizer, batch norm's buffers; dropout and data order go on where they stopped."""
    point = read_points(ROOT / "tuning_search_space.json", 1, seed=0)[0]._replace(precondition_frequency=2)
    assert point.dropout_rate > 0

    def train_to(step, folder):
        folder.mkdir(exist_ok=True)
        settings = loop.Settings(16, step, None, True, True, False, {})
        workload = load_workload(name)
        for split in ("eval_train", "validation", "test"):  # evaluation is not what is tested here
            workload._splits[split] = rows(workload._splits[split], slice(40))
        workload.validation_target_value = np.inf if workload.higher_is_better else -np.inf
        loop.run_trial(workload, submission, point, 3, folder, settings, lambda *_: None)
        return torch.load(folder / f"checkpoint_{step}", weights_only=True)

    half = train_to(3, tmp_path / "halves")
    half["train_state"]["training_complete"] = False  # as in a checkpoint that is written on the way
    torch.save(half, tmp_path / "halves" / "checkpoint_3")
    resumed, whole = train_to(6, tmp_path / "halves"), train_to(6, tmp_path / "whole")
    assert (resumed["preemption_count"], whole["preemption_count"]) == (1, 0)
    for key, expected in whole["model_params"].items():
        assert torch.equal(resumed["model_params"][key], expected)
    for i, state in whole["optimizer_state"]["optimizer"]["state"].items():
        assert all(torch.equal(resumed["optimizer_state"]["optimizer"]["state"][i][key], x) for key, x in state.items())


def test_resume_last_run_keeps_seed_and_hyperparameters(tmp_path):
    run(tmp_path, "--max_global_steps=2")
    trial = tmp_path / "e" / "pydoc_lm_pytorch" / "trial_1"
    checkpoint = torch.load(trial / "checkpoint_2", weights_only=True)
    checkpoint["train_state"]["training_complete"] = False
    torch.save(checkpoint, trial / "checkpoint_2")
    hyperparameters = (trial / "hparams.json").read_text()
    (tmp_path / "other.json").write_text(json.dumps(json.loads((ROOT / "tuning_search_space.json").read_text())[1:]))
    run(tmp_path, "--resume_last_run", "--max_global_steps=3", f"--tuning_search_space={tmp_path / 'other.json'}")
    assert list(pd.read_csv(trial / "eval_measurements.csv")["global_step"]) == [1, 2, 3]
    assert list(pd.read_csv(trial / "eval_measurements.csv")["preemption_count"]) == [0, 0, 1]
    seeds = [json.loads((trial / f"meta_data_{i}.json").read_text())["rng_seed"] for i in (0, 1)]
    assert seeds[0] == seeds[1]
    assert (trial / "hparams.json").read_text() == hyperparameters


def test_a_finished_trial_stays_as_it_is(finished, tmp_path):
    """Resuming it adds nothing; another seed than its own is refused."""
    copy = tmp_path / "e" / "pydoc_lm_pytorch"
    shutil.copytree(finished[1], copy)
    before = {path.name: path.read_bytes() for path in (copy / "trial_1").iterdir()}
    flags = ("--resume_last_run", "--num_tuning_trials=2", "--max_global_steps=9")
    assert "0 of 2 trials reached" in run(tmp_path, *flags).stdout
    assert {path.name: path.read_bytes() for path in (copy / "trial_1").iterdir()} == before
    refused = run(tmp_path, *flags, "--rng_seed=8", check=False)
    assert refused.returncode == 1
    assert "was begun with --rng_seed=7, not 8" in refused.stderr


def test_rows_after_the_checkpoint_are_forgotten(tmp_path):
    for step in (1, 40, 50):
        append_row(tmp_path / "m.csv", {"global_step": step, "loss": 0.5})
    drop_rows_after(tmp_path / "m.csv", 40)
    assert list(pd.read_csv(tmp_path / "m.csv")["global_step"]) == [1, 40]


@pytest.mark.parametrize("values", [[4.0, np.inf, np.inf], [np.nan, np.nan]])
def test_a_diverged_trial_can_be_drawn(tmp_path, values):
    evaluations = pd.DataFrame({"score": np.arange(len(values)), "validation/loss": values})
    report.plot_trials(load_workload("pydoc_lm"), "pydoc_lm", {1: ({}, evaluations)}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()


def test_a_trial_that_fails_leaves_the_others_running(tmp_path):
    (tmp_path / "failing.py").write_text(
        "from submission import *\n"
        "import submission\n"
        "def update_params(**arguments):\n"
        "    if arguments['hyperparameters'].grafting == 'sgd':\n"
        "        raise ArithmeticError('diverged')\n"
        "    return submission.update_params(**arguments)\n"
    )
    result = run(
        tmp_path,
        f"--submission_path={tmp_path / 'failing.py'}",
        "--num_tuning_trials=4",
        "--hparam_start_index=2",
        "--max_global_steps=1",
    )
    assert "trial 3 failed: ArithmeticError('diverged')" in result.stdout
    assert "diverged" in (tmp_path / "e/pydoc_lm_pytorch/trial_3/error.txt").read_text()
    assert "trial 4" in result.stdout
    assert "; 1 failed" in result.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--workload=mnist_resnt"],
            f"unknown workload 'mnist_resnt'; it must be one of {', '.join(WORKLOADS)}; did you mean mnist_resnet?",
        ),
        (["--submission_path=nothing.py"], "the submission path is 'nothing.py'; it must be a Python file that exists"),
        (["--submission_path=runner/data.py"], "lacks get_batch_size, init_optimizer_state, update_params, data_selection"),
        (["--tuning_search_space=nothing.json"], "the search space nothing.json cannot be read"),
        (["--hparam_start_index=1"], "--hparam_start_index and --hparam_end_index leave none of the 1 points"),
        (["--experiment_name=../elsewhere"], "the experiment name is '../elsewhere'; it must name a folder inside"),
    ],
)
def test_bad_flags_are_named_with_their_remedy(tmp_path, flags, message):
    result = run(tmp_path / "inside", *flags, check=False)
    assert result.returncode == 1
    assert f"error: {message}" in result.stderr or message in result.stderr
    assert "Traceback" not in result.stderr
    assert not tmp_path.exists() or not any(tmp_path.iterdir())


def test_every_point_is_checked_before_the_first_trial(tmp_path):
    points = json.loads((ROOT / "tuning_search_space.json").read_text())
    del points[1]["epsilon"], points[0]["epsilon"], points[2]["epsilon"], points[3]["epsilon"], points[4]["epsilon"]
    (tmp_path / "space.json").write_text(json.dumps(points))
    result = run(tmp_path, f"--tuning_search_space={tmp_path / 'space.json'}", "--num_tuning_trials=2", check=False)
    assert result.returncode == 1
    assert re.search(r"space\.json, point 1: .*missing: \['epsilon'\]", result.stderr)
    assert not (tmp_path / "e").exists()


class Clock:
    """Time that passes only where the test says so."""

    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        return self.time


@pytest.fixture
def timed_trial(monkeypatch, tmp_path):
    """Run a trial in which a step takes 1 s, preparing 0.25 s and evaluating 10 s; evaluations are due every 3 s."""
    clock, calls = Clock(), []
    workload = load_workload("pydoc_lm")
    workload.eval_period_time_sec = 3

    def update_params(**arguments):
        clock.time += 1
        calls.append(("step", arguments["global_step"], dict(arguments["train_state"])))
        with pytest.raises(TypeError):
            arguments["train_state"]["is_time_remaining"] = True  # read-only
        if arguments["global_step"] == complete_at:
            raise spec.TrainingCompleteError
        return arguments["optimizer_state"], arguments["current_param_container"], arguments["model_state"]

    # The runner passes train_state only to a submission that names it.
    update_params.__signature__ = inspect.Signature([inspect.Parameter("train_state", inspect.Parameter.KEYWORD_ONLY)])

    def prepare_for_eval(**arguments):
        clock.time += 0.25
        calls.append(("prepare", arguments["global_step"], arguments.keys()))
        return arguments["optimizer_state"], arguments["current_param_container"], arguments["model_state"]

    def eval_model(*arguments):
        clock.time += 10
        calls.append(("evaluate", arguments[-1], None))
        return {f"{split}/loss": 9.0 for split in ("train", "validation", "test")}

    submission = SimpleNamespace(
        init_optimizer_state=lambda *_: {},
        data_selection=lambda *_: None,
        update_params=update_params,
        prepare_for_eval=prepare_for_eval,
    )
    monkeypatch.setattr(loop, "now", clock)
    monkeypatch.setattr(workload, "eval_model", eval_model)
    complete_at = None

    def go(budget, complete=None, every=None):
        nonlocal complete_at
        complete_at, workload.max_allowed_runtime_sec = complete, budget
        settings = loop.Settings(16, None, every, True, False, False, {})
        loop.run_trial(workload, submission, None, 0, tmp_path, settings, lambda *_: None)
        return calls, pd.read_csv(tmp_path / "eval_measurements.csv"), torch.load(next(tmp_path.glob("checkpoint_*")))

    return go


def test_steps_and_preparation_are_timed_evaluation_is_not(timed_trial):
    calls, evaluations, _ = timed_trial(budget=9)
    # After step 1 always, then as soon as 3 s have passed since the last one's end; at 9 s the time is up: no evaluation.
    assert [call[:2] for call in calls if call[0] != "step"] == [
        ("prepare", 1), ("evaluate", 1), ("prepare", 4), ("evaluate", 4), ("prepare", 7), ("evaluate", 7), ("prepare", 10),
    ]  # fmt: skip
    assert list(evaluations["score"]) == [1.25, 4.5, 7.75]
    assert list(evaluations["accumulated_eval_time"]) == [10, 20, 30]
    assert list(evaluations["total_duration"]) == [11.25, 24.5, 37.75]
    assert calls[1][2] >= {"workload", "hyperparameters", "optimizer_state", "eval_results", "rng"}
    assert not calls[1][2] & {"batch", "train_state"}
    seen = next(state for name, step, state in calls if (name, step) == ("step", 4))
    assert seen["accumulated_submission_time"] == 4.5
    assert seen["accumulated_eval_time"] == 20
    assert seen["is_time_remaining"]


def test_a_submission_may_end_its_run(timed_trial):
    calls, evaluations, checkpoint = timed_trial(budget=100, complete=2)
    assert [step for name, step, _ in calls if name == "step"] == [0, 1, 2]
    assert list(evaluations["global_step"]) == [1, 3]
    assert checkpoint["train_state"]["training_complete"]


def test_evaluation_by_steps(timed_trial):
    _, evaluations, _ = timed_trial(budget=100, complete=8, every=4)
    assert list(evaluations["global_step"]) == [1, 4, 8, 9]


# Search spaces


def write(tmp_path, space):
    path = tmp_path / "space.json"
    path.write_text(json.dumps(space))
    return path


def test_a_list_space_gives_its_first_points(tmp_path):
    points = read_points(write(tmp_path, [{"a": i, "b": "x"} for i in range(5)]), 3, seed=0)
    assert [point._asdict() for point in points] == [{"a": i, "b": "x"} for i in range(3)]


def test_a_range_space_is_sampled_evenly_and_by_seed(tmp_path):
    space = {
        "lr": {"min": 1e-4, "max": 1e-1, "scaling": "log"},
        "momentum": {"min": 0.5, "max": 1.0, "scaling": "linear"},
        "grafting": {"feasible_points": ["adam", "sgd", "none"]},
    }
    path = write(tmp_path, space)
    points = read_points(path, 300, seed=1)
    assert points == read_points(path, 300, seed=1) != read_points(path, 300, seed=2)
    decades = np.histogram(np.log10([point.lr for point in points]), bins=[-4, -3, -2, -1])[0]
    halves = np.histogram([point.momentum for point in points], bins=[0.5, 0.75, 1.0])[0]
    thirds = [sum(point.grafting == name for point in points) for name in ("adam", "sgd", "none")]
    assert abs(decades - 100).max() <= 3  # random points would stray by 8
    assert abs(halves - 150).max() <= 3
    assert abs(np.array(thirds) - 100).max() <= 3


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ([{"a": 1, "b": 2}, {"a": 1}], r"point 2 must have the keys of point 1; they differ in \['b'\]"),
        ({"lr": {"min": 0.0, "max": 1.0, "scaling": "log"}}, "lr is .*; it must be"),
        ({"lr": {"min": 1.0, "max": 0.0, "scaling": "linear"}}, "lr is .*; it must be"),
        ({"lr": {"min": 1.0, "max": 2.0}}, "lr is .*; it must be"),
        ({"lr": {"feasible_points": []}}, "lr is .*; it must be"),
        ([], "must hold a list of points"),
        ("text", "must hold a list of points"),
        ([{"not a name": 1}], "not a name"),
    ],
)
def test_a_bad_space_is_refused(tmp_path, space, message):
    with pytest.raises(ValueError, match=message):
        read_points(write(tmp_path, space), 2, seed=0)


# Logs


def test_rows_are_appended_with_new_columns_behind(tmp_path):
    path = tmp_path / "m.csv"
    append_row(path, {"b": 1.0, "a": 2.0})
    append_row(path, {"c": 3.0, "a": 4.0})
    assert path.read_text() == "a,b,c\n2.0,1.0,\n4.0,,3.0\n"


def test_metrics_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = MetricLogger(tmp_path, first_step=0)
    logger.append_scalar_metrics({"loss": 2.0}, 0)
    logger.append_scalar_metrics({"loss": 1.5}, 50)
    logger.finish()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 2.0), (50, 1.5)]


@pytest.mark.parametrize("name", ["..", "../x", "/tmp/x", ".", ""])
def test_an_experiment_stays_inside_its_folder(tmp_path, name):
    with pytest.raises(ValueError, match="must name a folder inside"):
        experiment_folder(str(tmp_path / "a"), name, "w", resume=False, overwrite=True)


class Payload:
    """What a checkpoint must not be able to do when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_cannot_run_code(tmp_path):
    torch.save({"global_step": 1, "optimizer_state": Payload(tmp_path / "touched")}, tmp_path / "checkpoint_1")
    with pytest.raises(pickle.UnpicklingError):
        latest_checkpoint(tmp_path, torch.device("cpu"))
    assert not (tmp_path / "touched").exists()


def test_two_ranks_train_as_one_and_another_number_goes_on(tmp_path):
    """Each rank has half of a batch and half of the evaluation; the first one writes."""
    point = json.loads((ROOT / "runner" / "tuning_search_space.json").read_text())[0]
    space = tmp_path / "space.json"
    space.write_text(json.dumps([{**point, "epsilon": 1e-4, "learning_rate": 1e-3}]))  # where rounding stays small
    flags = [
        "--workload=airports_dlrm",
        "--submission_path=submission.py",
        f"--tuning_search_space={space}",
        f"--experiment_dir={tmp_path}",
        "--eval_every_steps=10",
        "--rng_seed=3",
    ]

    def start(ranks, name, steps):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        result = subprocess.run(
            [sys.executable, *launcher, "-m", "runner", *flags, f"--experiment_name={name}", f"--max_global_steps={steps}"]
            + (["--resume_last_run"] if (tmp_path / name).exists() else []),
            cwd=ROOT, capture_output=True, text=True, timeout=150, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    printed = start(2, "two", 20)
    assert printed.count("picture:") == 1
    saved = tmp_path / "two/airports_dlrm_pytorch/trial_1/checkpoint_20"
    checkpoint = torch.load(saved, weights_only=True)
    checkpoint["train_state"]["training_complete"] = False  # as in a checkpoint that is written on the way
    torch.save(checkpoint, saved)
    start(1, "two", 40)
    start(1, "one", 40)
    two, one = (pd.read_csv(tmp_path / name / "airports_dlrm_pytorch/trial_1/eval_measurements.csv") for name in ("two", "one"))
    assert list(two["global_step"]) == list(one["global_step"]) == [1, 10, 20, 30, 40]
    for split in ("train", "validation", "test"):
        np.testing.assert_allclose(two[f"{split}/loss"], one[f"{split}/loss"], rtol=1e-4)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    """kill -9 at whatever step it is, then --resume_last_run: weights, optimizer, schedule and learning rate are the same."""
    flags = (
        "--tuning_search_space=runner/tuning_search_space.json",
        "--max_global_steps=60",
        "--eval_every_steps=4",
        "--rng_seed=3",
    )
    run(tmp_path, *flags, workload="airports_dlrm", name="whole")
    command = [sys.executable, "-m", "runner", "--workload=airports_dlrm", "--submission_path=submission.py", *flags]
    command += [f"--experiment_dir={tmp_path}", "--experiment_name=killed"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        folder = tmp_path / "killed" / "airports_dlrm_pytorch" / "trial_1"
        while process.poll() is None and not any(folder.glob("checkpoint_*")):
            time.sleep(0.01)
        time.sleep(random.Random(os.getpid()).random() * 0.2)
        process.kill()
    run(tmp_path, *flags, "--resume_last_run", workload="airports_dlrm", name="killed")
    whole, killed = (
        torch.load(tmp_path / name / "airports_dlrm_pytorch/trial_1/checkpoint_60", weights_only=True)
        for name in ("whole", "killed")
    )
    assert killed["preemption_count"] == 1
    for key in ("model_params", "optimizer_state"):
        assert_equal(whole[key], killed[key])


def assert_equal(x, y):
    """Bit for bit."""
    if isinstance(x, dict):
        assert x.keys() == y.keys()
        for key in x:
            assert_equal(x[key], y[key])
    elif isinstance(x, (list, tuple)):
        assert len(x) == len(y)
        for pair in zip(x, y, strict=True):
            assert_equal(*pair)
    else:
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
