"""What `optimizer.state` shows of the state in buckets, and how changes that users make there get back."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .checkpoint import Entries, counts, pieces, place
from .copies import copy
from .options import MARKS, STRUCTURAL, Group
from .state import Bucket, is_own, read_steps

Gathered = Callable[[], Entries] | None  # returns the state of all parameters; None on a rank that has only a part of it
STRUCTURE = [name for name, marks in MARKS.items() if STRUCTURAL in marks]


class State(defaultdict[Any, Any]):
    """`optimizer.state`: a dictionary that calls `look` before an entry is read."""

    look: Callable[[], None] = staticmethod(lambda: None)


def _looking(name: str) -> Callable[..., Any]:
    """Return a method of dictionaries that calls `look` first."""

    def call(state: State, *arguments: Any, **named: Any) -> Any:
        """Call `look`, then the method."""
        state.look()
        return getattr(defaultdict, name)(state, *arguments, **named)

    return call


for _name in (
    "__eq__", "__getitem__", "__iter__", "__ne__", "__or__", "__repr__", "__ror__", "copy", "get", "items", "pop", "popitem",
    "setdefault", "values",
):  # fmt: skip
    setattr(State, _name, _looking(_name))


def signature(groups: Sequence[Group], state: dict[Any, Any]) -> list[Any]:
    """Return what determines the buckets, options and parameters with their shapes, devices, and dtypes; and the entries."""
    found: list[Any] = []
    for group in groups:
        found += [id(group), *map(group.get, STRUCTURE)]
        for p in group["params"]:
            found.append((id(p), id(dict.get(state, p)), None if is_lazy(p) or p is None else (p.shape, p.device, p.dtype)))
    return found


class Shown:
    """The entries of `optimizer.state`: views of the live state, and copies where a tensor lies in several pieces.

    They are filled when a user first looks at one. From then on, each step first reads changes, and then writes copies.

    Args:
        groups: what the buckets were made for.
        state: `optimizer.state`; its dictionaries stay, with foreign keys.
        gathered: if None, `step` alone is shown.
        looked: whether the entries are filled at once. Tensors stay the same objects where they fit.
    """

    def __init__(self, buckets: Sequence[Bucket], groups: Any, state: dict[Any, Any], gathered: Gathered, looked: bool):
        self._buckets, self.gathered = buckets, gathered
        self.live: Callable[[], Entries] = gathered or (lambda: counts(buckets))
        # What is shown of each parameter, and its `data_ptr`; empty until a user looks
        self.own: dict[Tensor, dict[str, tuple[Tensor, int]]] = {}
        self._entries: Entries = {}
        live = self.live() if looked else {}
        for bucket in buckets:
            for p in bucket.params:
                entry = dict.get(state, p)
                self._entries[p] = state[p] = entry = entry if isinstance(entry, dict) else {}
                for key in [key for key in entry if is_own(bucket, key)]:
                    now, X = entry.pop(key), live.get(p, {}).get(key)
                    if X is not None and isinstance(now, Tensor) and (now.dtype, now.device) == (X.dtype, X.device):
                        now.data = X  # references to it stay alive
                        live[p][key] = now
        self._signature = signature(groups, state)
        self.show(live)

    @torch.inference_mode(False)
    def look(self) -> None:
        """Show the live state from now on."""
        if not self.own:
            self.show(self.live())

    def show(self, live: Entries) -> None:
        """Put what is not shown yet into the entries, except where a user set another value or cleared the entry."""
        for p, state in live.items():
            entry, own = self._entries[p], self.own.setdefault(p, {})
            cleared = own and not own.keys() & entry.keys()
            for key, X in state.items() if not cleared else ():
                if key not in own and key not in entry:
                    entry[key], own[key] = X, (X, X.data_ptr())
        self._copies: list[tuple[Tensor, Tensor]] = []  # of pieces of state
        for bucket in self._buckets if self.own else ():
            for key, _, view, X in pieces(bucket):
                shown = self.own[bucket.params[view.param]].get(key)
                if shown and shown[0].untyped_storage().data_ptr() != X.untyped_storage().data_ptr():
                    self._copies.append((place(view, shown[0]), X))

    def changed(self, state: dict[Any, Any], groups: Any) -> bool:
        """Return whether users changed the groups' signature, or removed or replaced an entry, a tensor, or a tensor's data."""
        if signature(groups, state) != self._signature:
            return True
        for bucket in self._buckets:
            group = bucket.group
            if (group["betas"][0] and bucket.exp_avg is None) or (group["momentum"] and bucket.momentum_buffer is None):
                return True
            for p in bucket.params if self.own else ():
                own, entry = self.own[p], self._entries[p]
                kept = all(entry.get(key) is X and X.data_ptr() == pointer for key, (X, pointer) in own.items())
                if not kept or any(is_own(bucket, key) for key in entry.keys() - own.keys()):
                    return True
        return False

    def read(self) -> None:
        """Copy into the live state what users changed in place."""
        for bucket in self._buckets if self.own else ():
            bucket.steps = [read_steps(self.own[p]["step"][0], f"a parameter of shape {tuple(p.shape)}") for p in bucket.params]
        copy([X for _, X in self._copies], [piece for piece, _ in self._copies])

    def write(self) -> None:
        """Bring counts and copies up to date after a step."""
        for bucket in self._buckets if self.own else ():
            for p, steps in zip(bucket.params, bucket.steps, strict=True):
                self.own[p]["step"][0].fill_(steps)
        copy([piece for piece, _ in self._copies], [X for _, X in self._copies])
