"""KL-SOAP (Lin et al. 2025, arXiv 2509.03378): KLSOAP of heavyball 3.2.1. pytorch_optimizer 4.1.0 does not have it.

SOAP whose factors are averages of gradients preconditioned on the other side. This is for matrices, so dimensions of
convolutions are merged while their product is at most 2,048. Hyperparameters are SOAP's.
"""

from typing import Any

from runner.baselines import data_selection, get_batch_size, prepare_for_eval, update_params, with_schedule
from runner.baselines.eager_heavyball import heavyball, soap_options

__all__ = ["data_selection", "get_batch_size", "init_optimizer_state", "prepare_for_eval", "update_params"]


def init_optimizer_state(workload: Any, model_params: Any, model_state: Any, hyperparameters: Any, rng: Any) -> dict[str, Any]:
    """Return the optimizer and its learning rate schedule."""
    optimizer = heavyball.KLSOAP(model_params.parameters(), **soap_options(hyperparameters))
    return with_schedule(optimizer, workload, hyperparameters)
