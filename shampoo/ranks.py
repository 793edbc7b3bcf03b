"""Multiple ranks: who they are, whether they agree, and the one exchange of a step.

Every rank computes the directions of the blocks that it owns; one all-gather gives all directions to all ranks, and each
applies them to its weights. `assignment` decides who owns which block.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .health import HostCopy
from .state import Bucket

if dist.is_available():
    all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13 deprecates the older name


class Ranks(NamedTuple):
    """The ranks among which the blocks are shared; without a process group, one rank owns all."""

    group: Any  # a ProcessGroup, or None
    rank: int
    size: int


ALONE = Ranks(None, 0, 1)


def find_ranks(process_group: Any) -> Ranks:
    """Return the ranks of a process group or of a one-dimensional DeviceMesh; None is the default group, if there is one.

    Raises ValueError for a mesh of more dimensions, anything else, and a group that this process is not in.
    """
    if process_group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return ALONE
        process_group = dist.group.WORLD
    if hasattr(process_group, "get_group"):
        if process_group.ndim != 1:
            raise ValueError(
                f"process_group is a mesh of dimensions {process_group.mesh_dim_names or process_group.ndim}; it must have "
                "one: name the mesh's dimensions and pass mesh[name], the one whose ranks share the blocks"
            )
        process_group = process_group.get_group()
    if not isinstance(process_group, dist.ProcessGroup):
        raise ValueError(
            f"process_group is {process_group!r}; it must be a ProcessGroup that this process is in, a one-dimensional "
            "DeviceMesh, or None"
        )
    size = dist.get_world_size(process_group)
    return Ranks(process_group, dist.get_rank(process_group), size) if size > 1 else ALONE


def attempt(act: Callable[..., Any], *arguments: Any) -> tuple[Any, Exception | None]:
    """Return what the call returns and what it raises, one of them None, so that other ranks can hear of an error first."""
    try:
        return act(*arguments), None
    except Exception as error:
        return None, error


def agree(ranks: Ranks, description: Sequence[str], error: Exception | None) -> None:
    """Raise on all ranks unless all have the same description and no error. A collective: no rank continues alone.

    Raises the rank's own error, or RuntimeError with another rank's, or ValueError with the first line that differs.
    """
    if ranks.size > 1:
        digest = hashlib.sha256("\n".join(description).encode()).hexdigest()
        seen: list[Any] = [None] * ranks.size
        dist.all_gather_object(seen, (digest, error and repr(error)), ranks.group)
        if error is None and (failed := [(r, text) for r, (_, text) in enumerate(seen) if text]):
            raise RuntimeError(f"rank {failed[0][0]} failed: {failed[0][1]}")
        if not any(text for _, text in seen) and len({digest for digest, _ in seen}) > 1:
            everything: list[Any] = [None] * ranks.size
            dist.all_gather_object(everything, list(description), ranks.group)
            raise ValueError(first_difference(everything))
    if error is not None:
        raise error


def first_difference(descriptions: list[list[str]]) -> str:
    """Return the words for the first line in which the ranks' descriptions differ."""
    longest = max(map(len, descriptions))
    lines = zip(*(lines + ["nothing"] * (longest - len(lines)) for lines in descriptions), strict=True)
    differing = next(line for line in lines if len(set(line)) > 1)
    other = next(r for r, text in enumerate(differing) if text != differing[0])
    return (
        "all ranks must have the same parameters and options in the same order; "
        f"rank 0 has {differing[0]} where rank {other} has {differing[other]}"
    )


