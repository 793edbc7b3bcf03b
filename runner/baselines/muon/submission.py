"""Muon (Jordan et al. 2024) for hidden matrices and AdamW for all other parameters, combined as in Liu et al. 2025.

They scale Muon's step to the RMS of AdamW's, so that both share learning rate and weight decay; hyperparameters are from their
code. AdamW trains the embeddings, the output layer, and every parameter that is not a matrix, convolutions included, because
torch's Muon accepts only matrices (see `muon_conv`). Muon also trains the first layer if it is linear, because AlgoPerf does
not say which layer is first. Matrices stacked in one parameter (qkv, LSTM gates) count as one matrix.
"""

from typing import Any

import torch
from algoperf import spec
from torch import Tensor

from runner import baselines
from runner.baselines import data_selection, get_batch_size, prepare_for_eval, with_schedule

__all__ = ["data_selection", "get_batch_size", "init_optimizer_state", "prepare_for_eval", "update_params"]


def init_optimizer_state(workload: Any, model_params: Any, model_state: Any, hyperparameters: Any, rng: Any) -> dict[str, Any]:
    """Return both optimizers, each with its learning rate schedule. Raise ValueError if torch has no Muon."""
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"torch is {torch.__version__}; for torch.optim.Muon it must be 2.9 or newer")
    h = hyperparameters
    hidden, others = split(workload, model_params)
    options = {"lr": h.learning_rate, "weight_decay": h.weight_decay}
    # As a parameter group, `hidden` may be empty.
    muon = torch.optim.Muon([{"params": hidden}], **options, momentum=h.momentum, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, **options, betas=(h.beta1, h.beta2))
    state = with_schedule(muon, workload, h)
    return {**with_schedule(adamw, workload, h), "muon": state["optimizer"], "muon_scheduler": state["scheduler"]}


def split(workload: Any, model_params: Any, max_ndim: float = 2) -> tuple[list[Tensor], list[Tensor]]:
    """Return the hidden weights of 2 to `max_ndim` dimensions, which Muon trains, and all other parameters."""
    hidden: list[Tensor] = []
    others: list[Tensor] = []
    # Matched by order, because DistributedDataParallel and torch.compile add prefixes to the names.
    for p, (name, kind) in zip(model_params.parameters(), workload.model_params_types.items(), strict=True):
        is_hidden = 2 <= p.ndim <= max_ndim and kind != spec.ParameterType.EMBEDDING and not workload.is_output_params(name)
        (hidden if is_hidden else others).append(p)
    return hidden, others


def update_params(*, optimizer_state: dict[str, Any], **others: Any) -> Any:
    """Compute the gradients, then take AdamW's step and Muon's."""
    optimizer_state["muon"].zero_grad()
    result = baselines.update_params(optimizer_state=optimizer_state, **others)
    optimizer_state["muon"].step()
    optimizer_state["muon_scheduler"].step()
    return result
