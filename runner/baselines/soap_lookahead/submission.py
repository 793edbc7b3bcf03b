"""SOAP with NAdam's look-ahead (Dozat 2016) in the eigenbases: SOAPNAdam of heavyball 3.2.1.

The averaged gradient M / (1 - beta1^t) becomes (1 - beta1) G / (1 - beta1^t) + beta1 M / (1 - beta1^(t+1)). NAdam also halves
beta1 in these coefficients at first, and raises it to its value over thousands of steps; an infinite `momentum_decay` keeps its
value, as AlgoPerf's NadamW does. All else is set as in `soap`. pytorch_optimizer 4.1.0 has SOAP without a look-ahead only.
"""

import math
from typing import Any

from runner.baselines import data_selection, get_batch_size, prepare_for_eval, update_params, with_schedule
from runner.baselines.eager_heavyball import heavyball, soap_options

__all__ = ["data_selection", "get_batch_size", "init_optimizer_state", "prepare_for_eval", "update_params"]


def init_optimizer_state(workload: Any, model_params: Any, model_state: Any, hyperparameters: Any, rng: Any) -> dict[str, Any]:
    """Return the optimizer and its learning rate schedule."""
    optimizer = heavyball.SOAPNAdam(
        model_params.parameters(),
        **soap_options(hyperparameters),
        max_precond_dim=1024,
        merge_dims=False,
        momentum_decay=math.inf,
    )
    return with_schedule(optimizer, workload, hyperparameters)
