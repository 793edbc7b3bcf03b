"""A torch optimizer whose state is in buckets: its groups, `state`, and checkpoints, on any number of ranks."""

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
from .ranks import Exchange, agree, attempt, check_exchanges, find_ranks, make_exchanges
from .shown import Shown
from .state import Bucket, make_buckets, signature

# Attributes that pickle and deepcopy keep, beside torch's.
KEPT = (
    "_ranks", "_exchange_dtype", "_health", "_buckets", "_removed", "_shown", "_exchanges", "_consolidated", "_initialized",
    "_compared", "_signature",
)  # fmt: skip


class BucketedOptimizer(Optimizer):
    """Groups and state of `AdamWShampoo`, as torch's users expect them.

    The buckets follow the groups: what stands in the groups is trained, with the options that it has there. `state` shows each
    parameter's state (see `Shown`), and what users change or delete there takes effect at the next step.
    """

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        exchange_dtype: torch.dtype | None,
        max_skipped_steps: int,
        process_group: Any,
    ):
        self._ranks, self._exchange_dtype = find_ranks(process_group), exchange_dtype
        self._health = Health(max_skipped_steps)
        self._buckets: list[Bucket] = []
        self._signature: list[Any] = []  # what the buckets were made for
        self._removed: dict[Tensor, dict[str, Any]] = {}  # state of parameters that were taken out of their groups
        self._shown: Shown | None = None  # in `state`, once a user has looked there
        self._exchanges: list[Exchange] = []  # on multiple ranks
        self._consolidated: dict[Tensor, dict[str, Any]] | None = None  # the state of all ranks, until the next step
        self._initialized = self._compared = False
        _, error = attempt(self._initialize, params, defaults)
        own = [f"exchange_dtype {exchange_dtype}", f"max_skipped_steps {max_skipped_steps}"]
        agree(self._ranks, own + options.describe(vars(self).get("param_groups", [])), error)
        self._initialized = True

    def _initialize(self, params: Any, defaults: dict[str, Any]) -> None:
        options.check_value("exchange_dtype", self._exchange_dtype, options.EXCHANGE_DTYPE)
        options.check_value("max_skipped_steps", self._health.limit, options.MAX_SKIPPED_STEPS)
        super().__init__(params, defaults)
        self._update_buckets()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; missing options take the optimizer's defaults. Raises ValueError as the constructor does.

        On multiple ranks, call it on all, with the same group.
        """
        if not self._initialized:  # the constructor's ranks agree on all groups at once
            self._add(param_group)
            return
        check_exchanges(self._exchanges)
        number = len(self.param_groups)
        _, error = attempt(self._add, param_group)
        try:
            agree(self._ranks, options.describe(self.param_groups), error)
        except Exception:  # an error on any rank: all ranks drop the group
            del self.param_groups[number:]
            raise
        self._update_buckets()

    def _add(self, param_group: dict[str, Any]) -> None:
        options.check_names(param_group)
        number = len(self.param_groups)
        super().add_param_group({name: options.plain(value) for name, value in param_group.items()})
        group = self.param_groups[-1]
        group.setdefault("step", 0)
        try:
            options.check_group(group)
        except ValueError:
            del self.param_groups[number:]
            raise
        if group["start_preconditioning_step"] is None:  # set here, so that a later change of the frequency does not move it
            group["start_preconditioning_step"] = group["precondition_frequency"]

    def _update_buckets(self) -> None:
        """Make the buckets anew if parameters or options that decide which state there is changed, or users changed `state`.

        What fits is kept; a new parameter starts at zero. On multiple ranks a collective then. Raises ValueError for what does
        not fit, and leaves the buckets as they were.
        """
        groups: Any = self.param_groups
        if signature(groups) == self._signature and not (self._shown and self._shown.changed(self._state)):
            return
        _, error = attempt(options.check_groups, groups)
        if self._initialized:
            agree(self._ranks, options.describe(groups), error)
        elif error is not None:
            raise error
        single = self._ranks.size == 1
        shards = [[bucket] for bucket in self._buckets] if single else checkpoint.collect(self._buckets, self._ranks, None)
        entries = {**self._removed, **checkpoint.pack(shards)}
        if self._shown:
            self._shown.merge(entries, self._state)
        buckets = make_buckets(groups, self._ranks.rank, self._ranks.size)
        checkpoint.unpack(buckets, entries, self._names(), checkpoint.MAY_START_LATE)
        self._install(buckets)
        params = set(self._params())
        self._removed = {p: entry for p, entry in entries.items() if p not in params}

    def _install(self, buckets: list[Bucket]) -> None:
        """Take new buckets, which fit the groups."""
        self._hide()
        self._buckets, self._signature = buckets, signature(self.param_groups)  # type: ignore[arg-type]
        self._consolidated = None
        self._exchanges = make_exchanges(buckets, self._names(), self._ranks, self._exchange_dtype)

    def _hide(self) -> None:
        if self._shown:
            self._shown.hide(self._state)
        self._shown = None

    @property
    def state(self) -> defaultdict[Any, Any]:
        """The state of each parameter, as in torch's optimizers. On multiple ranks, `step` alone until it is consolidated."""
        if self._initialized:
            if self._ranks.size == 1:
                self._update_buckets()
            if self._shown is None:
                steps = {p: n for bucket in self._buckets for p, n in zip(bucket.params, bucket.steps, strict=True)}
                entries = self._gathered() or {p: {"step": torch.tensor(float(n))} for p, n in steps.items()}
                self._shown = Shown(self._buckets, entries, self._state)
        return self._state

    @state.setter
    def state(self, value: defaultdict[Any, Any]) -> None:
        if self._initialized:
            _ = self.state  # what is shown now and not in the new value is reset
        self._state = value

    def _names(self) -> dict[Tensor, str]:
        """Return parameter names for error messages."""
        return options.parameter_names(self.param_groups)

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _start_step(self) -> None:
        """Raise pending errors, follow changes of groups and state, and on multiple ranks forget gathered state.

        At the first step on multiple ranks, raise ValueError unless they have equal replicated parameters.
        """
        check_exchanges(self._exchanges)
        self._health.count(self._names)
        self._update_buckets()
        if self._exchanges:
            self._hide()
            self._consolidated = None
            if not self._compared:
                names, params = self._names(), [p for p in self._params() if not is_sharded(p) and not is_lazy(p)]
                agree(self._ranks, [f"{names[p]} with weights of checksum {checksum(p)}" for p in params], None)
                self._compared = True

    def _gathered(self) -> dict[Tensor, dict[str, Any]] | None:
        """Return each parameter's state; on multiple ranks what was consolidated, or zeros before the first step, or None."""
        if self._ranks.size == 1:
            return checkpoint.pack([[bucket] for bucket in self._buckets])
        if self._consolidated is None and not any(any(bucket.steps) for bucket in self._buckets):
            return checkpoint.pack(
                [checkpoint.zero_shards(bucket, torch.device("cpu"), self._ranks) for bucket in self._buckets]
            )
        return self._consolidated if signature(self.param_groups) == self._signature else None  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """Return options and state per parameter, as in torch's optimizers; `checkpoint` lists the keys. deepcopy to keep it.

        On multiple ranks, the state is what `consolidate_state_dict()` gathered, on the CPU, or zeros before the first step.
        Raises RuntimeError on a rank without it.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        if self._ranks.size == 1:
            self._update_buckets()
        entries = self._gathered()
        if entries is None:
            raise RuntimeError(
                f"rank {self._ranks.rank} of {self._ranks.size} holds only its own part of the state: call "
                "consolidate_state_dict() on all ranks after the last step, then state_dict() on the rank that it gathers to; "
                "for torch.distributed.checkpoint call consolidate_state_dict(to=None) on all ranks, also before loading"
            )
        packed = checkpoint.pack_state_dict(self.param_groups, entries, self._state)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, packed)
            packed = packed if changed is None else changed
        return packed

    @torch.no_grad()
    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """Gather the state of all ranks for `state_dict()` on the CPU of rank `to` of the process group, or of all if None.

        A collective: all ranks must call it. The result is kept until the next step. On one rank it does nothing. Raises
        ValueError if `to` is invalid or ranks differ in it, in options, or in steps; RuntimeError as `step` does.
        """
        check_exchanges(self._exchanges)
        _, error = attempt(options.check_value, "to", to, options.one_of(None, *range(self._ranks.size)))
        agree(self._ranks, [f"to {to}", *options.describe(self.param_groups)], error)
        self._update_buckets()
        if self._ranks.size > 1:
            self._hide()
            shards = checkpoint.collect(self._buckets, self._ranks, to)
            self._consolidated = checkpoint.pack(shards) if shards or to in (None, self._ranks.rank) else None

    def consolidate(self, to: int | None = 0) -> None:
        """Call `consolidate_state_dict`, under its former name."""
        warnings.warn("consolidate() is now consolidate_state_dict()", DeprecationWarning, stacklevel=2)
        self.consolidate_state_dict(to)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a copy of a `state_dict()`, options included, as torch does. On ValueError, the optimizer is unchanged.

        A collective: all ranks must call it, with the same state_dict.
        """
        state_dict = dict(state_dict) if isinstance(state_dict, dict) else state_dict
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        found, error = attempt(checkpoint.read, state_dict, self.param_groups, self._ranks)
        agree(self._ranks, options.describe(found[0]) if found else [], error)
        self.param_groups, buckets, state = found
        self._install(buckets)
        self._removed, self._state = {}, defaultdict(dict, state)
        self._health.forget()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:  # torch keeps only defaults, groups, and state
        if self._ranks.size > 1:
            raise RuntimeError(
                "an optimizer on multiple ranks cannot be pickled or copied: use consolidate_state_dict() and state_dict()"
            )
        self._update_buckets()
        self._hide()
        return {name: vars(self)[name] for name in ("defaults", "param_groups", "_state", *KEPT)}
