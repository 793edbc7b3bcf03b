"""Evaluate an average of the weights (`shampoo.averaging`). The learning rate follows a trapezoid."""

from typing import Any

from torch.optim import Optimizer

from runner import baselines
from shampoo.averaging import AveragedWeights
from shampoo.schedule import trapezoid


def with_averages(optimizer: Optimizer, model: Any, workload: Any, hyperparameters: Any) -> dict[str, Any]:
    """Return AlgoPerf's optimizer state: the optimizer, its schedule, and the averages."""
    state = baselines.with_schedule(optimizer, workload, hyperparameters, trapezoid)
    return {**state, "averages": AveragedWeights(model)}


def update_params(*, optimizer_state: dict[str, Any], **others: Any) -> Any:
    """Switch to the trained weights, which an evaluation replaced by their averages, take a step, and update the averages."""
    optimizer_state["averages"].train()
    result = baselines.update_params(optimizer_state=optimizer_state, **others)
    optimizer_state["averages"].update()
    return result


def prepare_for_eval(*, optimizer_state: dict[str, Any], **others: Any) -> Any:
    """Switch to the averages. A checkpoint written after this holds them as the model, and the trained weights as state."""
    optimizer_state["averages"].eval()
    return baselines.prepare_for_eval(optimizer_state=optimizer_state, **others)
