"""What `optimizer.state` shows of the state, and what users change there."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from .blocks import Layout
from .copies import copy, flat_views, grid_views
from .state import Bucket, moments

Entries = Mapping[Tensor, dict[str, Any]]  # the state of each parameter


class Shown:
    """The entries that `optimizer.state` shows: views of the live state, and copies where it lies in several pieces.

    Args:
        entries: as `checkpoint.pack` returns them.
        state: `optimizer.state`, which gets them beside its foreign keys.
    """

    def __init__(self, buckets: Sequence[Bucket], entries: Entries, state: dict[Any, dict[str, Any]]):
        self._buckets, self._entries = buckets, entries
        self._versions: list[tuple[Tensor, int]] = []
        for p, entry in entries.items():
            state[p].update(entry)
        self.refresh()

    def _copies(self) -> Iterator[tuple[Layout, Tensor, list[Tensor | None]]]:
        """Yield for each moment its layout, flat vector, and the tensors shown for its parameters that are copies."""
        for bucket in self._buckets:
            for name, flat in moments(bucket):
                shown = [self._entries[p].get(name) for p in bucket.params]
                live = flat.untyped_storage().data_ptr()
                yield bucket.layout, flat, [None if X is None or X.untyped_storage().data_ptr() == live else X for X in shown]

    def refresh(self) -> None:
        """Bring copies up to date after a step."""
        copies = []
        for bucket in self._buckets:
            for p, steps in zip(bucket.params, bucket.steps, strict=True):
                copies.append(self._entries[p]["step"].fill_(steps))
        for layout, flat, found in self._copies():
            copy(grid_views(layout, found), flat_views(layout, flat, found))
            copies += [X for X in found if X is not None]
        self._versions = [(X, X._version) for X in copies]

    def changed(self, state: Entries) -> bool:
        """Return whether a user removed or replaced a tensor that was shown, or changed a copy in place."""
        for p, entry in self._entries.items():
            now = state.get(p, {})
            if any(now.get(key) is not X for key, X in entry.items()):
                return True
        return any(X._version != version for X, version in self._versions)

    def merge(self, saved: dict[Tensor, dict[str, Any]], state: Entries) -> None:
        """Put into `saved`, the live state, what users changed; a parameter without any of its keys gets an empty entry."""
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
        """Take the entries out of `optimizer.state`, and leave foreign keys."""
        for p, entry in self._entries.items():
            for key in entry:
                state.get(p, {}).pop(key, None)
