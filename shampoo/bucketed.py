"""A torch optimizer with state in buckets: parameter groups, `state`, and checkpoints, on any number of ranks."""

import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from . import checkpoint, options
from .copies import checksum, is_sharded
from .health import Health
from .ranks import ALONE, Exchange, agree, await_others, find_ranks
from .rules import check_value, one_of
from .shards import Shards
from .shown import Gathered, Shown, State
from .state import Bucket

# Attributes that pickle and deepcopy keep, besides torch's.
KEPT = ("_ranks", "_settings", "_health", "_buckets", "_compared")


class BucketedOptimizer(Optimizer):
    """Base class of `AdamWShampoo`: `param_groups`, `state`, and state_dicts, which behave as in torch's optimizers.

    State is stored in buckets (see `Bucket`). Parameters and options may be changed in `param_groups`, and state in `state`
    (see `Shown`); at the next step, the buckets are rebuilt if necessary, and keep the state that fits.
    """

    def __init__(self, params: Any, defaults: dict[str, Any], settings: dict[str, Any], process_group: Any):
        self._ranks, self._settings = find_ranks(process_group) if settings["shard"] else ALONE, settings
        self._health = Health(settings["max_skipped_steps"])
        self._compared = False  # whether ranks have compared weights
        own = [f"{name} {value}" for name, value in settings.items()]
        agree(self._ranks, self._initialize, params, defaults, describe=lambda _: own)
        self._install([])
        self._rebuild()

    def _initialize(self, params: Any, defaults: dict[str, Any]) -> None:
        for name, rule in options.SETTINGS.items():
            check_value(name, self._settings[name], rule)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; missing options take the optimizer's defaults. Raises ValueError as the constructor does.

        On multiple ranks, call it on all ranks with the same group. After an error on any rank, no rank has the group.
        """
        if not hasattr(self, "_buckets"):  # in the constructor, which compares all groups between ranks at once
            self._add(param_group)
            return
        self._update_buckets()
        number = len(self.param_groups)
        try:
            agree(self._ranks, self._add, param_group)
            self._rebuild()
        except Exception:  # on any rank, so all ranks drop the group
            del self.param_groups[number:]
            raise

    def _add(self, param_group: dict[str, Any]) -> None:
        param_group.update({name: options.plain(value) for name, value in param_group.items()})  # torch keeps this very dict
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("step", 0)
        if group["start_preconditioning_step"] is None:  # a later change of the frequency does not move the start
            group["start_preconditioning_step"] = 1 if group["preconditioner"] == "soap" else group["precondition_frequency"]

    def _update_buckets(self) -> None:
        """Bring the buckets up to date with what users changed in `param_groups` and `state`.

        On multiple ranks, first raise errors of the last step; see `Exchange.check`.
        """
        if self._exchange is not None:
            self._exchange.check()
        if self._shown.changed(self.state, self.param_groups):
            self._rebuild()
        else:
            self._shown.read()

    @torch.inference_mode(False)
    def _rebuild(self) -> None:
        """Make new buckets for the groups, with the state that is in `state`, or else in the present buckets. A collective.

        State that fits is kept, and new parameters start at zero. Raises ValueError if state does not fit, and leaves the
        buckets unchanged.
        """
        groups: Any = self.param_groups
        agree(self._ranks, options.check_groups, groups, describe=lambda _: options.describe(groups))
        looked = bool(self._shown.own) or any("step" in entry for entry in dict.values(self.state) if isinstance(entry, dict))
        entries = {p: entry for p, entry in self.state.items() if isinstance(p, Tensor) and isinstance(entry, dict)}
        self._shown.show(checkpoint.pack(checkpoint.collect(self._buckets, self._ranks, None)))
        buckets = agree(self._ranks, checkpoint.unpack, groups, entries, self._ranks, checkpoint.MAY_START_LATE)
        self._install(buckets, checkpoint.is_zero(entries), looked)

    def _install(self, buckets: list[Bucket], zero: bool = False, looked: bool = False) -> None:
        """Replace the buckets by new ones, which must fit the groups; `zero`: their state is zero on all ranks.

        If `looked`, `state` shows their state at once.
        """
        ranks, names, dtype = self._ranks, self._names(), self._settings["exchange_dtype"]
        for bucket in buckets if ranks.size > 1 else ():
            if is_sharded(bucket.params[0]):
                bucket.shards = Shards(ranks, bucket, names, dtype, self._settings["gather_mb"] * 2**20)
        self._buckets = buckets
        self._exchange = Exchange(ranks, buckets, names, dtype) if ranks.size > 1 and buckets else None
        known = zero or ranks.size == 1
        self._show((lambda: checkpoint.pack(checkpoint.zero_shards(buckets, ranks))) if known else None, looked)

    @torch.inference_mode(False)
    def _show(self, gathered: Gathered, looked: bool, elsewhere: bool = False) -> None:
        """Show in `state` what `gathered` returns from now on; see `Shown`. `elsewhere`: it is None on this rank alone."""
        self._elsewhere = elsewhere
        state = self.state = self.state if isinstance(self.state, State) else State(dict, self.state)
        self._shown = Shown(self._buckets, self.param_groups, state, gathered, looked)
        state.look = self._shown.look

    def _names(self) -> dict[Tensor, str]:
        """Return parameter names for error messages."""
        return options.parameter_names(self.param_groups)

    def _start_step(self) -> None:
        """Raise pending errors, apply changes of groups and state, and on multiple ranks drop gathered state.

        At the first step on multiple ranks, raise ValueError if the `checksum` of a parameter that is no DTensor differs.
        """
        self._health.count(self._names)
        self._update_buckets()
        if self._ranks.size > 1:
            if self._shown.gathered or self._elsewhere:
                self._show(None, bool(self._shown.own))
            if not self._compared:
                params = {p: name for p, name in self._names().items() if not is_sharded(p) and not is_lazy(p)}
                lines = [f"{name} with weights of checksum {checksum(p)}" for p, name in params.items()]
                agree(self._ranks, list, lines, describe=list)
                self._compared = True

    @property
    def gathered(self) -> bool:
        """Whether this rank has the state of all ranks, so that `state_dict()` needs no other rank."""
        return self._ranks.size == 1 or bool(self._shown.gathered and not self._shown.changed(self.state, self.param_groups))

    def state_dict(self) -> dict[str, Any]:
        """Return options and state per parameter, as in torch's optimizers; the module `checkpoint` lists the keys.

        Later steps change its tensors, so deepcopy it to keep it. On multiple ranks, the state is what
        `consolidate_state_dict()` gathered, on the CPU, or zeros before the first step. Otherwise (see `gathered`) this is a
        collective that gathers on all ranks. Raises RuntimeError on the group's rank 0 if others do not call it within a
        minute, and on a rank without state if it was gathered on another one.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        if self._ranks.size == 1:
            self._update_buckets()
        if self._elsewhere:
            raise RuntimeError("the state was gathered on another rank: call consolidate_state_dict(to=None) on all ranks")
        if not self.gathered:
            await_others(self._ranks)
            self.consolidate_state_dict(to=None)
        packed = checkpoint.pack_state_dict(self.param_groups, self._shown.live(), dict(dict.items(self.state)))
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, packed)
            packed = packed if changed is None else changed
        return packed

    @torch.no_grad()
    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """Gather all ranks' state for `state_dict()` on the CPU of rank `to` of the process group, or of all ranks if None.

        A collective: all ranks must call it. The result is kept until the next step. With one rank, there is nothing to gather.
        Raises ValueError if `to` is invalid, or if ranks differ in `to`, parameters, options, or steps, and RuntimeError if
        another rank fails, or as `step` does if ranks differed at the last step.
        """
        self._update_buckets()
        own = [f"argument to={to}", *options.describe(self.param_groups)]
        agree(self._ranks, check_value, "to", to, one_of(None, *range(self._ranks.size)), describe=lambda _: own)
        if self._ranks.size > 1:
            entries = checkpoint.pack(checkpoint.collect(self._buckets, self._ranks, to))
            here = to in (None, self._ranks.rank)
            self._show((lambda: entries) if here else None, bool(self._shown.own), elsewhere=not here)

    def consolidate(self, to: int | None = 0) -> None:
        """Call `consolidate_state_dict`. Deprecated: this is its former name."""
        warnings.warn("consolidate() is now consolidate_state_dict()", DeprecationWarning, stacklevel=2)
        self.consolidate_state_dict(to)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a copy of a `state_dict()`, including options, as torch does. On an error, the optimizer is unchanged.

        A collective: all ranks must call it, with the same state_dict. Raises ValueError for a state_dict that does not fit,
        and if options differ between ranks, and RuntimeError if another rank fails.
        """
        state_dict = dict(state_dict) if isinstance(state_dict, dict) else state_dict
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        arguments = state_dict, self.param_groups, self._ranks
        found = agree(self._ranks, checkpoint.read, *arguments, describe=lambda found: options.describe(found[0]))
        self.param_groups, entries, buckets = found
        self.state.clear()  # the same dictionary: wrappers may share it
        self.state.update(checkpoint.foreign(buckets, entries, checkpoint.copied))
        self._install(buckets, checkpoint.is_zero(entries))
        self._health.forget()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:  # torch's keeps only defaults, groups, and state
        if self._ranks.size > 1:
            raise RuntimeError("optimizers on multiple ranks cannot be pickled or copied: use consolidate_state_dict()")
        self._update_buckets()
        kept = {name: vars(self)[name] for name in ("defaults", "param_groups", *KEPT)}
        return {**kept, "state": defaultdict(dict, checkpoint.foreign(self._buckets, dict(dict.items(self.state))))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_buckets" in state:
            self._install(self._buckets)
