"""SOAP (Vyas et al. 2024): Adam in the eigenbasis of Shampoo's factors. Hyperparameters are from the authors' code.

Vectors take Adam's step. They have no factors, and neither have dimensions above 1,024, as the rows of a large embedding: their
eigenvectors would take longer than training. The first step only initializes the bases; it does not change the weights.
"""

from typing import Any

from pytorch_optimizer import SOAP

from runner.baselines import data_selection, get_batch_size, prepare_for_eval, update_params, with_schedule

__all__ = ["data_selection", "get_batch_size", "init_optimizer_state", "prepare_for_eval", "update_params"]


def make_optimizer(model: Any, hyperparameters: Any) -> SOAP:
    """Return the optimizer."""
    h = hyperparameters
    options: dict[str, Any] = {"lr": h.learning_rate, "betas": (h.beta1, h.beta2), "weight_decay": h.weight_decay}
    options |= {"precondition_frequency": h.precondition_frequency, "max_precondition_dim": 1024}
    return SOAP(model.parameters(), **options)


def init_optimizer_state(workload: Any, model_params: Any, model_state: Any, hyperparameters: Any, rng: Any) -> dict[str, Any]:
    """Return the optimizer and its learning rate schedule."""
    return with_schedule(make_optimizer(model_params, hyperparameters), workload, hyperparameters)
