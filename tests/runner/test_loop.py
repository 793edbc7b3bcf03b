"""The training loop: its clock, when it evaluates, and resuming."""

import runner  # noqa: F401  makes algoperf.spec importable

# isort: split

import collections
import inspect
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from algoperf import spec
from commands import ROOT

import submission
from runner import loop
from runner.logs import checkpoints
from runner.search_space import read_points
from runner.workloads import WORKLOADS, load_workload
from runner.workloads.base import rows

FAST = {"pydoc_lm"}  # with dropout


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in WORKLOADS])
def test_a_resumed_trial_equals_an_uninterrupted_one_bit_for_bit(tmp_path, name, monkeypatch):
    """Weights, optimizer and batch norm buffers are equal; dropout and data order continue where they stopped."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    point = read_points(ROOT / "tuning_search_space.json", 1, seed=0)[0]._replace(precondition_frequency=2)
    assert point.dropout_rate > 0

    def train_to(step, folder):
        settings = loop.Settings(16, step, None, True, True, False, {})
        workload = load_workload(name)
        for split in ("eval_train", "validation", "test"):  # small: evaluation is not tested here
            workload._splits[split] = rows(workload._splits[split], slice(40))
        workload.max_allowed_runtime_sec = np.inf
        workload.validation_target_value = np.inf if workload.higher_is_better else -np.inf
        loop.run_trial(workload, submission, point, 3, folder, settings, lambda *_: None)
        return torch.load(folder / f"checkpoint_{step}", weights_only=True)

    half = train_to(3, tmp_path / "halves")
    half["train_state"]["training_complete"] = False  # as in a checkpoint written during training
    torch.save(half, tmp_path / "halves" / "checkpoint_3")
    resumed, uninterrupted = train_to(6, tmp_path / "halves"), train_to(6, tmp_path / "uninterrupted")
    assert (resumed["preemption_count"], uninterrupted["preemption_count"]) == (1, 0)
    for key, expected in uninterrupted["model_params"].items():
        assert torch.equal(resumed["model_params"][key], expected)
    for i, state in uninterrupted["optimizer_state"]["optimizer"]["state"].items():
        assert all(torch.equal(resumed["optimizer_state"]["optimizer"]["state"][i][key], x) for key, x in state.items())


class Clock:
    """A clock that only the test advances."""

    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        return self.time


@pytest.fixture
def timed_trial(monkeypatch, tmp_path):
    """Return a function that runs a trial with 1 s per step, 0.25 s per preparation and 10 s per evaluation, due every 3 s."""
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
        point = collections.namedtuple("Hyperparameters", [])()
        loop.run_trial(workload, submission, point, 0, tmp_path, settings, lambda *_: None)
        return calls, pd.read_csv(tmp_path / "eval_measurements.csv"), torch.load(checkpoints(tmp_path)[-1])

    return go


def test_steps_and_preparation_count_as_submission_time_and_evaluation_does_not(timed_trial):
    calls, evaluations, _ = timed_trial(budget=9)
    # After step 1, then whenever 3 s have passed since the last evaluation ended; at 9 s time is up, without an evaluation.
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


def test_evaluations_may_be_due_every_few_steps(timed_trial):
    _, evaluations, _ = timed_trial(budget=100, complete=8, every=4)
    assert list(evaluations["global_step"]) == [1, 4, 8, 9]
