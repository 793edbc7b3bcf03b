"""One trial: AlgoPerf's training loop and clock. Data, steps, and `prepare_for_eval` count as submission time; nothing else."""

import inspect
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import torch
from algoperf import spec

from . import distributed
from .files import read_json
from .logs import (
    LOGS,
    MetricLogger,
    checkpoints,
    count_rows,
    keep_rows,
    meta_data,
    read_checkpoint,
    save_checkpoint,
    starts,
    write_json,
)
from .submissions import describe
from .workloads.base import DEVICE, LaptopWorkload


@dataclass(frozen=True)
class Settings:
    """Settings from the flags, the same for every trial."""

    batch_size: int
    max_global_steps: int | None
    eval_every_steps: int | None  # None: every eval_period_time_sec, as in AlgoPerf
    save_checkpoints: bool = False
    save_intermediate_checkpoints: bool = False
    torch_compile: bool = False
    flags: dict[str, Any] = field(default_factory=dict)


TRAIN_STATE: dict[str, Any] = {  # at the start of a trial
    "validation_goal_reached": False,
    "test_goal_reached": False,
    "is_time_remaining": True,
    "last_eval_time": 0,
    "training_complete": False,
    "accumulated_submission_time": 0,
    "accumulated_eval_time": 0,
    "accumulated_logging_time": 0,
    "last_step_end_time": None,
}


def split(rng: np.ndarray, count: int) -> np.ndarray:
    """Return `count` random states derived from `rng`, shape (count, 2), int64 below 2^31."""
    words: np.ndarray = np.random.SeedSequence(rng.tolist()).generate_state(2 * count)
    return (words >> 1).astype(np.int64).reshape(count, 2)


def fold_in(rng: np.ndarray, data: int) -> np.ndarray:
    """Return a random state derived from `rng` and `data`, shape (2,)."""
    state: np.ndarray = split(np.append(rng, data), 1)[0]
    return state


