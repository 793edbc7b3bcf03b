"""The package heavyball without torch.compile, which needs a compiler, and without its warning about schedules, which work."""

import warnings

import heavyball
import torch

__all__ = ["heavyball"]

heavyball.utils.compile_mode = None
warnings.filterwarnings("ignore", "Learning rate changed between steps")
torch.serialization.add_safe_globals([set])  # its state holds sets, which torch 2.5 refuses in checkpoints
