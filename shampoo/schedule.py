"""Learning rate schedule: linear warmup, then cosine decay to zero."""

from functools import partial
from math import cos, pi

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

TAILS = ("zero", "rise")


def warmup_cosine_factor(step: int, num_steps: float, warmup_steps: int, tail: str) -> float:
    """Return the factor of lr at a step counted from 0.

    During warmup, it is 1e-10 + (1 - 1e-10) step / warmup_steps; then (1 + cos(pi s)) / 2 with
    s = (step - warmup_steps) / max(num_steps - warmup_steps, 1). Past s = 1, tail "zero" stays at 0; "rise" follows the cosine
    up to 1 and down again, like SequentialLR with LinearLR and CosineAnnealingLR in the AlgoPerf competition's submission.
    """
    if step < warmup_steps:
        return 1e-10 + (1 - 1e-10) * step / warmup_steps
    s = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    return (1 + cos(pi * (min(s, 1.0) if tail == "zero" else s))) / 2


def warmup_cosine(optimizer: Optimizer, num_steps: float, warmup_steps: int, tail: str = "zero") -> LambdaLR:
    """Return a torch scheduler that multiplies each group's lr by `warmup_cosine_factor`; step it after each optimizer step.

    Raises ValueError for an unknown tail.
    """
    if tail not in TAILS:
        raise ValueError(f"tail is {tail!r}; it must be one of {', '.join(TAILS)}")
    return LambdaLR(optimizer, partial(warmup_cosine_factor, num_steps=num_steps, warmup_steps=warmup_steps, tail=tail))