def now() -> float:
    """Return the time in seconds once the device is idle: the latest rank's time, so that all ranks make the same decisions."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return float(max(distributed.all_gather(time.time())))


@dataclass
class Trial:
    """The state of a running trial."""

    workload: LaptopWorkload
    submission: ModuleType
    hyperparameters: Any
    folder: Path
    settings: Settings
    queue: Iterator[dict[str, Any]]
    model: Any
    model_state: Any
    optimizer_state: dict[str, Any]
    train_state: dict[str, Any]
    eval_results: list[tuple[int, dict[str, float]]]
    global_step: int
    preemption_count: int
    start: float = 0.0
    logger: MetricLogger | None = None  # on rank 0 only

    def arguments(self) -> dict[str, Any]:
        """Return the arguments that AlgoPerf passes to both `update_params` and `prepare_for_eval`."""
        return {
            "workload": self.workload,
            "current_param_container": self.model,
            "current_params_types": self.workload.model_params_types,
            "model_state": self.model_state,
            "hyperparameters": self.hyperparameters,
            "loss_type": self.workload.loss_type,
            "optimizer_state": self.optimizer_state,
            "eval_results": self.eval_results,
            "global_step": self.global_step,
        }


def run_trial(
    workload: LaptopWorkload,
    submission: ModuleType,
    hyperparameters: Any,
    rng_seed: int,
    folder: Path,
    settings: Settings,
    progress: Callable[[int, MetricLogger, bool, float], None],
) -> None:
    """Train until the targets are reached, the time is up, or the submission or `max_global_steps` ends the trial. Record
    which as "ended" in the last meta_data_K.json in `folder`, which is created if missing.

    Resume from the latest checkpoint in `folder`, if there is one. After every step, call `progress(global_step, logger,
    evaluated, submission_seconds)`; `logger.last` holds the latest metrics. With multiple ranks, only rank 0 logs, saves, and
    calls `progress`.
    """
    data_rng, optimizer_rng, model_rng, rng = split(np.array([0, rng_seed]), 4)
    model, model_state = workload.init_model_fn(model_rng)
    if settings.torch_compile:
        model.compile()
    trial = Trial(
        workload,
        submission,
        hyperparameters,
        folder,
        settings,
        queue=workload._build_input_queue(data_rng, "train", "", settings.batch_size),
        model=model,
        model_state=model_state,
        optimizer_state=submission.init_optimizer_state(workload, model, model_state, hyperparameters, optimizer_rng),
        train_state=dict(TRAIN_STATE),
        eval_results=[],
        global_step=0,
        preemption_count=0,
    )
    restore(trial)
    if distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"meta_data_{trial.preemption_count}.json", meta_data(workload, rng_seed))
        write_json(folder / f"flags_{trial.preemption_count}.json", settings.flags)
        target, higher_is_better = f"validation/{workload.target_metric_name}", workload.higher_is_better
        point = hyperparameters._asdict() if hyperparameters else {}  # a self-tuning submission has none
        durable = settings.save_checkpoints  # without them, a crash of the machine ends the trial anyway
        trial.logger = MetricLogger(folder, trial.global_step, target, higher_is_better, point, durable)
        workload.attach_metrics_logger(trial.logger)

    try:
        run_steps(trial, rng, progress)
        if trial.logger is not None:
            finish(trial, trial.logger)
    finally:
        if trial.logger is not None:
            trial.logger.finish()


def run_steps(trial: Trial, rng: np.ndarray, progress: Callable[[int, MetricLogger, bool, float], None]) -> None:
    """Take and evaluate steps until the trial has ended."""
    state = trial.train_state
    trial.start = state["last_step_end_time"] = now()
    while not has_ended(state):
        select_rng, update_rng, prepare_rng, eval_rng = split(fold_in(rng, trial.global_step), 4)
        step_end = step(trial, select_rng, update_rng)
        evaluated = evaluation_due(trial, step_end) and evaluate(trial, prepare_rng, eval_rng)
        if trial.logger is not None:
            progress(trial.global_step, trial.logger, evaluated, state["accumulated_submission_time"])
        state["last_step_end_time"] = now()


def finish(trial: Trial, logger: MetricLogger) -> None:
    """Save a trial that has ended, log its score, and write what ended it. If that is interrupted, `restore` drops the score
    that was logged, and it is done again.
    """
    state = trial.train_state
    save(trial)
    logger.append_scalar_metrics({"score": state["accumulated_submission_time"]}, trial.global_step, trial.preemption_count)
    meta = trial.folder / f"meta_data_{trial.preemption_count}.json"
    ended = ended_by(state, trial.global_step, trial.settings.max_global_steps)
    write_json(meta, {**read_json(meta), "ended": ended})


def ended_by(train_state: dict[str, Any], global_step: int, max_global_steps: int | None) -> str:
    """Return what ended a trial: "target", "time", "steps" or "submission"."""
    if train_state["validation_goal_reached"] and train_state["test_goal_reached"]:
        return "target"
    if not train_state["is_time_remaining"]:
        return "time"
    return "steps" if global_step >= (max_global_steps or math.inf) else "submission"


def has_ended(train_state: dict[str, Any]) -> bool:
    """Return True if training is complete, the time is up, or both targets are reached."""
    if train_state["training_complete"] or not train_state["is_time_remaining"]:
        return True
    return bool(train_state["validation_goal_reached"] and train_state["test_goal_reached"])


def evaluation_due(trial: Trial, step_end: float) -> bool:
    """Return True if an evaluation is due: after the first and last step, and between them by step count or by the clock."""
    if trial.train_state["training_complete"]:
        return True
    if every := trial.settings.eval_every_steps:
        return trial.global_step == 1 or trial.global_step % every == 0
    return bool(step_end - trial.train_state["last_eval_time"] >= trial.workload.eval_period_time_sec)


def step(trial: Trial, select_rng: np.ndarray, update_rng: np.ndarray) -> float:
    """Run and time one step of the submission; return the time at its end."""
    batch = trial.submission.data_selection(
        trial.workload,
        trial.queue,
        trial.optimizer_state,
        trial.model,
        trial.model_state,
        trial.hyperparameters,
        trial.global_step,
        select_rng,
    )
    arguments = {**trial.arguments(), "batch": batch, "rng": update_rng}
    if "train_state" in inspect.signature(trial.submission.update_params).parameters:
        arguments["train_state"] = MappingProxyType(trial.train_state)
    try:
        trial.optimizer_state, trial.model, trial.model_state = trial.submission.update_params(**arguments)
    except spec.TrainingCompleteError:
        trial.train_state["training_complete"] = True
    trial.global_step += 1
    if trial.global_step >= (trial.settings.max_global_steps or math.inf):
        trial.train_state["training_complete"] = True
    end = now()
    trial.train_state["accumulated_submission_time"] += end - trial.train_state["last_step_end_time"]
    return end


def evaluate(trial: Trial, prepare_rng: np.ndarray, eval_rng: np.ndarray) -> bool:
    """Run and time `prepare_for_eval`. If time remains, evaluate, log, and save, untimed. Return whether time remained."""
    state, workload = trial.train_state, trial.workload
    if prepare_for_eval := getattr(trial.submission, "prepare_for_eval", None):
        before = now()
        trial.optimizer_state, trial.model, trial.model_state = prepare_for_eval(**trial.arguments(), rng=prepare_rng)
        state["accumulated_submission_time"] += now() - before
    state["is_time_remaining"] = state["accumulated_submission_time"] < workload.max_allowed_runtime_sec
    if not state["is_time_remaining"]:
        return False
    before = now()
    model, batch_size = trial.model, workload.eval_batch_size
    result = workload.eval_model(batch_size, model, trial.model_state, eval_rng, "", None, trial.global_step)
    state["validation_goal_reached"] |= workload.has_reached_validation_target(result)
    state["test_goal_reached"] |= workload.has_reached_test_target(result)
    end = state["last_eval_time"] = now()
    state["accumulated_eval_time"] += end - before
    result["score"], result["total_duration"] = state["accumulated_submission_time"], end - trial.start
    result |= {name: value for name, value in state.items() if name.startswith("accumulated_")}
    trial.eval_results.append((trial.global_step, result))
    if trial.logger is not None:
        trial.logger.append_scalar_metrics(result, trial.global_step, trial.preemption_count, is_eval=True)
        save(trial)
    state["accumulated_logging_time"] += now() - end
    return True


SAVED_FIELDS = ("train_state", "eval_results", "global_step", "preemption_count")  # of Trial, as they are


def save(trial: Trial) -> None:
    """Write a checkpoint if --save_checkpoints is set."""
    if trial.settings.save_checkpoints:
        state = {
            # Without DDP's prefix, so that a checkpoint does not depend on the number of ranks.
            "model_params": distributed.unwrap(trial.model).state_dict(),
            "optimizer_state": {key: x.state_dict() for key, x in trial.optimizer_state.items() if hasattr(x, "state_dict")},
            "model_state": trial.model_state,
            "log_rows": count_rows(trial.folder),
            **{name: getattr(trial, name) for name in SAVED_FIELDS},
        }
        save_checkpoint(trial.folder, state, trial.settings.save_intermediate_checkpoints)


def restore(trial: Trial) -> None:
    """Load the latest checkpoint in the trial's folder, if there is one; drop what was logged later, and skip the batches that
    were already used. Raise ValueError if it does not fit.
    """
    if not (paths := checkpoints(trial.folder)):
        return
    checkpoint = read_checkpoint(paths[-1], DEVICE)
    try:
        distributed.unwrap(trial.model).load_state_dict(checkpoint["model_params"])
        for key, value in checkpoint["optimizer_state"].items():
            trial.optimizer_state[key].load_state_dict(value)
        trial.model_state = checkpoint["model_state"]
        for name in SAVED_FIELDS:
            setattr(trial, name, checkpoint[name])
        rows = {name: int(checkpoint["log_rows"][name]) for name in LOGS}
    except Exception as error:
        raise ValueError(
            f"{paths[-1]} does not fit the submission or the workload: {describe(error)}; resume with those that wrote it, or "
            f"move {trial.folder} away to begin the trial anew"
        ) from error
    if distributed.rank() == 0:
        keep_rows(trial.folder, rows)
    if not has_ended(trial.train_state):
        trial.preemption_count = starts(trial.folder)
        trial.queue = islice(trial.queue, trial.global_step, None)