class Exchange:
    """The buffers of one all-gather per step, for the buckets of one device and dtype.

    Each rank sends its directions end to end, then a flag for each parameter, 1 if it has a gradient there, and two more: 1 if
    it skipped the step, and if it failed. All ranks send as much as the one with the most, at every step.

    Args:
        buckets: by index among the optimizer's.
        names: what errors call the parameters.
        dtype: of what is sent; directions are rounded to it.
    """

    def __init__(self, ranks: Ranks, buckets: dict[int, Bucket], names: dict[Tensor, str], dtype: torch.dtype):
        self._ranks, self._buckets = ranks, buckets
        self._names = [names[p] for bucket in buckets.values() for p in bucket.params]
        self._lengths = [[bucket.layouts[r].numel for bucket in buckets.values()] for r in range(ranks.size)]
        width = max(map(sum, self._lengths)) + len(self._names) + 2
        device = next(iter(buckets.values())).device
        self._sent = torch.zeros(width, dtype=dtype, device=device)
        self._received = torch.zeros(ranks.size * width, dtype=dtype, device=device)
        self._flags: list[bool] = []  # as in _sent
        self._differing: HostCopy | None = None  # for each flag, whether ranks differed in it at the newest exchange

    def run(self, directions: list[Tensor], flags: list[bool]) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield each bucket's index and all ranks' directions for it, given this rank's for all buckets, and its two flags."""
        own = [directions[i] for i in self._buckets]
        flags = [p.grad is not None for bucket in self._buckets.values() for p in bucket.params] + flags
        if flags != self._flags:
            self._sent[-len(flags) :] = torch.tensor(flags, dtype=self._sent.dtype)
            self._flags = flags
        sent = torch.cat(own, out=self._sent[: sum(self._lengths[self._ranks.rank])])
        if sent.dtype == torch.float16:  # its largest number is 65,504
            sent.clamp_(torch.finfo(sent.dtype).min, torch.finfo(sent.dtype).max)
        all_gather(self._received, self._sent, group=self._ranks.group)
        rows = self._received.view(self._ranks.size, -1)
        self._differing = HostCopy((rows[:, -len(flags) :] != rows[0, -len(flags) :]).any(dim=0))
        rows = rows.to(own[0].dtype)
        of_ranks = (torch.split_with_sizes(row[: sum(n)], n) for row, n in zip(rows, self._lengths, strict=True))
        return zip(self._buckets, map(list, zip(*of_ranks, strict=True)), strict=True)

    def check(self) -> None:
        """Raise RuntimeError, on all ranks alike, if ranks differed at the newest exchange.

        A rank had failed, or only some ranks had a gradient for a parameter, or only some had non-finite ones. Call it at the
        next step: by then that exchange is over on the device, too, and nothing waits.
        """
        *present, skipped, failed = self._differing.read() if self._differing is not None else [False] * 2
        if failed:
            raise RuntimeError("a rank failed in the last step; its own error says why")
        if skipped:
            raise RuntimeError(
                "at the last step some ranks had gradients with NaN or Inf and others had none: average them first"
            )
        if not any(present):
            return
        names = [name for name, differs in zip(self._names, present, strict=True) if differs]
        raise RuntimeError(
            f"at the last step some ranks had a gradient where others had none: {', '.join(names[:5])}"
            f"{' and others' if len(names) > 5 else ''}; either all ranks must have one or none"
        )


def make_exchanges(buckets: list[Bucket], names: dict[Tensor, str], ranks: Ranks, dtype: torch.dtype | None) -> list[Exchange]:
    """Return an exchange for each device and dtype of the buckets; send in `dtype`, or theirs if None. [] on one rank."""
    kinds: dict[tuple[torch.device, torch.dtype], dict[int, Bucket]] = {}
    for i, bucket in enumerate(buckets) if ranks.size > 1 else ():
        kinds.setdefault((bucket.device, bucket.dtype), {})[i] = bucket
    return [Exchange(ranks, members, names, dtype or own) for (_, own), members in kinds.items()]


def check_exchanges(exchanges: list[Exchange]) -> None:
    """Raise RuntimeError as `Exchange.check` does."""
    for exchange in exchanges:
        exchange.check()


def exchange_all(exchanges: list[Exchange], directions: list[Tensor], flags: list[bool]) -> list[list[Tensor]]:
    """Return all ranks' directions of each bucket, given this rank's, and two flags: it skips the step, it failed."""
    found = {i: of_ranks for exchange in exchanges for i, of_ranks in exchange.run(directions, flags)}
    return [found[i] for i in range(len(directions))]
