"""NadamW: torch.optim.NAdam with decoupled weight decay, formerly the AlgoPerf baseline."""

from typing import Any

import torch

from runner.baselines import data_selection, get_batch_size, prepare_for_eval, update_params, with_schedule

__all__ = ["data_selection", "get_batch_size", "init_optimizer_state", "prepare_for_eval", "update_params"]


def make_optimizer(model: Any, hyperparameters: Any) -> torch.optim.Optimizer:
    """Return the optimizer."""
    h = hyperparameters
    options = {"lr": h.learning_rate, "betas": (h.beta1, h.beta2), "weight_decay": h.weight_decay}
    return torch.optim.NAdam(model.parameters(), **options, decoupled_weight_decay=True)


def init_optimizer_state(workload: Any, model_params: Any, model_state: Any, hyperparameters: Any, rng: Any) -> dict[str, Any]:
    """Return the optimizer and its learning rate schedule."""
    return with_schedule(make_optimizer(model_params, hyperparameters), workload, hyperparameters)
