"""The command `python -m runner`: its files, its output, resuming, bad input."""

import json
import re
import shutil
import signal

import pandas as pd
import pytest
import torch
from commands import ROOT, arguments, call, error_of, start

from runner.workloads import WORKLOADS
from runner.workloads.pydoc_lm import PydocLM


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run two points for three steps each. Return the output and the folder."""
    folder = tmp_path_factory.mktemp("run")
    flags = [
        "--num_tuning_trials=2",
        "--max_global_steps=3",
        "--set_pytorch_max_split_size",
        "--rng_seed=7",
        "--data_dir=/nowhere",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PydocLM, "eval_period_time_sec", 3600)  # no evaluation between the first and the last step
        return call("runner.__main__", *arguments(folder, *flags)), folder / "e" / "pydoc_lm_pytorch"


def test_first_line_says_where_spec_comes_from(finished):
    output, _ = finished
    assert "algoperf" in output.splitlines()[0]
    assert "--data_dir has no meaning here" in output


def test_the_files_are_algoperfs(finished):
    _, folder = finished
    for trial in ("trial_1", "trial_2"):
        files = [path for path in (folder / trial).rglob("*") if path.is_file()]
        names = {re.sub(r"tfevents.*", "tfevents", path.name) for path in files}
        assert names == {
            "hparams.json", "meta_data_0.json", "flags_0.json", "measurements.csv", "eval_measurements.csv", "checkpoint_1",
            "checkpoint_3", "events.out.tfevents",
        }  # fmt: skip
    assert (
        json.loads((folder / "trial_2" / "hparams.json").read_text())
        == json.loads((ROOT / "tuning_search_space.json").read_text())[1]
    )


def test_the_columns_are_algoperfs(finished):
    """The columns are those that AlgoPerf's runner writes for mnist, except that the only metric here is the loss."""
    evaluations = pd.read_csv(finished[1] / "trial_1" / "eval_measurements.csv")
    assert list(evaluations.columns) == [
        "accumulated_eval_time", "accumulated_logging_time", "accumulated_submission_time", "global_step", "preemption_count",
        "score", "test/loss", "test/num_examples", "total_duration", "train/loss", "validation/loss", "validation/num_examples",
    ]  # fmt: skip
    assert list(evaluations["global_step"]) == [1, 3]  # the first and the last step are always evaluated
    assert (evaluations["score"] == evaluations["accumulated_submission_time"]).all()
    assert evaluations["score"].is_monotonic_increasing
    everything = pd.read_csv(finished[1] / "trial_1" / "measurements.csv")
    assert list(everything.columns[:4]) == ["global_step", "grad_norm", "learning_rate", "loss"]
    assert len(everything) == 1 + 2 + 1  # one logged step, two evaluations, the final score


def test_it_ends_with_a_table_and_a_picture(finished):
    output, folder = finished
    table = output[output.index("trial 1 ") :]
    assert all(row in table for row in ("learning_rate", "steps to target", "best validation/loss", "0 of 2 trials reached"))
    assert "epsilon" not in table  # only hyperparameters that differ
    assert (folder / "validation.png").read_bytes().startswith(b"\x89PNG")


def test_an_existing_experiment_is_not_touched(finished):
    _, folder = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    error = error_of("runner.__main__", *arguments(folder.parents[1], "--max_global_steps=1"))
    assert all(word in error for word in (str(folder), "--resume_last_run", "--overwrite"))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_finished_trial_is_left_unchanged(finished, tmp_path):
    """Resuming it adds nothing; a different seed is refused."""
    copy = tmp_path / "e" / "pydoc_lm_pytorch"
    shutil.copytree(finished[1], copy)

    def contents():
        return {path.name: path.read_bytes() for path in (copy / "trial_1").rglob("*") if path.is_file()}

    before = contents()
    argv = arguments(tmp_path, "--resume_last_run", "--num_tuning_trials=2", "--max_global_steps=9")
    assert "0 of 2 trials reached" in call("runner.__main__", *argv)
    assert contents() == before
    assert "was begun with --rng_seed=7, not 8" in error_of("runner.__main__", *argv, "--rng_seed=8")


ALGOPERFS = """
import torch
from algoperf import spec
from algoperf.pytorch_utils import pytorch_setup

PARALLEL, RANK, DEVICE, N_GPUS = pytorch_setup()
BATCH_SIZES = {"mnist_vit": 16, "fsdd_lstm": None}

def get_batch_size(workload_name):
    return BATCH_SIZES[workload_name]

def init_optimizer_state(workload, model_params, model_state, hyperparameters, rng):
    rate = 0.5 if hyperparameters is None else hyperparameters.rate
    return {"optimizer": torch.optim.SGD(model_params.parameters(), lr=rate)}

def update_params(workload, current_param_container, model_state, hyperparameters, optimizer_state, batch, **others):
    assert len(batch["inputs"]) in (16, 32) and hyperparameters is None and not PARALLEL and RANK == 0
    return optimizer_state, current_param_container, model_state

def data_selection(workload, input_queue, *others):
    return next(input_queue)
"""


