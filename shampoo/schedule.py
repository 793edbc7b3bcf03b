"""Learning rate schedules: linear warmup, then a shape that ends at zero: a cosine, a line, or a trapezoid."""

from collections.abc import Callable
from functools import partial
from math import cos, pi

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

TAILS = ("zero", "rise")


def schedule_factor(step: int, num_steps: float, warmup_steps: int, shape: Callable[[float], float], tail: str) -> float:
    """Return the factor of lr at a step counted from 0.

    During warmup, it is 1e-10 + (1 - 1e-10) step / warmup_steps, then shape(s), where s is 0 at the end of warmup and 1 at
    `num_steps`. Past that, tail "zero" stays at shape(1) = 0, and "rise" follows the shape.
    """
    if step < warmup_steps:
        return 1e-10 + (1 - 1e-10) * step / warmup_steps
    s = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    return shape(min(s, 1.0) if tail == "zero" else s)


def cosine_shape(s: float) -> float:
    """Return (1 + cos(pi s)) / 2."""
    return (1 + cos(pi * s)) / 2


def linear_shape(s: float) -> float:
    """Return 1 - s."""
    return 1 - s


def trapezoid_shape(s: float) -> float:
    """Return min(1, 1.5 (1 - s)): constant for a third of the steps after warmup, then linear to 0."""
    return min(1.0, 1.5 * (1 - s))


def schedule(optimizer: Optimizer, num_steps: float, warmup_steps: int, shape: Callable[[float], float], tail: str) -> LambdaLR:
    """Return a torch scheduler that multiplies each group's lr by `schedule_factor`; step it after each optimizer step."""
    return LambdaLR(optimizer, partial(schedule_factor, num_steps=num_steps, warmup_steps=warmup_steps, shape=shape, tail=tail))


def warmup_cosine(optimizer: Optimizer, num_steps: float, warmup_steps: int, tail: str = "zero") -> LambdaLR:
    """Return a `schedule` of `cosine_shape`.

    With tail "rise", the rate rises again after `num_steps`, as with SequentialLR of LinearLR and CosineAnnealingLR in the
    AlgoPerf competition's submission. Raises ValueError for an unknown tail.
    """
    if tail not in TAILS:
        raise ValueError(f"tail is {tail!r}; it must be one of {', '.join(TAILS)}")
    return schedule(optimizer, num_steps, warmup_steps, cosine_shape, tail)


linear = partial(schedule, shape=linear_shape, tail="zero")
trapezoid = partial(schedule, shape=trapezoid_shape, tail="zero")
SCHEDULES: dict[str, Callable[..., LambdaLR]] = {"cosine": warmup_cosine, "linear": linear, "trapezoid": trapezoid}
