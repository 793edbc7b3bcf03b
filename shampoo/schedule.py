"""Learning rate schedules: linear warmup, then cosine decay to zero, or constant and then linear to zero (a trapezoid)."""

from functools import partial
from math import cos, pi

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

TAILS = ("zero", "rise")


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Return 1e-10 + (1 - 1e-10) step / warmup_steps."""
    return 1e-10 + (1 - 1e-10) * step / warmup_steps


def share_after_warmup(step: int, num_steps: float, warmup_steps: int) -> float:
    """Return (step - warmup_steps) / max(num_steps - warmup_steps, 1): 0 at the end of warmup, 1 at `num_steps`."""
    return (step - warmup_steps) / max(num_steps - warmup_steps, 1)


def warmup_cosine_factor(step: int, num_steps: float, warmup_steps: int, tail: str) -> float:
    """Return the factor of lr at a step counted from 0.

    During warmup, it is `warmup_factor`; then (1 + cos(pi s)) / 2 with s = `share_after_warmup`. Past s = 1, tail "zero" stays
    at 0; "rise" follows the cosine up to 1 and down again, like SequentialLR with LinearLR and CosineAnnealingLR in the
    AlgoPerf competition's submission.
    """
    if step < warmup_steps:
        return warmup_factor(step, warmup_steps)
    s = share_after_warmup(step, num_steps, warmup_steps)
    return (1 + cos(pi * (min(s, 1.0) if tail == "zero" else s))) / 2


def trapezoid_factor(step: int, num_steps: float, warmup_steps: int) -> float:
    """Return the factor of lr at a step counted from 0: `warmup_factor` during warmup, then min(1, 1.5 (1 - s)) with
    s = `share_after_warmup`. It is constant for a third of the steps after warmup, falls to 0 at `num_steps`, and stays there.
    """
    if step < warmup_steps:
        return warmup_factor(step, warmup_steps)
    return min(1.0, 1.5 * (1 - min(share_after_warmup(step, num_steps, warmup_steps), 1.0)))


def warmup_cosine(optimizer: Optimizer, num_steps: float, warmup_steps: int, tail: str = "zero") -> LambdaLR:
    """Return a torch scheduler that multiplies each group's lr by `warmup_cosine_factor`; step it after each optimizer step.

    Raises ValueError for an unknown tail.
    """
    if tail not in TAILS:
        raise ValueError(f"tail is {tail!r}; it must be one of {', '.join(TAILS)}")
    return LambdaLR(optimizer, partial(warmup_cosine_factor, num_steps=num_steps, warmup_steps=warmup_steps, tail=tail))


def trapezoid(optimizer: Optimizer, num_steps: float, warmup_steps: int) -> LambdaLR:
    """Return a torch scheduler that multiplies each group's lr by `trapezoid_factor`; step it after each optimizer step."""
    return LambdaLR(optimizer, partial(trapezoid_factor, num_steps=num_steps, warmup_steps=warmup_steps))