@pytest.fixture
def algoperfs(tmp_path):
    """The flag that names a submission with the imports of AlgoPerf's."""
    (tmp_path / "algoperfs.py").write_text(ALGOPERFS)
    return f"--submission_path={tmp_path / 'algoperfs.py'}"


def without_space(*argv):
    """Return the arguments without a search space, for self-tuning."""
    return [flag for flag in argv if not flag.startswith("--tuning_search_space")] + ["--tuning_ruleset=self"]


def test_a_submission_may_tune_itself(tmp_path, algoperfs):
    """There is one trial, without hyperparameters, and half as much time again."""
    argv = arguments(tmp_path, algoperfs, "--max_global_steps=2", workload="mnist_vit")
    assert "0 of 1 trials reached the target" in call("runner.__main__", *without_space(*argv))
    trial = tmp_path / "e" / "mnist_vit_pytorch" / "trial_1"
    assert json.loads((trial / "hparams.json").read_text()) == {}
    assert json.loads((trial / "meta_data_0.json").read_text())["workload.max_allowed_runtime_sec"] == 90
    assert "omit --tuning_search_space" in error_of("runner.__main__", *argv, "--tuning_ruleset=self")
    error = error_of("runner.__main__", *without_space(*argv), "--tuning_ruleset=external")
    assert "--tuning_search_space is missing; give a JSON file, or --tuning_ruleset=self" in error


def test_a_batch_size_is_the_submissions_or_the_workloads(tmp_path, algoperfs):
    """A submission that has none raises ValueError, or KeyError from a dictionary."""
    argv = without_space(*arguments(tmp_path, algoperfs, "--max_global_steps=1"))
    assert "get_batch_size does not know pydoc_lm; using the workload's batch size, 32" in call("runner.__main__", *argv)
    error = error_of("runner.__main__", *argv, "--workload=fsdd_lstm")
    assert "get_batch_size('fsdd_lstm') returned None; it must return an integer >= 1, or raise ValueError" in error


def test_a_search_space_of_another_size_than_the_trials_is_named(tmp_path, algoperfs):
    """Too few points end the command before the first trial; more points than trials are a line of output."""
    (tmp_path / "space.json").write_text(json.dumps([{"rate": rate} for rate in (0.1, 0.2, 0.3)]))
    argv = arguments(tmp_path, algoperfs, f"--tuning_search_space={tmp_path / 'space.json'}", "--max_global_steps=1")
    error = error_of("runner.__main__", *argv, "--num_tuning_trials=4")
    assert error.startswith(f"error: {tmp_path / 'space.json'} has 3 points for 4 trials; ask for fewer")
    assert not (tmp_path / "e").exists()
    for asked in (2, 3):
        with pytest.raises(SystemExit) as stopped:  # the submission's step fails, since it has hyperparameters
            call("runner.__main__", *argv, f"--num_tuning_trials={asked}", "--overwrite")
        (output,) = stopped.value.__notes__
        notice = f"{tmp_path / 'space.json'} has 3 points; --num_tuning_trials={asked} takes the first {asked}"
        assert (notice in output.splitlines()) == (asked == 2)


def test_a_submission_that_cannot_tune_itself_is_named(tmp_path):
    argv = arguments(tmp_path, f"--submission_path={ROOT / 'runner/baselines/adamw/submission.py'}")
    error = error_of("runner.__main__", *without_space(*argv))
    assert re.search(
        r"adamw/submission\.py needs the hyperparameter \w+, so it cannot tune itself; give it a search space", error
    )


def test_a_hyperparameter_that_the_point_lacks_is_named(tmp_path, algoperfs):
    error = error_of("runner.__main__", *arguments(tmp_path, algoperfs))
    assert error == "error: tuning_search_space.json, point 1 lacks the hyperparameter rate, which the submission needs; add it"


FAILING = """
from submission import *
import submission

def update_params(**arguments):
    if arguments["hyperparameters"].grafting == "sgd":
        raise ArithmeticError("diverged\\nat step 0")
    return submission.update_params(**arguments)
"""


