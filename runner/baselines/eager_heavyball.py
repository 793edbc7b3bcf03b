"""The package heavyball without torch.compile, which needs a compiler, and without its warning about schedules, which work."""

import warnings
from typing import Any

import heavyball
import torch

__all__ = ["heavyball", "soap_options"]

heavyball.utils.compile_mode = None
warnings.filterwarnings("ignore", "Learning rate changed between steps")
torch.serialization.add_safe_globals([set])  # its state holds sets, which torch 2.5 refuses in checkpoints


def soap_options(hyperparameters: Any) -> dict[str, Any]:
    """Return the options that heavyball's variants of SOAP have in common."""
    h = hyperparameters
    options = {"lr": h.learning_rate, "betas": (h.beta1, h.beta2), "shampoo_beta": h.beta2, "weight_decay": h.weight_decay}
    return {**options, "precondition_frequency": h.precondition_frequency}
