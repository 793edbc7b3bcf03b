"""What `optimizer.state` shows of the state in buckets, and how changes that users make there get back."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .blocks import Layout
from .copies import copy, flat_views, grid_views
from .group import Group
from .options import STRUCTURAL
from .state import Bucket, is_own, moments, read_steps

Entries = dict[Tensor, dict[str, Any]]  # the state of each parameter


class Entry(dict[str, Any]):
    """The state of one parameter: a dictionary that `Shown.fill` fills when it is first used."""

    source: "ref[Shown] | None" = None  # while it is not filled; weak, so that a deleted optimizer is freed at once

    def __reduce__(self) -> Any:  # copies and pickles are plain dictionaries
        return dict, (list(self.items()),)


def _filled(name: str) -> Callable[..., Any]:
    """Return a method of dict that fills the entry first."""
    method = getattr(dict, name)

    def call(entry: Entry, *arguments: Any, **named: Any) -> Any:
        """Fill the entry, then call the method."""
        shown = entry.source() if entry.source is not None else None
        entry.source = None
        if shown is not None:
            shown.fill()
        return method(entry, *arguments, **named)

    return call


for _name in (
    "__contains__", "__delitem__", "__eq__", "__getitem__", "__ior__", "__iter__", "__len__", "__ne__", "__or__", "__repr__",
    "__reversed__", "__setitem__", "clear", "copy", "get", "items", "keys", "pop", "popitem", "setdefault", "update", "values",
):  # fmt: skip
    setattr(Entry, _name, _filled(_name))


def signature(groups: Sequence[Group]) -> list[Any]:
    """Return what determines the buckets: parameters, shapes, devices, dtypes, and STRUCTURAL options."""
    found: list[Any] = []
    for group in groups:
        found += [id(group), *map(group.get, STRUCTURAL)]
        for p in group["params"]:
            found.append((id(p), None if is_lazy(p) or p is None else (p.shape, p.device, p.dtype)))
    return found


class Shown:
    """The entries of `optimizer.state`: views of the live state, and copies where a tensor lies in several pieces.

    They are filled when a user first looks at one. From then on, each step first reads changes, and then writes copies. On
    multiple ranks, factors and roots are copies that are never read back: replace such a tensor rather than edit it in place.

    Args:
        groups: what the buckets were made for.
        state: `optimizer.state`; its dictionaries stay, with foreign keys, and tensors stay the same objects where they fit.
        owner: the optimizer; its `shown_state()` returns the entries to show.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        groups: Sequence[Group],
        state: dict[Any, Any],
        owner: Any,
    ):
        self._buckets, self._signature, self._owner = buckets, signature(groups), ref(owner)
        self._entries: Entries = {}
        self._pointers: dict[int, int] = {}  # where the data of each shown tensor was
        self.own: Entries = {}  # what was filled in; empty before that
        for p in (p for bucket in buckets for p in bucket.params):
            self._entries[p] = state[p] = state[p] if isinstance(state.get(p), dict) else Entry()
        self.reset()
        if not all(isinstance(entry, Entry) and not dict.__contains__(entry, "step") for entry in self._entries.values()):
            self.fill()

    def reset(self) -> None:
        """Take the optimizer's own keys out of the entries, until a user looks at one."""
        for p, own in self.own.items():
            for key in own:
                dict.pop(self._entries[p], key, None)
        self.own, self._pointers = {}, {}
        for entry in self._entries.values():
            if isinstance(entry, Entry):
                entry.source = ref(self)

    @torch.inference_mode(False)
    def fill(self) -> None:
        """Put the optimizer's own keys into all entries."""
        owner = self._owner()
        live = owner.shown_state() if owner is not None else {}
        for entry in self._entries.values():
            if isinstance(entry, Entry):
                entry.source = None
        self.own = {p: dict(own) for p, own in live.items() if p in self._entries}
        for p, own in self.own.items():
            entry = self._entries[p]
            for key, X in own.items():
                now = entry.get(key)
                if isinstance(now, Tensor) and now is not X and (now.dtype, now.device) == (X.dtype, X.device):
                    now.data = X  # references to it stay alive
                    own[key] = now
                entry[key] = own[key]
                self._pointers[id(own[key])] = X.data_ptr()

    def changed(self, state: Mapping[Any, Any], groups: Any) -> bool:
        """Return whether users changed the groups' signature, or removed or replaced an entry, a tensor, or a tensor's data."""
        if signature(groups) != self._signature or not all(map(is_, map(state.get, self._entries), self._entries.values())):
            return True
        for bucket in self._buckets:
            group = bucket.group
            if (group["betas"][0] and bucket.exp_avg is None) or (group["momentum"] and bucket.momentum_buffer is None):
                return True
            for p in bucket.params if self.own else ():
                own, entry = self.own[p], self._entries[p]
                if any(X.data_ptr() != self._pointers[id(X)] or entry.get(key) is not X for key, X in own.items()):
                    return True
                # On multiple ranks, `own` may be only a part of the state, to which users add.
                if len(bucket.layouts) > 1 and any(is_own(bucket, key) for key in entry.keys() - own.keys()):
                    return True
        return False

    def release(self, state: Mapping[Any, Any], params: set[Tensor], live: Entries) -> None:
        """Give entries that users moved, or whose parameter is not among these, their state for good."""
        for p, entry in self._entries.items():
            if isinstance(entry, Entry) and (p not in params or state.get(p) is not entry):
                entry.source = None
                dict.update(entry, {key: X for key, X in live[p].items() if key not in self.own.get(p, {})})

    def collect(self, state: Mapping[Any, Any], live: Entries) -> Entries:
        """Return each parameter's state as it is in `optimizer.state`, given the live state for what is not shown there."""
        found: Entries = {}
        for p, entry in state.items():
            if isinstance(p, Tensor) and isinstance(entry, dict):
                if entry is not self._entries.get(p):
                    len(entry)  # fills that of another optimizer
                shown, found[p] = self.own.get(p, {}), dict(dict.items(entry))
                if entry is self._entries.get(p) and (not shown or any(key in found[p] for key in shown)):
                    found[p] = {**{key: X for key, X in live[p].items() if key not in shown}, **found[p]}
        return found

    def _copies(self) -> Iterator[tuple[Layout, Tensor, list[Tensor | None]]]:
        """Yield for each moment its layout, flat vector, and the shown tensors that are copies."""
        for bucket in self._buckets if self.own else ():
            for name, flat in moments(bucket):
                shown, live = [self.own[p].get(name) for p in bucket.params], flat.untyped_storage().data_ptr()
                yield bucket.layout, flat, [None if X is None or X.untyped_storage().data_ptr() == live else X for X in shown]

    def read(self) -> None:
        """Copy into the live state what users changed in place."""
        for bucket in self._buckets if self.own else ():
            bucket.steps = [read_steps(self.own[p]["step"], f"a parameter of shape {tuple(p.shape)}") for p in bucket.params]
        for layout, flat, copies in self._copies():
            copy(flat_views(layout, flat, copies), grid_views(layout, copies))

    def write(self) -> None:
        """Bring counts and copies up to date after a step."""
        for bucket in self._buckets if self.own else ():
            for p, steps in zip(bucket.params, bucket.steps, strict=True):
                self.own[p]["step"].fill_(steps)
        for layout, flat, copies in self._copies():
            copy(grid_views(layout, copies), flat_views(layout, flat, copies))

    def foreign(self, state: Mapping[Any, Any]) -> dict[Any, Any]:
        """Return `optimizer.state` without the optimizer's own keys."""
        return {
            p: {key: x for key, x in dict.items(entry) if key not in self.own.get(p, ())} if isinstance(entry, dict) else entry
            for p, entry in state.items()
        }