def test_trials_continue_after_one_that_fails(tmp_path):
    """The terminal shows its error in one line, and the exit status is 1."""
    (tmp_path / "failing.py").write_text(FAILING)
    flags = [f"--submission_path={tmp_path / 'failing.py'}", "--num_tuning_trials=4", "--max_global_steps=1"]
    with pytest.raises(SystemExit, match="error: 1 of 2 trials failed: trial_3") as stopped:
        call("runner.__main__", *arguments(tmp_path, *flags, "--hparam_start_index=2"))
    (output,) = stopped.value.__notes__
    assert "trial 3 failed: ArithmeticError: diverged at step 0 (failing.py, line 7); see " in output
    assert "ArithmeticError: diverged\nat step 0" in (tmp_path / "e/pydoc_lm_pytorch/trial_3/error.txt").read_text()
    assert "trial 4" in output
    assert "; 1 failed" in output


def test_a_run_in_which_all_trials_fail_says_so(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    flags = [f"--submission_path={tmp_path / 'failing.py'}", "--num_tuning_trials=3", "--hparam_start_index=2"]
    assert (
        error_of("runner.__main__", *arguments(tmp_path, *flags))
        == "error: 1 of 1 trials failed: trial_3; no trial was evaluated"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--workload=mnist_resnt"],
            f"unknown workload 'mnist_resnt'; it must be one of {', '.join(WORKLOADS)}, or path/to/file.py:Class; "
            "did you mean mnist_resnet?",
        ),
        (["--submission_path=nothing.py"], "the submission path is 'nothing.py'; it must be a Python file that exists"),
        (["--submission_path=runner/data.py"], "lacks get_batch_size, init_optimizer_state, update_params, data_selection"),
        (["--tuning_search_space=nothing.json"], "the search space nothing.json cannot be read"),
        (["--hparam_start_index=1"], "--hparam_start_index and --hparam_end_index leave none of the 1 points"),
        (["--experiment_name=../elsewhere"], "the experiment name is '../elsewhere'; it must name a folder inside"),
    ],
)
def test_bad_flags_are_named_with_their_remedy(tmp_path, flags, message):
    error = error_of("runner.__main__", *arguments(tmp_path / "inside", *flags))
    assert error.startswith("error: ")
    assert message in error
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_bad_flag_ends_the_process_with_status_1_and_no_traceback(tmp_path):
    result = start("runner", *arguments(tmp_path / "inside", "--submission_path=nothing.py"), check=False)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        "error: the submission path is 'nothing.py'; it must be a Python file that exists"
    )
    assert "Traceback" not in result.stderr
    assert not any(tmp_path.iterdir())


def test_every_point_is_checked_before_the_first_trial(tmp_path):
    points = json.loads((ROOT / "tuning_search_space.json").read_text())
    del points[1]["epsilon"], points[0]["epsilon"], points[2]["epsilon"], points[3]["epsilon"], points[4]["epsilon"]
    (tmp_path / "space.json").write_text(json.dumps(points))
    flags = [f"--tuning_search_space={tmp_path / 'space.json'}", "--num_tuning_trials=2"]
    error = error_of("runner.__main__", *arguments(tmp_path, *flags))
    assert re.search(r"space\.json, point 1: .*missing: \['epsilon'\]", error)
    assert not (tmp_path / "e").exists()


DYING = """
import os, random, signal, threading
from submission import *
import submission

def update_params(**arguments):
    if arguments["global_step"] == 1:
        threading.Timer(random.random() * 0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
    if arguments["global_step"] == 59:
        threading.Event().wait()  # the last step never ends
    return submission.update_params(**arguments)
"""


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    """Weights, optimizer, schedule and learning rate survive a SIGKILL at a random moment after the first evaluation."""
    flags = [
        "--tuning_search_space=runner/tuning_search_space.json",
        "--max_global_steps=60",
        "--eval_every_steps=4",
        "--rng_seed=3",
    ]
    start("runner", *arguments(tmp_path, *flags, workload="flights_dlrm", name="uninterrupted"))
    (tmp_path / "dying.py").write_text(DYING)
    killed = arguments(tmp_path, *flags, workload="flights_dlrm", name="killed")
    process = start("runner", *killed, f"--submission_path={tmp_path / 'dying.py'}", check=False)
    assert process.returncode == -signal.SIGKILL
    start("runner", *killed, "--resume_last_run")
    expected, found = (
        torch.load(tmp_path / name / "flights_dlrm_pytorch/trial_1/checkpoint_60", weights_only=True)
        for name in ("uninterrupted", "killed")
    )
    assert found["preemption_count"] == 1
    for key in ("model_params", "optimizer_state"):
        assert_equal(expected[key], found[key])


def assert_equal(x, y):
    """Assert that nested containers are equal bit for bit."""
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
