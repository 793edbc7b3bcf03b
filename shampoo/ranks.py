"""Find the ranks of a process group, check that they agree, and exchange directions once per step.

Each rank computes the directions of the blocks that it owns. One all-gather sends all directions to all ranks, and each rank
applies them to its weights; `shards` has another way for DTensors. `assignment` decides which rank owns which block.
"""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import compress, zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .copies import attempt, call_all
from .health import copy_to_host, some
from .state import Bucket

if dist.is_available():
    all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13 deprecates the older name


class Ranks(NamedTuple):
    """The ranks that share the blocks. Without a process group, one rank owns all blocks."""

    group: Any  # a ProcessGroup, or None
    rank: int
    size: int


ALONE = Ranks(None, 0, 1)
PATIENCE = timedelta(seconds=60)


def find_ranks(process_group: Any) -> Ranks:
    """Return the ranks of a process group or a one-dimensional DeviceMesh; for None, of the default group if there is one.

    Raises ValueError for a group that this process is not in, or any other value; RuntimeError for a mesh of more dimensions.
    """
    if process_group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return ALONE
        process_group = dist.group.WORLD
    if hasattr(process_group, "get_group"):
        process_group = process_group.get_group()
    if not isinstance(process_group, dist.ProcessGroup):
        raise ValueError(f"process_group is {process_group!r}; it must be a ProcessGroup of this process, a mesh, or None")
    return Ranks(process_group, process_group.rank(), process_group.size()) if process_group.size() > 1 else ALONE


def agree(ranks: Ranks, act: Callable[..., Any], *arguments: Any, describe: Callable[[Any], list[str]] = lambda _: []) -> Any:
    """Return act(*arguments) if no rank fails and all ranks' results have the same description, lines of text. A collective.

    Raises this rank's own error; else RuntimeError with another rank's error; else ValueError with the first line of the
    descriptions that differs.
    """
    result, error = attempt(act, *arguments)
    if ranks.size > 1:
        seen: list[Any] = [None] * ranks.size
        dist.all_gather_object(seen, (error and repr(error), describe(result) if error is None else []), ranks.group)
        failed = [f"rank {r} failed: {text}" for r, (text, _) in enumerate(seen) if text]
        if error is None and failed:
            raise RuntimeError(failed[0])
        for line in zip_longest(*(lines for _, lines in seen if not failed), fillvalue="nothing"):
            if other := next((r for r, text in enumerate(line) if text != line[0]), None):
                same = "all ranks must have the same parameters, weights, options, and arguments"
                raise ValueError(f"{same}; rank 0 has {line[0]} where rank {other} has {line[other]}")
    if error is not None:
        raise error
    return result


def clamp_half(X: Tensor) -> Tensor:
    """Clamp X in place to the range of float16, if that is its dtype, since directions may exceed 65,504. Return X."""
    limits = torch.finfo(torch.float16)
    return X.clamp_(limits.min, limits.max) if X.dtype == torch.float16 else X


def await_others(ranks: Ranks) -> None:
    """Wait on rank 0 until the other ranks are here, before a collective that some programs enter on rank 0 alone.

    Raises RuntimeError there if they do not come within PATIENCE.
    """
    store, keys = dist.distributed_c10d._get_process_group_store(ranks.group), [f"shampoo/{r}" for r in range(ranks.size)]
    if ranks.rank:
        store.set(keys[ranks.rank], "here")
        return
    _, error = attempt(store.wait, keys[1:], PATIENCE)
    if error is not None:
        gather = "to gather the state, call it on all ranks, or consolidate_state_dict() on all ranks before"
        raise RuntimeError(f"rank 0 waited for {PATIENCE} in state_dict() for the other ranks: {gather}") from error
    for key in keys[1:]:
        store.delete_key(key)


class Exchange:
    """The all-gather of each step on multiple ranks, and its buffers.

    Each rank sends its directions, concatenated and padded to the size of the largest rank's, and then flags of 0 or 1: for
    each parameter, whether it has a gradient on this rank; whether this rank skips the step; and whether this rank failed.

    Args:
        names: parameter names for error messages.
        dtype: dtype of the buffers, to which directions are rounded; None: the widest of the buckets'.
    """

    def __init__(self, ranks: Ranks, buckets: list[Bucket], names: dict[Tensor, str], dtype: torch.dtype | None):
        self._ranks, self._buckets = ranks, buckets
        self._names = [names[p] for bucket in buckets for p in bucket.params]
        self._lengths = [[0 if bucket.shards else bucket.layouts[r].numel for bucket in buckets] for r in range(ranks.size)]
        width = max(map(sum, self._lengths)) + len(self._names) + 2
        dtype = dtype or max((bucket.dtype for bucket in buckets), key=lambda each: each.itemsize)
        self._sent = torch.zeros(width, dtype=dtype, device=buckets[0].device)
        self._received = self._sent.new_zeros(ranks.size * width)
        self._flags: list[bool] = []  # the flags now at the end of _sent
        self._differing: Callable[[], Any] | None = None  # returns for each flag whether it differed between ranks

    def run(self, directions: list[Tensor], flags: list[bool]) -> list[list[Tensor]]:
        """Return all ranks' directions [bucket][rank], given this rank's, or [] for zeros, and its flags [skip, failed].

        The result has the buffers' dtype and device, and is valid until the next call. Buckets with shards move at once, and
        have no directions in it.
        """
        own = directions or [bucket.zeros() for bucket in self._buckets]
        flags = [p.grad is not None for bucket in self._buckets for p in bucket.params] + flags
        if flags != self._flags:
            self._sent[-len(flags) :] = torch.tensor(flags, dtype=self._sent.dtype)
            self._flags = flags
        lengths = self._lengths[self._ranks.rank]
        parts = [P[:n].to(self._sent.device) for P, n in zip(own, lengths, strict=True)]
        clamp_half(torch.cat(parts, out=self._sent[: sum(lengths)]))
        all_gather(self._received, self._sent, group=self._ranks.group)
        rows = self._received.view(self._ranks.size, -1)
        self._differing = copy_to_host((rows[:, -len(flags) :] != rows[0, -len(flags) :]).any(dim=0))
        of_ranks = (torch.split_with_sizes(row[: sum(n)], n) for row, n in zip(rows, self._lengths, strict=True))
        call_all(partial(bucket.shards.move, P) for bucket, P in zip(self._buckets, own, strict=True) if bucket.shards)
        return list(map(list, zip(*of_ranks, strict=True)))

    def check(self) -> None:
        """Raise RuntimeError on all ranks if flags differed between ranks at the last exchange.

        They differ if only some ranks failed, skipped the step for non-finite gradients, or had a gradient for a parameter.
        Call it at the next step: by then, the device has usually finished that exchange, and the host does not wait.
        """
        *present, skipped, failed = self._differing() if self._differing is not None else [False] * 2
        if failed:
            raise RuntimeError("a rank failed in the last step; see the error on that rank")
        if skipped:
            raise RuntimeError("at the last step, only some ranks had gradients with NaN or Inf: average them over ranks first")
        if names := list(compress(self._names, present)):
            raise RuntimeError(f"at the last step, some ranks had a gradient where others had none: {some(names)}")
