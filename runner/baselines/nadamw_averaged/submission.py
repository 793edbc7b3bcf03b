"""NadamW with a trapezoid schedule; averages of the weights are evaluated."""

from typing import Any

from runner.baselines import data_selection, get_batch_size
from runner.baselines.averaged import prepare_for_eval, update_params, with_averages
from runner.baselines.nadamw.submission import make_optimizer

__all__ = ["data_selection", "get_batch_size", "init_optimizer_state", "prepare_for_eval", "update_params"]


def init_optimizer_state(workload: Any, model_params: Any, model_state: Any, hyperparameters: Any, rng: Any) -> dict[str, Any]:
    """Return the optimizer, its learning rate schedule, and the averages."""
    return with_averages(make_optimizer(model_params, hyperparameters), model_params, workload, hyperparameters)
