"""AdamW (Loshchilov & Hutter 2019)."""

from typing import Any

import torch

from runner.baselines import data_selection, get_batch_size, prepare_for_eval, update_params, with_schedule

__all__ = ["data_selection", "get_batch_size", "init_optimizer_state", "prepare_for_eval", "update_params"]


def init_optimizer_state(workload: Any, model_params: Any, model_state: Any, hyperparameters: Any, rng: Any) -> dict[str, Any]:
    """Return the optimizer and its learning rate schedule."""
    h = hyperparameters
    options = {"lr": h.learning_rate, "betas": (h.beta1, h.beta2), "weight_decay": h.weight_decay}
    optimizer = torch.optim.AdamW(model_params.parameters(), **options)
    return with_schedule(optimizer, workload, hyperparameters)
