"""The package heavyball without torch.compile, which needs a compiler, and without its warning about schedules, which work."""

import warnings

import heavyball

__all__ = ["heavyball"]

heavyball.utils.compile_mode = None
warnings.filterwarnings("ignore", "Learning rate changed between steps")
