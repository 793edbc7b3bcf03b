"""Muon (Jordan et al. 2024) for the hidden matrices and AdamW for the rest, as Liu et al. 2025 combine them.

Their scaling of Muon's step to the root mean square of AdamW's lets both share learning rate and decay; the values are those of
their code. AdamW has the embeddings, the output layer and whatever is not a matrix. torch's Muon takes matrices only, so that
convolutions are among these: a model of convolutions alone is trained by AdamW alone. AlgoPerf does not say which layer is the
first; Muon has it if it is linear. Matrices stacked in one parameter (qkv, an LSTM's gates) are one matrix to Muon.
"""

from typing import Any

import torch
from algoperf import spec
from torch import Tensor

from runner import baselines
from runner.baselines import data_selection, get_batch_size, prepare_for_eval, with_schedule

__all__ = ["data_selection", "get_batch_size", "init_optimizer_state", "prepare_for_eval", "update_params"]


def init_optimizer_state(workload: Any, model_params: Any, model_state: Any, hyperparameters: Any, rng: Any) -> dict[str, Any]:
    """Both optimizers, each with its schedule. Raises ValueError if torch has no Muon."""
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"torch is {torch.__version__}; for torch.optim.Muon it must be 2.9 or newer")
    h = hyperparameters
    hidden, others = split(workload, model_params)
    options = {"lr": h.learning_rate, "weight_decay": h.weight_decay}
    # In a group of its own, hidden may be empty.
    muon = torch.optim.Muon([{"params": hidden}], **options, momentum=h.momentum, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, **options, betas=(h.beta1, h.beta2))
    state = with_schedule(muon, workload, h)
    return {**with_schedule(adamw, workload, h), "muon": state["optimizer"], "muon_scheduler": state["scheduler"]}


def split(workload: Any, model_params: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The hidden matrices, and the other parameters."""
    hidden: list[Tensor] = []
    others: list[Tensor] = []
    # Matched by order: DistributedDataParallel and torch.compile put prefixes before the model's names.
    for p, (name, kind) in zip(model_params.parameters(), workload.model_params_types.items(), strict=True):
        is_hidden = p.ndim == 2 and kind != spec.ParameterType.EMBEDDING and not workload.is_output_params(name)
        (hidden if is_hidden else others).append(p)
    return hidden, others


def update_params(*, optimizer_state: dict[str, Any], **others: Any) -> Any:
    """The gradients and AdamW's step, then Muon's."""
    optimizer_state["muon"].zero_grad()
    result = baselines.update_params(optimizer_state=optimizer_state, **others)
    optimizer_state["muon"].step()
    optimizer_state["muon_scheduler"].step()
    return result
