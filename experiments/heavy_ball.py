"""SGD with heavy-ball momentum as an AlgoPerf submission: one of the three methods used by `experiments.targets`."""

from typing import Any

import torch

from runner.baselines import data_selection, get_batch_size, prepare_for_eval, update_params, with_schedule

__all__ = ["data_selection", "get_batch_size", "init_optimizer_state", "prepare_for_eval", "update_params"]


def init_optimizer_state(workload: Any, model_params: Any, model_state: Any, hyperparameters: Any, rng: Any) -> dict[str, Any]:
    """Return the optimizer and its schedule."""
    h = hyperparameters
    optimizer = torch.optim.SGD(model_params.parameters(), h.learning_rate, momentum=0.9, weight_decay=h.weight_decay)
    return with_schedule(optimizer, workload, hyperparameters)
