"""One trial: AlgoPerf's training loop, with its clock. Timed are steps, data and `prepare_for_eval`; evaluation and logging are not."""

import inspect
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import torch
from algoperf import spec

from .logs import MetricLogger, latest_checkpoint, meta_data, save_checkpoint, write_json
from .workloads.base import DEVICE, LaptopWorkload


@dataclass(frozen=True)
class Settings:
    """What the flags say about every trial."""

    batch_size: int
    max_global_steps: int | None
    save_checkpoints: bool
    save_intermediate_checkpoints: bool
    torch_compile: bool
    flags: dict[str, Any]


def split(rng: np.ndarray, count: int) -> np.ndarray:
    """(count, 2) random states from one; each is two ints below 2^31."""
    return (np.random.SeedSequence(rng.tolist()).generate_state(2 * count) >> 1).astype(np.int64).reshape(count, 2)


def fold_in(rng: np.ndarray, data: int) -> np.ndarray:
    """A random state for each value of data."""
    return split(np.append(rng, data), 1)[0]


def now() -> float:
    """Seconds, after the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.time()


def run_trial(
    workload: LaptopWorkload,
    submission: ModuleType,
    hyperparameters: Any,
    rng_seed: int,
    folder: Path,
    settings: Settings,
    progress: Callable[[int, MetricLogger, bool], None],
) -> None:
    """Train until both targets are reached, the time is up, or the submission or max_global_steps ends it; continue a checkpoint.

    `progress` is called after every step with the step, the logger, whose `last` holds the newest metrics, and whether it evaluated.
    """
    data_rng, optimizer_rng, model_rng, rng = split(np.array([0, rng_seed]), 4)
    model, model_state = workload.init_model_fn(model_rng)
    if settings.torch_compile:
        model = torch.compile(model)
    optimizer_state = submission.init_optimizer_state(workload, model, model_state, hyperparameters, optimizer_rng)
    queue = workload._build_input_queue(data_rng, "train", "", settings.batch_size)

    train_state: dict[str, Any] = {
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
    eval_results: list[tuple[int, dict[str, float]]] = []
    global_step, preemption_count = 0, 0
    if (checkpoint := latest_checkpoint(folder, DEVICE)) is not None:
        model.load_state_dict(checkpoint["model_params"])
        for key, value in optimizer_state.items():
            value.load_state_dict(checkpoint["optimizer_state"][key])
        train_state, eval_results = checkpoint["train_state"], list(checkpoint["eval_results"])
        global_step, preemption_count = checkpoint["global_step"], checkpoint["preemption_count"] + 1
        queue = itertools.islice(queue, global_step, None)

    write_json(folder / f"meta_data_{preemption_count}.json", meta_data(workload, rng_seed))
    write_json(folder / f"flags_{preemption_count}.json", settings.flags)
    logger = MetricLogger(folder)
    workload.attach_metrics_logger(logger)

    def save() -> None:
        if settings.save_checkpoints:
            state = {
                "model_params": model.state_dict(),
                "optimizer_state": {key: value.state_dict() for key, value in optimizer_state.items()},
                "model_state": model_state,
                "train_state": train_state,
                "eval_results": tuple(eval_results),
                "global_step": global_step,
                "preemption_count": preemption_count,
            }
            save_checkpoint(folder, state, settings.save_intermediate_checkpoints)

    def common() -> dict[str, Any]:  # what AlgoPerf passes to update_params and prepare_for_eval alike
        return {
            "workload": workload,
            "current_param_container": model,
            "current_params_types": workload.model_params_types,
            "model_state": model_state,
            "hyperparameters": hyperparameters,
            "loss_type": workload.loss_type,
            "optimizer_state": optimizer_state,
            "eval_results": eval_results,
            "global_step": global_step,
        }

    takes_train_state = "train_state" in inspect.signature(submission.update_params).parameters
    prepare_for_eval = getattr(submission, "prepare_for_eval", None)
    start = train_state["last_step_end_time"] = now()
    while train_state["is_time_remaining"] and not finished(train_state):
        select_rng, update_rng, prepare_rng, eval_rng = split(fold_in(rng, global_step), 4)
        batch = submission.data_selection(
            workload, queue, optimizer_state, model, model_state, hyperparameters, global_step, select_rng
        )
        extra = {"train_state": MappingProxyType(train_state)} if takes_train_state else {}
        try:
            optimizer_state, model, model_state = submission.update_params(**common(), batch=batch, rng=update_rng, **extra)
        except spec.TrainingCompleteError:
            train_state["training_complete"] = True
        global_step += 1
        if global_step == settings.max_global_steps:
            train_state["training_complete"] = True
        step_end = now()
        train_state["accumulated_submission_time"] += step_end - train_state["last_step_end_time"]

        if step_end - train_state["last_eval_time"] >= workload.eval_period_time_sec or train_state["training_complete"]:
            del batch
            if prepare_for_eval is not None:
                before = now()
                optimizer_state, model, model_state = prepare_for_eval(**common(), rng=prepare_rng)
                train_state["accumulated_submission_time"] += now() - before
            train_state["is_time_remaining"] = train_state["accumulated_submission_time"] < workload.max_allowed_runtime_sec
            if train_state["is_time_remaining"]:
                before = now()
                result = workload.eval_model(workload.eval_batch_size, model, model_state, eval_rng, "", None, global_step)
                train_state["validation_goal_reached"] |= workload.has_reached_validation_target(result)
                train_state["test_goal_reached"] |= workload.has_reached_test_target(result)
                train_state["last_eval_time"] = logging_start = now()
                train_state["accumulated_eval_time"] += logging_start - before
                result["score"] = train_state["accumulated_submission_time"]
                result["total_duration"] = logging_start - start
                for name in ("accumulated_submission_time", "accumulated_eval_time", "accumulated_logging_time"):
                    result[name] = train_state[name]
                eval_results.append((global_step, result))
                logger.append_scalar_metrics(result, global_step, preemption_count, is_eval=True)
                save()
                train_state["accumulated_logging_time"] += now() - logging_start
        progress(global_step, logger, bool(eval_results) and eval_results[-1][0] == global_step)
        train_state["last_step_end_time"] = now()

    logger.append_scalar_metrics({"score": train_state["accumulated_submission_time"]}, global_step, preemption_count)
    logger.finish()
    save()


def finished(train_state: dict[str, Any]) -> bool:
    """Whether both targets are reached, or the trial was ended."""
    return train_state["training_complete"] or (train_state["validation_goal_reached"] and train_state["test_goal_reached"])
