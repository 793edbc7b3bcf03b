"""Show the state of parameters in `optimizer.state`, and take over what users change there."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from .blocks import Layout
from .copies import copy, flat_views, grid_views
from .state import Bucket, moments

Entries = Mapping[Tensor, dict[str, Any]]  # the state of each parameter


class Shown:
    """The tensors that `optimizer.state` shows: views of the live state, or copies where a view is not possible.

    Copies are `step`, and moments of parameters whose blocks are not contiguous in the flat vector. On multiple ranks, all
    tensors are copies, until the next step.

    Args:
        entries: the state of each parameter, from `checkpoint.pack`.
        state: `optimizer.state`, to which the entries are added; foreign keys in it stay.
    """

    def __init__(self, buckets: Sequence[Bucket], entries: Entries, state: dict[Any, dict[str, Any]]):
        self._buckets, self._entries = buckets, entries
        self._versions: list[tuple[Tensor, int]] = []
        for p, entry in entries.items():
            state[p].update(entry)
        self.refresh()

    def _copies(self) -> Iterator[tuple[Layout, Tensor, list[Tensor | None]]]:
        """Yield the layout, the flat vector, and each parameter's copy, None for a view, of each moment."""
        for bucket in self._buckets:
            for name, flat in moments(bucket):
                shown = [self._entries[p].get(name) for p in bucket.params]
                live = flat.untyped_storage().data_ptr()
                yield bucket.layout, flat, [None if X is None or X.untyped_storage().data_ptr() == live else X for X in shown]

    def refresh(self) -> None:
        """Update the copies after a step."""
        copies = []
        for bucket in self._buckets:
            for p, steps in zip(bucket.params, bucket.steps, strict=True):
                copies.append(self._entries[p]["step"].fill_(steps))
        for layout, flat, found in self._copies():
            copy(grid_views(layout, found), flat_views(layout, flat, found))
            copies += [X for X in found if X is not None]
        self._versions = [(X, X._version) for X in copies]

    def changed(self, state: Entries) -> bool:
        """Return whether a user removed or replaced a tensor in `optimizer.state`, or changed a copy in place."""
        for p, entry in self._entries.items():
            now = state.get(p, {})
            if any(now.get(key) is not X for key, X in entry.items()):
                return True
        return any(X._version != version for X, version in self._versions)

    def merge(self, saved: dict[Tensor, dict[str, Any]], state: Entries) -> None:
        """Apply users' changes to `saved`, the live state; if users deleted all keys of a parameter, empty its entry."""
        edited = {id(X) for X, version in self._versions if X._version != version}
        for p, entry in self._entries.items():
            now = state.get(p, {})
            if not any(key in now for key in entry):
                saved[p] = {}
                continue
            for key, X in entry.items():
                if key not in now:
                    del saved[p][key]
                elif now[key] is not X or id(X) in edited:
                    saved[p][key] = now[key]

    def hide(self, state: dict[Any, dict[str, Any]]) -> None:
        """Remove the entries from `optimizer.state`; foreign keys stay."""
        for p, entry in self._entries.items():
            for key in entry:
                state.get(p, {}).pop(key, None)
