"""What could break a run, seen without waiting for the device: gradients that are not finite, roots that failed."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from .state import Bucket

logger = logging.getLogger("shampoo")


class Later:
    """A tensor on its way to the host."""

    def __init__(self, x: Tensor):
        self._copy, self._copied = x.to("cpu", non_blocking=True), None
        if x.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[Any]:
        """Its numbers. A step later the device is past them, and nothing waits."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy.tolist()


def waits(x: Tensor) -> bool:
    """Whether the host would have to wait for a tensor's device to read it."""
    return x.device.type != "cpu"


class Health:
    """Counts steps that were skipped and roots that were rescued, and names the parameters.

    Args:
        limit: so many steps in a row may be skipped; the last of them is an error.
    """

    def __init__(self, limit: int):
        self.events: Counter[str] = Counter()
        self.limit, self.in_a_row = limit, 0
        self._looked: list[tuple[list[Tensor], Later]] = []  # of the newest step: parameters, and the norms of their gradients

    def look(self, buckets: Iterable[Bucket], grads: Iterable[list[Tensor | None]]) -> Tensor | None:
        """A bool that says whether a step's gradients are finite; None where the host can `count` without waiting for it."""
        self._looked, norms = [], []
        for bucket, of_bucket in zip(buckets, grads, strict=True):
            present = [(p, G) for p, G in zip(bucket.params, of_bucket, strict=True) if G is not None and p.grad is not None]
            if present:
                norms.append(torch.stack(torch._foreach_norm([G for _, G in present], 2, bucket.dtype)))
                self._looked.append(([p for p, _ in present], Later(norms[-1])))
        if not any(map(waits, norms)):
            return None
        return torch.stack([of_bucket.isfinite().all().to(norms[-1].device) for of_bucket in norms]).all()

    def count(self, names: Callable[[], dict[Tensor, str]]) -> bool:
        """Count the newest step, if that was not done, and say whether it was skipped: where the Frobenius norm of a gradient
        is not finite, because a number is not, or the sum of squares is too large for a factor.

        Raises FloatingPointError at the limit.
        """
        if not self._looked:
            return False
        looked, self._looked = self._looked, []
        bad = [p for params, norms in looked for p, norm in zip(params, norms.read(), strict=True) if not isfinite(norm)]
        if not bad:
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        self.events["steps skipped"] += 1
        which = ", ".join(names()[p] for p in bad[:5]) + (f" and {len(bad) - 5} others" if len(bad) > 5 else "")
        seen = f"the gradients of {which} hold NaN or Inf, or numbers whose squares are too large for float32"
        logger.warning("a step was skipped, number %d in a row: %s", self.in_a_row, seen)
        if self.in_a_row >= self.limit:
            raise FloatingPointError(
                f"{self.in_a_row} steps in a row were skipped, and max_skipped_steps is {self.limit}: at the last one {seen}"
            )
        return True

    def forget(self) -> None:
        """Begin anew with what was loaded; the counts of events stay."""
        self._looked, self.in_a_row = [], 0

    def report(self, bucket: Bucket, names: Callable[[], dict[Tensor, str]]) -> None:
        """Count a bucket's roots that could not be computed as usual, and name the first parameter of each kind."""
        for (i, cause), count in bucket.rescued.items():
            if cause not in self.events:
                logger.warning("%s, of a block of %s: float32 was not enough for its factor", cause, names()[bucket.params[i]])
            self.events[cause] += count
        bucket.rescued.clear()
