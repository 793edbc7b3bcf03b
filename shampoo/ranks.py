"""Several ranks: who they are, whether they agree, and the one exchange of a step.

Every rank computes the directions of the blocks that it owns; one all-gather gives all directions to all ranks, and each
applies them to its weights. Who owns which block is decided by `layout.build_layouts`, a pure function.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .health import Later
from .state import Bucket

if dist.is_available():
    all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13 deprecates the older name


class Ranks(NamedTuple):
    """The ranks that share the blocks out; without a process group one rank has all."""

    group: Any  # a ProcessGroup, or None
    rank: int
    size: int


ALONE = Ranks(None, 0, 1)


def find_ranks(process_group: Any) -> Ranks:
    """The ranks of a process group or of a one-dimensional DeviceMesh; None is the default group, if there is one.

    Raises ValueError for a mesh of more dimensions, for anything else, and for a group that this process is not in.
    """
    if process_group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return ALONE
        process_group = dist.group.WORLD
    if hasattr(process_group, "get_group"):
        if process_group.ndim != 1:
            raise ValueError(
                f"process_group is a mesh of dimensions {process_group.mesh_dim_names or process_group.ndim}; it must have "
                "one: name the mesh's dimensions and pass mesh[name], the one to share over"
            )
        process_group = process_group.get_group()
    if not isinstance(process_group, dist.ProcessGroup):
        raise ValueError(
            f"process_group is {process_group!r}; it must be a ProcessGroup that this process is in, a one-dimensional "
            "DeviceMesh, or None"
        )
    return Ranks(process_group, dist.get_rank(process_group), dist.get_world_size(process_group))


def attempt(act: Callable[..., Any], *arguments: Any) -> tuple[Any, Exception | None]:
    """What the call returns and what it raises, one of them None: of several ranks the others must hear of an error first."""
    try:
        return act(*arguments), None
    except Exception as error:
        return None, error


def agree(ranks: Ranks, description: Sequence[str], error: Exception | None) -> None:
    """Raise on all ranks unless all have equal descriptions and no error. A collective: no rank goes on alone.

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
    """What the ranks' descriptions first differ in."""
    longest = max(map(len, descriptions))
    lines = zip(*(lines + ["nothing"] * (longest - len(lines)) for lines in descriptions), strict=True)
    differing = next(line for line in lines if len(set(line)) > 1)
    other = next(r for r, text in enumerate(differing) if text != differing[0])
    return (
        "all ranks must have the same parameters and options in the same order; "
        f"rank 0 has {differing[0]} where rank {other} has {differing[other]}"
    )


def is_sharded(x: Tensor) -> bool:
    """Whether this is a DTensor, as FSDP2 makes them."""
    return hasattr(x, "full_tensor")


def whole(x: Tensor | None) -> Tensor | None:
    """The whole tensor of a DTensor, a collective of its mesh; any other as it is."""
    return x.full_tensor() if x is not None and is_sharded(x) else x  # type: ignore[attr-defined]


def add_part(x: Tensor, update: Tensor) -> None:
    """x <- x + update for a DTensor x and a whole update: each rank adds to its part."""
    from torch.distributed.tensor import DTensor, Replicate  # 1.5 s, which only their users pay

    mesh, placements = x.device_mesh, x.placements  # type: ignore[attr-defined]
    replicated = DTensor.from_local(update, mesh, [Replicate()] * mesh.ndim, run_check=False)
    x.to_local().add_(replicated.redistribute(mesh, placements).to_local())  # type: ignore[attr-defined]


class Exchange:
    """The buffers of one all-gather a step, for the buckets of one device and dtype.

    Rank r sends its directions end to end, then a flag for each parameter, 1 where it has a gradient there, and two more, 1
    if its step was skipped, and if it failed. All ranks send as much as the one with the most, at every step.

    Args:
        buckets: with their places among the optimizer's.
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
        self._differing: Later | None = None  # whether ranks had other flags at the newest exchange

    def gather(self, directions: list[Tensor], flags: list[bool]) -> Iterator[tuple[int, list[Tensor]]]:
        """For each bucket its place and the directions of all ranks, given this one's for each place and its two flags."""
        own = [directions[place] for place in self._buckets]
        flags = [p.grad is not None for bucket in self._buckets.values() for p in bucket.params] + flags
        if flags != self._flags:
            self._sent[-len(flags) :] = torch.tensor(flags, dtype=self._sent.dtype)
            self._flags = flags
        torch.cat(own, out=self._sent[: sum(self._lengths[self._ranks.rank])])
        all_gather(self._received, self._sent, group=self._ranks.group)
        rows = self._received.view(self._ranks.size, -1)
        self._differing = Later((rows[:, -len(flags) :] != rows[0, -len(flags) :]).any(dim=0))
        rows = rows.to(own[0].dtype)
        of_ranks = (row[: sum(n)].split(n) for row, n in zip(rows, self._lengths, strict=True))
        return zip(self._buckets, map(list, zip(*of_ranks, strict=True)), strict=True)

    def check(self) -> None:
        """Raise RuntimeError, on all ranks alike, if at the newest exchange a rank had failed, or some ranks had a gradient
        where others had none, or one that is not finite where others' were.

        To be called at the next step: by then that exchange is over on the device, too, and nothing waits.
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
    """An exchange for each device and dtype; `dtype` is that of what is sent, None the buckets' own."""
    kinds: dict[tuple[torch.device, torch.dtype], dict[int, Bucket]] = {}
    for place, bucket in enumerate(buckets):
        kinds.setdefault((bucket.device, bucket.dtype), {})[place] = bucket
    return [Exchange(ranks, members, names, dtype or own) for (_, own), members in kinds.items()]
