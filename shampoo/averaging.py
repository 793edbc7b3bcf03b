"""Averages of the weights, for evaluation (Karras et al. 2023, arXiv 2312.02696)."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

GAMMA = 6.94  # the window's standard deviation is 0.10 of the steps so far: sqrt((g + 1) / ((g + 2)^2 (g + 3)))


def update_averages(averages: list[Tensor], weights: list[Tensor], num_averaged: Tensor | int) -> None:
    """Update the averages E with the weights W in place; copy integer tensors.

    E <- E + (1 - (1 - 1/t)^(GAMMA + 1)) (W - E), where t is num_averaged + 1.

    This is a `multi_avg_fn` for `torch.optim.swa_utils.AveragedModel`, also with use_buffers=True.
    """
    if averages[0].is_floating_point():
        newest = 1 - (1 - 1 / (int(num_averaged) + 1)) ** (GAMMA + 1)
        torch._foreach_lerp_(averages, weights, newest)
    else:
        torch._foreach_copy_(averages, weights)


def without_repeats(x: Tensor) -> Tensor:
    """Return a view of x of size 1 along the dimensions that `expand` repeats; torch does not write to x itself."""
    return x[tuple(slice(None if stride else 1) for stride in x.stride())] if 0 in x.stride() else x


class AveragedWeights:
    """An average E of a model's weights W, which takes their place during evaluation.

    E is a power-law average: after t updates, iterate s has a weight proportional to s^GAMMA, up to discretization. Its window
    grows with t, so that it needs no horizon. Floating-point buffers, such as the statistics of batch norm, are averaged too.

    Call `update()` after each step of the optimizer, `eval()` before an evaluation, and `train()` before the next step, which
    then continues from W as if there had been no evaluation. E and W trade places in the model's own tensors, so one more copy
    of the weights is enough, and wrappers such as DistributedDataParallel and torch.compile do not matter. A checkpoint of the
    model and of `state_dict()` holds both, whichever the model holds.
    """

    def __init__(self, model: nn.Module):
        self._model, self._step, self._training = model, 0, True
        self._other: dict[Any, Tensor] = {}  # E, but W between eval() and train()
        self._pairs()

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the other tensors, and those that the model holds.

        Some layers assign new tensors to their buffers. The average of one that is new, or has another shape, dtype, or device,
        starts anew.
        """
        named = chain(self._model.named_parameters(), self._model.named_buffers())
        held = {(name, x.shape, x.dtype, x.device): without_repeats(x) for name, x in named if x.is_floating_point()}
        self._other = {key: self._other[key] if key in self._other else x.detach().clone() for key, x in held.items()}
        return list(self._other.values()), list(held.values())

    @torch.no_grad()
    def update(self) -> None:
        """Apply `update_averages`."""
        if not self._training:
            raise RuntimeError("the model holds the averages; call train() before the optimizer's step")
        update_averages(*self._pairs(), self._step)
        self._step += 1

    def eval(self) -> None:
        """Put E into the model, if it is not there yet."""
        self._place(training=False)

    def train(self) -> None:
        """Put W back into the model, if it is not there yet."""
        self._place(training=True)

    @torch.no_grad()
    def _place(self, training: bool) -> None:
        if training != self._training:
            others, held = self._pairs()
            kept = [x.clone() for x in held]
            torch._foreach_copy_(held, others)
            torch._foreach_copy_(others, kept)
            self._training = training

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors that are not in the model, in the order of its parameters and buffers, and which ones they are."""
        return {"tensors": list(self._other.values()), "step": self._step, "training": self._training}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict()`. Also load the model's own that was saved with it: one holds E, the other W."""
        torch._foreach_copy_(self._pairs()[0], state_dict["tensors"])
        self._step, self._training = state_dict["step"], state_dict["training"]
