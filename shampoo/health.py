"""Detect, count, and log non-finite gradients and directions and failed roots, without waiting for the device."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import reduce
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from .copies import Inputs
from .state import Bucket, tensors

Names = Callable[[], dict[Tensor, str]]  # returns parameter names for error messages

logger = logging.getLogger("shampoo")
NOTABLE = 50  # bytes of state per element of the parameters; AdamW's takes 8


def copy_to_host(x: Tensor) -> Callable[[], Any]:
    """Start to copy a tensor to the host, and return a function that waits for the copy and returns its elements as a list.

    One step later, the copy is usually done already.
    """
    if not x.is_cuda:
        return x.tolist
    copy, copied = x.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record()

    def read() -> Any:
        """Wait for the copy and return its elements."""
        copied.synchronize()
        return copy.tolist()

    return read


def some(names: Sequence[str]) -> str:
    """Return the first five names, and how many others there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} others" if len(names) > 5 else "")


def waits(x: Tensor) -> bool:
    """Return whether reading x makes the host wait for its device, that is, whether x is not on the CPU."""
    return x.device.type != "cpu"


class Health:
    """Counts of skipped steps, rescued roots, and non-finite directions; the logger "shampoo" names the parameters.

    A root is rescued if its solver failed: see `roots.inverse_root`. `events` maps each kind of event to its count.

    Args:
        limit: raise FloatingPointError on this many consecutive non-finite steps.
    """

    def __init__(self, limit: int):
        self.events: Counter[str] = Counter()
        self.limit, self.consecutive = limit, 0
        self.weighed = False  # whether `weigh` was called
        # Of a step not counted yet: parameters, and what returns the norms of their gradients
        self.norms: list[tuple[Sequence[Tensor], Callable[[], Any]]] = []

    def check(self, buckets: Sequence[Bucket], inputs: Sequence[Inputs], names: Names) -> Tensor | None:
        """Compute the norms of all gradients, for `count`; return a scalar bool tensor, True if any norm is not finite.

        Return None if all norms are on the CPU, so that `count` can read them at once. Raises RuntimeError for a sparse or
        complex gradient.
        """
        self.norms, norms = [], []
        for bucket, of_bucket in zip(buckets, inputs, strict=True):
            found = [(p, G) for p, G in zip(bucket.params, of_bucket.grads, strict=True) if G is not None]
            for p, G in found:
                if G.layout != torch.strided or G.is_complex() or G.is_meta:
                    kind = f"has layout {G.layout} and dtype {G.dtype} on {G.device}; it must be dense and real"
                    raise RuntimeError(f"the gradient of {names()[p]} {kind} (for an embedding: sparse=False)")
            if found:
                params, grads = zip(*found, strict=True)
                norms.append(torch.stack(torch._foreach_norm(grads, 2, bucket.dtype)))
                self.norms.append((params, copy_to_host(norms[-1])))
        if not any(map(waits, norms)):
            return None
        largest = reduce(torch.maximum, [of_bucket.amax().to(norms[-1].device) for of_bucket in norms])  # NaN if any is
        return ~(largest < torch.inf)

    def count(self, names: Names) -> bool:
        """Return whether to skip the newest step, and count it; return False if it has been counted already.

        A step is skipped if the Frobenius norm of a gradient is not finite: it holds NaN or Inf, or its sum of squares
        overflows in the state's dtype. Raises FloatingPointError on the `limit`-th consecutive non-finite step.
        """
        if not self.norms:
            return False
        newest, self.norms = self.norms, []
        bad = [p for params, norms in newest for p, norm in zip(params, norms(), strict=True) if not isfinite(norm)]
        if not bad:
            self.consecutive = 0
            return False
        self.consecutive += 1
        self.events["steps skipped"] += 1
        seen = f"the gradients of {some([names()[p] for p in bad])} hold NaN or Inf, or their squared norms overflow"
        logger.warning("skipped a step (%d in a row): %s", self.consecutive, seen)
        if self.consecutive >= self.limit:
            steps = f"{self.consecutive} steps in a row were skipped, and max_skipped_steps is {self.limit}"
            raise FloatingPointError(f"{steps}: at the last one {seen}")
        return True

    def __getstate__(self) -> dict[str, Any]:  # without norms, which may still be on the device
        return {**vars(self), "norms": []}

    def forget(self) -> None:
        """Drop the norms not counted yet and the count of consecutive skips, after loading a state. `events` stays."""
        self.norms, self.consecutive = [], 0

    def weigh(self, buckets: Sequence[Bucket]) -> None:
        """Log how much memory the state on this rank takes, if it is more than NOTABLE bytes per element."""
        self.weighed = True
        total, numel = sum(X.nbytes for bucket in buckets for X in tensors(bucket)), sum(b.layout.numel for b in buckets)
        if total > NOTABLE * numel:
            size = f"{total / numel:.0f} bytes per element of the parameters, {total / 1e6:.3g} MB (AdamW's takes 8)"
            tip = "shampoo.memory.state_bytes(model, ...) tells which parameters take how much; max_factor_ratio=1 bounds it"
            logger.warning("the optimizer's state takes %s: %s", size, tip)

    def report(self, bucket: Bucket, names: Names) -> None:
        """Add a bucket's rescued roots and non-finite directions to `events`, and log the first of each kind."""
        for (i, cause), count in bucket.unusual.items():
            if cause not in self.events:
                logger.warning("%s for a block of %s: overflow, or the solver failed", cause, names()[bucket.params[i]])
            self.events[cause] += count
        bucket.unusual.clear()
