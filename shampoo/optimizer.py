"""AdamW-style Shampoo as a torch optimizer."""

from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import checkpoint, options
from .assignment import Cost
from .copies import Inputs, flat_views, move, read
from .health import Health
from .ranks import Exchange, agree, attempt, find_ranks, make_exchanges
from .roots import QR_TOLERANCE
from .state import Bucket, make_buckets
from .step import compute_directions

# What pickles and copies keep.
KEPT = ("_made", "_buckets", "_ranks", "_exchange_dtype", "_carried", "_exchanges", "_consolidated", "_health")


class AdamWShampoo(Optimizer):
    """Shampoo with AdamW's conventions: averaged gradients and factors, decoupled decay, blocking, grafting.

    For a matrix W with gradient G, averages L of G G^T, R of G^T G, and M of G, it moves W along L^(-1/4) M R^(-1/4) (`update`
    has the formulas), each block of at most block_size x block_size by itself, scaled to the length of the grafting method's
    step.

    Args:
        params: tensors, named tensors (torch >= 2.6), or group dicts; all options but the last three may differ per group.
            Weights of any floating dtype, DTensors too; state is float32 (float64 for float64 weights).
        lr: learning rate; torch schedulers may change it.
        betas: decay of the gradient's average (theta in the paper) and of the factors' (beta); betas[1] = 1 is a plain sum.
        eps: added to every eigenvalue of a factor before its root; with relative_eps, eps times the factor's trace.
        weight_decay: W <- W - lr weight_decay W if decoupled_weight_decay (as in torch.optim.AdamW); otherwise weight_decay W
            is added to the gradient. Decoupled decay is added before momentum.
        momentum, nesterov: decay of an average of the directions; 0 is none, and then nesterov does nothing.
        nadam: look one averaging step ahead, betas[0] M + (1 - betas[0]) G instead of M.
        bias_correction: divide averages by 1 - beta^t, t being the group's steps with a gradient. Grafting "adam" always does.
        block_size, merge_dims: see `blocks`. Merging turns a matrix with at most block_size elements into a vector.
        max_dim: a parameter with a dimension >= max_dim gets no factors; grafting moves it (Adam if that is "none" or "sgd").
        precondition_frequency: steps between refreshes of the roots.
        factor_frequency: k: factors take only the gradients of steps 1, k + 1, 2k + 1, ..., with decay betas[1]^k.
        start_preconditioning_step: step of the first refresh; before it the grafting method moves all. None: the group's
            initial precondition_frequency. With grafting "none", roots are zero before it, and only decay acts.
        preconditioner: "shampoo".
        exponents, exponent_multiplier: see `preconditioner.block_exponents`; None is 1/(2k) for each of k dimensions.
        grafting: one of "none", "sgd", "adagrad", "rmsprop", "adam".
        grafting_beta2: decay of the grafting method's second moment; None: betas[1].
        grafting_eps: added to the square root of the second moment.
        normalized_grafting: pass G / ||G||_F to the grafting method, block by block.
        solver: how roots are computed: "eigh", exact; "qr", from the previous eigenvectors, which take half the memory of
            factors and roots; "newton", by matrix products alone, for accelerators, for exponents 1, 1/2, 1/3, ...
        qr_tolerance: of "qr": how much of a factor may lie off the diagonal in its basis, relative to ||A||_F.
        stagger: refresh a part of the roots at every step, each once in precondition_frequency steps.
        precondition_vectors: whether blocks of order 1 (biases, norms, merged dimensions) have a factor; otherwise as max_dim.
        bf16_roots: keep roots in bfloat16.
        exchange_dtype: dtype in which ranks exchange directions; None: that of the state.
        max_skipped_steps: raise FloatingPointError on this many consecutive non-finite steps.
        process_group: the ranks that share the blocks, a ProcessGroup or a one-dimensional DeviceMesh; None: the default group
            if torch.distributed is initialized, otherwise this process alone.

    lr, eps, decay, frequency, and the like may be changed in `param_groups` between steps, but not what determines the state:
    block_size, merge_dims, max_dim, precondition_vectors, preconditioner, exponents, grafting, solver, bf16_roots, and whether
    betas[0] or momentum is zero.

    Raises:
        ValueError: for an option out of range, an unknown option of a group, a complex or integer parameter, no parameters.
        RuntimeError: in `step`, for a sparse or complex gradient, before anything changes; on multiple ranks also if, at the
            previous step, a rank failed or only some ranks had a gradient. In `state_dict`, without `consolidate()`.
        FloatingPointError: in `step`, on the max_skipped_steps-th consecutive non-finite step.

    A step with a gradient that holds NaN or Inf, or whose squares overflow, is skipped: weights and state do not change. (On an
    accelerator, for which the host does not wait, gradients count as zero, weights do not change, and the next step counts it.)
    `events` counts such steps and unusual roots; the logger "shampoo" names the parameters.

    Paper settings: betas=(theta, beta), grafting="none", bias_correction=False, precondition_frequency=1, exponents=(1/p, 1/q),
    block_size at least the largest dimension, and merge_dims=False, which keeps small matrices from becoming vectors.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        momentum: float = 0.0,
        nesterov: bool = False,
        nadam: bool = False,
        bias_correction: bool = True,
        block_size: int = 1024,
        merge_dims: bool = True,
        max_dim: int = 1_000_000,
        precondition_frequency: int = 10,
        factor_frequency: int = 1,
        start_preconditioning_step: int | None = None,
        preconditioner: str = "shampoo",
        exponents: float | tuple[float, float] | None = None,
        exponent_multiplier: float = 1.0,
        grafting: str = "adam",
        grafting_beta2: float | None = None,
        grafting_eps: float = 1e-8,
        normalized_grafting: bool = False,
        relative_eps: bool = False,
        solver: str = "eigh",
        qr_tolerance: float = QR_TOLERANCE,
        stagger: bool = False,
        precondition_vectors: bool = True,
        bf16_roots: bool = False,
        exchange_dtype: torch.dtype | None = None,
        max_skipped_steps: int = 100,
        process_group: Any = None,
    ):
        defaults = {name: options.plain(value) for name, value in locals().items() if name in options.OPTIONS}
        self._buckets: list[Bucket] = []  # of all groups in turn
        self._ranks, self._exchange_dtype = find_ranks(process_group), exchange_dtype
        self._carried = [Cost(0.0, 0)] * self._ranks.size  # by the blocks that each rank owns
        self._exchanges: list[Exchange] | None = None  # on multiple ranks; made at the first step
        self._consolidated: dict[int, dict[str, Tensor]] | None = None  # the state of all ranks, until the next step
        self._health = Health(max_skipped_steps)
        self._made = False
        _, error = attempt(self._make, params, defaults)
        own = [f"exchange_dtype {exchange_dtype}", f"max_skipped_steps {max_skipped_steps}"]
        agree(self._ranks, own + options.describe(vars(self).get("param_groups", [])), error)
        self._show_state()
        self._made = True

    @property
    def events(self) -> Counter[str]:
        """How many steps were skipped, and how many roots were not computed as usual."""
        return self._health.events

    def _make(self, params: Any, defaults: dict[str, Any]) -> None:
        options.check_value("exchange_dtype", self._exchange_dtype, options.EXCHANGE_DTYPE)
        options.check_value("max_skipped_steps", self._health.limit, options.MAX_SKIPPED_STEPS)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options that it does not name are the optimizer's. Raises ValueError as the constructor does.

        On multiple ranks, call it on all, with the same group.
        """
        if not self._made:  # the constructor's ranks agree on all groups at once
            self._add(param_group)
            return
        groups, buckets, carried = len(self.param_groups), len(self._buckets), self._carried
        _, error = attempt(self._add, param_group)
        try:
            agree(self._ranks, options.describe(self.param_groups), error)
        except Exception:  # this rank's or another's: no rank keeps the group
            del self.param_groups[groups:], self._buckets[buckets:]
            self._carried = carried
            raise
        self._show_state()

    def _add(self, param_group: dict[str, Any]) -> None:
        options.check_names(param_group)
        param_group = {name: options.plain(value) for name, value in param_group.items()}
        options.check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group: Any = self.param_groups[-1]
        group.setdefault("step", 0)
        if group["start_preconditioning_step"] is None:  # set here, so that a later change of the frequency does not move it
            group["start_preconditioning_step"] = group["precondition_frequency"]
        options.check_parameters(group)
        buckets, self._carried = make_buckets(group, self._ranks.rank, self._carried)
        self._buckets += buckets
        self._exchanges = None

    def _show_state(self) -> None:
        """Give each parameter an entry in `state`: torch's checkpoints would take a step first if it were empty."""
        for p in self._params():
            self.state[p] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; return the closure's loss, if there is a closure."""
        self._check_exchanges()
        self._health.count(self._names)
        self._consolidated = None

        # 1. Loss and gradients
        loss, error = attempt(torch.enable_grad()(closure)) if closure is not None else (None, None)
        moving = {id(group) for group in self.param_groups if any(p.grad is not None for p in group["params"])}
        inputs = [read(bucket.params, bucket.layouts, bucket.group["weight_decay"]) for bucket in self._buckets]

        # 2. Directions of this rank's blocks. A rank that fails still takes part in the exchange: no other waits for it.
        directions: list[Tensor] = []
        views: list[list[list[Tensor]]] = []  # of each bucket's directions, for each rank
        skip = error is not None
        try:
            if not skip:
                finite = self._health.check(self._buckets, inputs, self._names)
                skip = finite is None and self._health.count(self._names)
            for bucket, of_bucket in zip(self._buckets, inputs, strict=True) if not skip else ():
                moves = id(bucket.group) in moving
                P, of_rank = compute_directions(bucket, of_bucket, finite) if moves else (bucket.zeros(), [])
                directions.append(P)
                views.append([of_rank])
            for group in self.param_groups if not skip else ():
                group["step"] += id(group) in moving
        except Exception as failure:
            error, skip = failure, True

        # 3. Directions of all ranks
        if self._ranks.size > 1:
            if skip:
                directions = [bucket.zeros() for bucket in self._buckets]
            views = self._exchange(directions, inputs, [skip, error is not None])
        if error is not None:
            raise error  # the other ranks raise at their next step

        # 4. Weights
        for bucket, of_bucket, of_ranks in zip(self._buckets, inputs, views, strict=True) if not skip else ():
            if bucket.rescued:
                self._health.report(bucket, self._names)
            move(bucket.params, bucket.layouts, of_bucket, of_ranks, bucket.group["lr"])
        return loss

    def _exchange(self, directions: list[Tensor], inputs: list[Inputs], flags: list[bool]) -> list[list[list[Tensor]]]:
        """Return the `flat_views` of all ranks' directions for each bucket, given this rank's; flags: it skips, it failed."""
        if self._exchanges is None:
            self._exchanges = make_exchanges(self._buckets, self._names(), self._ranks, self._exchange_dtype)
        found = {i: of_ranks for exchange in self._exchanges for i, of_ranks in exchange.run(directions, flags)}
        return [
            [flat_views(layout, P, inputs[i].grads) for layout, P in zip(bucket.layouts, found[i], strict=True)]
            for i, bucket in enumerate(self._buckets)
        ]

    def _check_exchanges(self) -> None:
        for exchange in self._exchanges or ():
            exchange.check()

    def _names(self) -> dict[Tensor, str]:
        """Return what errors call the parameters."""
        return options.parameter_names(self.param_groups)

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """Return options and state per parameter, as in torch's optimizers; `checkpoint` lists the keys. deepcopy to keep it.

        On multiple ranks, the state is what `consolidate()` gathered, on the CPU. Raises RuntimeError on a rank without it.
        """
        if self._ranks.size == 1:
            state = checkpoint.pack([[bucket] for bucket in self._buckets], self._params())
        elif self._consolidated is None:
            raise RuntimeError(
                f"rank {self._ranks.rank} of {self._ranks.size} holds only its own part of the state: call consolidate() on "
                "all ranks after the last step, then state_dict() on the rank that it gathers to; for "
                "torch.distributed.checkpoint call consolidate(to=None) on all ranks, before loading too"
            )
        else:
            state = dict(self._consolidated)  # torch's checkpoints rename the keys of what they get
        found = super().state_dict()
        groups = [{name: options.plain(value) for name, value in group.items()} for group in found["param_groups"]]
        return {**found, "state": state, "param_groups": groups}

    @torch.no_grad()
    def consolidate(self, to: int | None = 0) -> None:
        """Gather the state of all ranks for `state_dict()`, to the CPU of one rank of the process group, or of all if None.

        A collective: all ranks must call it. The result is kept until the next step. On one rank it does nothing. Raises
        ValueError for another `to`, or if ranks differ in it, in options, or in steps; RuntimeError as `step` does.
        """
        self._check_exchanges()
        _, error = attempt(options.check_value, "to", to, options.one_of(None, *range(self._ranks.size)))
        agree(self._ranks, [f"to {to}", *options.describe(self.param_groups)], error)
        if self._ranks.size > 1:
            shards = checkpoint.collect(self._buckets, self._ranks, to)
            self._consolidated = checkpoint.pack(shards, self._params()) if shards else None

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a `state_dict()` in, options included, as torch does. Raises ValueError and then leaves the optimizer unchanged.

        A collective: all ranks must call it, with the same state_dict.
        """
        found, error = attempt(checkpoint.read, state_dict, self.param_groups, self._ranks)
        agree(self._ranks, options.describe(found[0]) if found else [], error)
        groups, buckets, carried = found
        index = count()
        numbered = [{**group, "params": [next(index) for _ in group["params"]]} for group in groups]
        super().load_state_dict({"state": {}, "param_groups": numbered})
        for group, of_group in zip(self.param_groups, buckets, strict=True):
            for bucket in of_group:
                bucket.group = group  # torch makes new ones
        self._buckets, self._carried = [bucket for of_group in buckets for bucket in of_group], carried
        self._consolidated, self._exchanges = None, None
        self._health.forget()
        self._show_state()

    def __getstate__(self) -> dict[str, Any]:  # torch keeps only groups and state, for pickle and deepcopy
        if self._ranks.size > 1:
            raise RuntimeError("an optimizer on multiple ranks cannot be pickled or copied: use consolidate() and state_dict()")
        return {**super().__getstate__(), **{name: value for name, value in vars(self).items() if name in KEPT}}
