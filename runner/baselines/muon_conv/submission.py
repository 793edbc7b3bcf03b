"""Muon for hidden matrices and convolutions, and AdamW for all other parameters: Muon of pytorch_optimizer 4.1.0.

A convolution is flattened to outputs x rest (inputs x rest if it is transposed). Like a matrix's, its step is scaled to the RMS
of AdamW's. All else is as in `muon`.
"""

import math
from typing import Any

from pytorch_optimizer import Muon

from runner.baselines import data_selection, get_batch_size, prepare_for_eval, update_params, with_schedule
from runner.baselines.muon.submission import split

__all__ = ["data_selection", "get_batch_size", "init_optimizer_state", "prepare_for_eval", "update_params"]


def init_optimizer_state(workload: Any, model_params: Any, model_state: Any, hyperparameters: Any, rng: Any) -> dict[str, Any]:
    """Return the optimizer and its learning rate schedule."""
    h = hyperparameters
    hidden, others = split(workload, model_params, max_ndim=math.inf)
    options = {"lr": h.learning_rate, "weight_decay": h.weight_decay}
    groups = [
        {"params": hidden, "use_muon": True, **options, "momentum": h.momentum, "use_adjusted_lr": True},
        {"params": others, "use_muon": False, **options, "betas": (h.beta1, h.beta2), "eps": 1e-8},
    ]
    return with_schedule(Muon(groups), workload, h)
