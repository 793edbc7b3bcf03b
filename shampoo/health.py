"""What could break a run, seen without waiting for the device: non-finite gradients, and roots that failed."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from .copies import Inputs
from .state import Bucket

Names = Callable[[], dict[Tensor, str]]  # what errors call the parameters

logger = logging.getLogger("shampoo")


class HostCopy:
    """A tensor on its way to the host."""

    def __init__(self, x: Tensor):
        self._copy, self._copied = x.to("cpu", non_blocking=True), None
        if x.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[Any]:
        """Return its elements. A step later the device has computed them, and nothing waits."""
        if self._copied is not None:
            self._copied.synchronize()
        elements: list[Any] = self._copy.tolist()
        return elements


def waits(x: Tensor) -> bool:
    """Return whether the host would have to wait for a tensor's device to read it."""
    return x.device.type != "cpu"


class Health:
    """Counts skipped steps and rescued roots, and names the parameters.

    Args:
        limit: raise FloatingPointError on this many consecutive non-finite steps.
    """

    def __init__(self, limit: int):
        self.events: Counter[str] = Counter()
        self.limit, self.consecutive = limit, 0
        self.norms: list[tuple[list[Tensor], HostCopy]] = []  # of a step not counted yet: parameters, gradient norms

    def check(self, buckets: Sequence[Bucket], inputs: Sequence[Inputs], names: Names) -> Tensor | None:
        """Return a bool tensor, whether a step's gradients are finite; None if the host can `count` without waiting for it.

        Raises RuntimeError for a sparse or complex gradient.
        """
        self.norms, norms = [], []
        for bucket, of_bucket in zip(buckets, inputs, strict=True):
            params, grads = [], []
            for p, G in zip(bucket.params, of_bucket.grads, strict=True):
                if G is not None:
                    params.append(p)
                    grads.append(G)
                    if G.layout != torch.strided or G.is_complex():
                        raise RuntimeError(
                            f"the gradient of {names()[p]} has layout {G.layout} and dtype {G.dtype}; it must be dense and "
                            "real (for an embedding: sparse=False)"
                        )
            if grads:
                norms.append(torch.stack(torch._foreach_norm(grads, 2, bucket.dtype)))
                self.norms.append((params, HostCopy(norms[-1])))
        if not any(map(waits, norms)):
            return None
        return torch.stack([of_bucket.isfinite().all().to(norms[-1].device) for of_bucket in norms]).all()

    def count(self, names: Names) -> bool:
        """Return whether the newest step is to be skipped, and count it, unless that was done before.

        A step is skipped if the Frobenius norm of a gradient is not finite: an element is not, or the sum of squares overflows.
        Raises FloatingPointError on the `limit`-th consecutive non-finite step.
        """
        if not self.norms:
            return False
        newest, self.norms = self.norms, []
        bad = [p for params, norms in newest for p, norm in zip(params, norms.read(), strict=True) if not isfinite(norm)]
        if not bad:
            self.consecutive = 0
            return False
        self.consecutive += 1
        self.events["steps skipped"] += 1
        which = ", ".join(names()[p] for p in bad[:5]) + (f" and {len(bad) - 5} others" if len(bad) > 5 else "")
        seen = f"the gradients of {which} hold NaN or Inf, or elements whose squares overflow float32"
        logger.warning("a step was skipped, number %d in a row: %s", self.consecutive, seen)
        if self.consecutive >= self.limit:
            raise FloatingPointError(
                f"{self.consecutive} steps in a row were skipped, and max_skipped_steps is {self.limit}: at the last one {seen}"
            )
        return True

    def __getstate__(self) -> dict[str, Any]:  # norms may be on their way to the host
        return {**vars(self), "norms": []}

    def forget(self) -> None:
        """Forget the newest steps, after loading a state; the counts of events stay."""
        self.norms, self.consecutive = [], 0

    def report(self, bucket: Bucket, names: Names) -> None:
        """Count a bucket's roots and directions that were not computed as usual, and name the first parameter of each kind."""
        for (i, cause), count in bucket.unusual.items():
            if cause not in self.events:
                logger.warning("%s, of a block of %s: float32 was not enough", cause, names()[bucket.params[i]])
            self.events[cause] += count
        bucket.unusual.clear()
