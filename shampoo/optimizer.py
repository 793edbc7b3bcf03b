"""AdamW-style Shampoo as a torch optimizer."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import checkpoint, update
from .grafting import GRAFTING, second_moment_decay
from .layout import apply, flatten, load, stack_views
from .options import OPTIONS, check_gradients, check_options, check_parameters, parameter_name
from .ranks import Exchange, add_part, agree, find_ranks, is_sharded, whole
from .state import Bucket, make_buckets

# Keys of a group that are no options: torch's, our count of steps, and what schedulers and other libraries add first.
FOREIGN_KEYS = {"params", "param_names", "step", "initial_lr", "name", "lr_scale"}


KEPT = ("_buckets", "_ranks", "_exchange_dtype", "_load", "_exchanges", "_consolidated", "_complete")  # in pickles and copies


class AdamWShampoo(Optimizer):
    """Shampoo with AdamW's conventions: averaged gradients and factors, decoupled decay, blocking, grafting.

    For a matrix W with gradient G, L and R being averages of G G^T and G^T G and M one of G, it moves W along
    L^(-1/4) M R^(-1/4) (`update.py` has the formulas), each block of at most block_size x block_size on its own, and scaled to
    the length that the grafting method's step would have.

    Args:
        params: tensors, named tensors (torch >= 2.6) or group dicts; every option below may differ per group. Weights of any
            floating dtype; state is float32 (float64 for float64 weights).
        lr: learning rate; torch schedulers may change it.
        betas: decay of the gradient's average (theta in the paper) and of the factors' (beta); betas[1] = 1 is a plain sum.
        eps: added to every eigenvalue of a factor before its root.
        weight_decay: W <- W - lr weight_decay W if decoupled_weight_decay (the convention of torch.optim.AdamW), else added
            to the gradient as weight_decay W. Decoupled decay enters before momentum.
        momentum, nesterov: an average of the directions with this decay; 0 is none, and then nesterov does nothing.
        nadam: look one averaging step ahead, (betas[0] M + (1 - betas[0]) G) instead of M.
        bias_correction: divide averages by 1 - beta^t, t being the group's steps with a gradient. Grafting "adam" always does.
        block_size, merge_dims: see `blocking`. Merging makes a vector of a matrix with at most block_size elements.
        max_dim: a parameter with a dimension >= max_dim gets no factors; it moves by its grafting method (by Adam where that is
            "none" or "sgd").
        precondition_frequency: steps between refreshes of the roots.
        start_preconditioning_step: step of the first refresh; before it the grafting method moves alone. None: the frequency
            that the group begins with. With grafting "none" roots are zero before it, and only decay acts.
        exponents, exponent_multiplier: see `update.block_exponents`; None is 1/(2k) for each of k dimensions.
        grafting: one of "none", "sgd", "adagrad", "rmsprop", "adam".
        grafting_beta2: decay of the grafting method's second moment; None: betas[1].
        grafting_eps: added to the square root of the second moment.
        normalized_grafting: feed the grafting method G / ||G||_F, block by block.
        solver: how roots are computed, one of `roots.SOLVERS`.

    Between steps lr, eps, decay, frequency and the like may be changed in `param_groups`. What decides which state there is may
    not: block_size, merge_dims, max_dim, exponents, grafting, and whether betas[0] or momentum is zero.

    Raises:
        ValueError: for an option out of range, an unknown option of a group, a complex or integer parameter, no parameters.
        RuntimeError: in `step`, for a sparse or complex gradient; before anything is changed.
        FloatingPointError: in `step`, when roots are due and a factor holds NaN or Inf.

    Paper settings: betas=(theta, beta), grafting="none", bias_correction=False, precondition_frequency=1, exponents=(1/p, 1/q),
    block_size at least the largest dimension, and merge_dims=False, lest a small matrix be merged into a vector.
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
        start_preconditioning_step: int | None = None,
        exponents: float | tuple[float, float] | None = None,
        exponent_multiplier: float = 1.0,
        grafting: str = "adam",
        grafting_beta2: float | None = None,
        grafting_eps: float = 1e-8,
        normalized_grafting: bool = False,
        solver: str = "eigh",
        exchange_dtype: torch.dtype | None = None,
        process_group: Any = None,
    ):
        options = {name: value for name, value in locals().items() if name in OPTIONS}
        self._buckets: list[list[Bucket]] = []  # of each group
        self._ranks, self._exchange_dtype = find_ranks(process_group), exchange_dtype
        self._load = [0.0] * self._ranks.size  # the cost of the blocks that each rank owns
        self._exchanges: list[tuple[list[int], Exchange]] = []  # with the places of its buckets among all buckets
        self._consolidated: dict[int, dict[str, Tensor]] | None = None  # the state of all ranks, until the next step
        self._complete = False
        error = None
        try:
            super().__init__(params, options)
        except Exception as raised:
            error = raised
        self._complete = True
        self._settle(error)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options that it does not name take the optimizer's. Raises ValueError as the constructor does.

        Of several ranks all must call it, with the same group.
        """
        if not self._complete:  # the constructor lets the ranks agree once, on all groups
            return self._add(param_group)
        error = None
        try:
            self._add(param_group)
        except Exception as raised:
            error = raised
        return self._settle(error)

    def _add(self, param_group: dict[str, Any]) -> None:
        unknown = set(param_group) - set(OPTIONS) - FOREIGN_KEYS
        if unknown:
            raise ValueError(f"a parameter group has the unknown options {sorted(unknown)}; allowed are {sorted(OPTIONS)}")
        check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("step", 0)
        if group["start_preconditioning_step"] is None:  # fixed here, so that a later change of the frequency does not move it
            group["start_preconditioning_step"] = group["precondition_frequency"]
        try:
            check_parameters(group)
            self._buckets.append(make_buckets(group, self._ranks.rank, self._load))
        except BaseException:
            self.param_groups.pop()
            raise

    def _settle(self, error: Exception | None) -> None:
        """Let the ranks agree on parameters and options, and make the buffers of their exchange. Raises on all or none."""
        lines = [f"exchange_dtype {self._exchange_dtype}"]
        for i, group in enumerate(self.param_groups if error is None else ()):
            lines += [f"group {i} with {name} {group[name]!r}" for name in OPTIONS]
            lines += [f"{parameter_name(group, j)} and {p.dtype} in group {i}" for j, p in enumerate(group["params"])]
        agree(self._ranks, lines, error)
        self._make_exchanges()

    def _make_exchanges(self) -> None:
        for p in self._params():
            self.state[p] = {}  # what is kept is in buckets; an empty `state` would make torch's checkpoints take a step first
        if self._ranks.size == 1:
            return
        names = {p: parameter_name(group, i) for group in self.param_groups for i, p in enumerate(group["params"])}
        buckets = list(chain(*self._buckets))
        kinds = dict.fromkeys((bucket.device, bucket.dtype) for bucket in buckets)
        self._exchanges = []
        for device, dtype in kinds:
            places = [i for i, bucket in enumerate(buckets) if (bucket.device, bucket.dtype) == (device, dtype)]
            lengths = [[buckets[i].layouts[r].numel for i in places] for r in range(self._ranks.size)]
            flags = [names[p] for i in places for p in buckets[i].params]
            self._exchanges.append((places, Exchange(self._ranks, lengths, flags, device, self._exchange_dtype or dtype)))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            check_gradients(group)
        for _, exchange in self._exchanges:
            exchange.check()
        self._consolidated = None

        directions: list[Tensor] = []
        for group, buckets in zip(self.param_groups, self._buckets, strict=True):
            moves = any(p.grad is not None for p in group["params"])
            group["step"] += moves
            directions += [step_bucket(bucket, group, group["step"]) if moves else bucket.zeros() for bucket in buckets]
        everyones = iter(self._exchange(directions))
        for group, buckets in zip(self.param_groups, self._buckets, strict=True):
            for bucket in buckets:
                move(bucket, next(everyones), scale=-group["lr"])
        return loss

    def _exchange(self, directions: list[Tensor]) -> list[list[Tensor]]:
        """For each bucket the directions of all ranks, given this rank's."""
        everyones = [[P] for P in directions]
        buckets = list(chain(*self._buckets))
        for places, exchange in self._exchanges:
            present = [p.grad is not None for i in places for p in buckets[i].params]
            for i, of_ranks in zip(places, exchange.gather([directions[i] for i in places], present), strict=True):
                everyones[i] = of_ranks
        return everyones

    def state_dict(self) -> dict[str, Any]:
        """As torch's optimizers': options, and state per parameter; deepcopy it to keep it. `checkpoint` lists its keys.

        With several ranks the state of all is that which `consolidate()` gathered, on the CPU. Raises RuntimeError on a rank
        without it.
        """
        if self._ranks.size == 1:
            state = checkpoint.pack([[bucket] for bucket in chain(*self._buckets)], self._params())
        elif self._consolidated is None:
            raise RuntimeError(
                f"rank {self._ranks.rank} of {self._ranks.size} holds only its own part of the state: call consolidate() on "
                "all ranks after the last step, then state_dict() on the rank that it gathers to"
            )
        else:
            state = self._consolidated
        return {**super().state_dict(), "state": state}

    @torch.no_grad()
    def consolidate(self, to: int | None = 0) -> None:
        """Gather the state of all ranks, for `state_dict()`, to the CPU of one rank of the process group, or with None of all.

        A collective: all ranks must call it. It holds until the next step. On one rank it does nothing.
        """
        for _, exchange in self._exchanges:
            exchange.check()
        if self._ranks.size > 1:
            shards = checkpoint.collect(self._buckets, self.param_groups, self._ranks, to)
            self._consolidated = checkpoint.pack(shards, self._params()) if shards else None

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a `state_dict()` in, options too, as torch does. Raises ValueError, leaving the optimizer as it was."""
        error = None
        try:
            groups, saved = checkpoint.match_groups(state_dict, self.param_groups)
            for group in groups:
                check_options(group)
            load = [0.0] * self._ranks.size
            buckets = [make_buckets(group, self._ranks.rank, load) for group in groups]
            checkpoint.unpack(buckets, saved)
        except Exception as raised:
            error = raised
        agree(self._ranks, [], error)
        places = iter(range(len(saved)))
        numbered = [{**group, "params": [next(places) for _ in group["params"]]} for group in groups]
        super().load_state_dict({"state": {}, "param_groups": numbered})
        self._buckets, self._load, self._consolidated = buckets, load, None
        self._make_exchanges()

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def __getstate__(self) -> dict[str, Any]:  # torch keeps only groups and state, for pickle and deepcopy
        return {**super().__getstate__(), **{name: value for name, value in vars(self).items() if name in KEPT}}


def step_bucket(bucket: Bucket, group: dict[str, Any], t: int) -> Tensor:
    """Step t = 1, 2, ... of the algorithm for a bucket: the directions of the blocks that this rank owns, a flat vector."""
    plan, decay, decoupled = bucket.layout, group["weight_decay"], group["decoupled_weight_decay"]
    place = (bucket.dtype, bucket.device)

    # 1. Gradients, and weights where decay needs them, from parameters to stacks.
    moving = bucket.moving()
    G = load(plan, [whole(p.grad) for p in bucket.params], *place)
    W = load(plan, list(map(whole, moving)), *place) if decay else None
    missing = any(p is None for p in moving)
    present = (
        load(plan, [None if p is None else torch.ones(p.shape, device=p.device) for p in moving], *place) if missing else None
    )
    if not plan.stacks:  # more ranks than blocks
        return G
    if W is not None and not decoupled:
        G.add_(W, alpha=decay)

    # 2. Factors, roots and moments give the direction.
    update_preconditioner(bucket, group, t, G, present)
    P = direction(bucket, group, t, G, present)
    if W is not None and decoupled:
        P = P.add(W, alpha=decay)
    if bucket.momentum_buffer is not None:
        P = update.momentum(bucket.momentum_buffer, P, group["momentum"], group["nesterov"], present)
    return P


def move(bucket: Bucket, directions: list[Tensor], scale: float) -> None:
    """W <- W + scale P for the bucket's parameters that have a gradient, P being the directions of all ranks."""
    moving = bucket.moving()
    updates = [
        torch.zeros(p.shape, dtype=bucket.dtype, device=p.device) if p is not None and is_sharded(p) else p for p in moving
    ]
    apply(bucket.layouts, updates, directions, scale)
    for p, whole_update in zip(moving, updates, strict=True):
        if p is not None and whole_update is not None and whole_update is not p:
            add_part(p, whole_update)


def update_preconditioner(bucket: Bucket, group: dict[str, Any], t: int, G: Tensor, present: Tensor | None) -> None:
    """Factors from the gradients G; roots from the factors, at step `start` and at later multiples of the frequency."""
    plan, beta2 = bucket.layout, group["betas"][1]
    start, frequency = group["start_preconditioning_step"], group["precondition_frequency"]
    blocks = [None] * len(plan.stacks) if present is None else [S.flatten(1)[:, :1, None] for S in stack_views(plan, present)]
    for factors, stack, here in zip(bucket.factors, stack_views(plan, G), blocks, strict=True):
        update.update_factors(factors, stack, beta2, here)
    if t == start or (t > start and t % frequency == 0):
        bc2 = update.bias_correction(beta2, t) if group["bias_correction"] else 1.0
        for inv_roots, factors, exponents in zip(bucket.inv_roots, bucket.factors, bucket.exponents, strict=True):
            update.refresh_roots(inv_roots, factors, exponents, bc2, group["eps"], group["solver"])


def direction(bucket: Bucket, group: dict[str, Any], t: int, G: Tensor, present: Tensor | None) -> Tensor:
    """The flat direction P: the averaged gradient, preconditioned, at the length of the grafting method's step."""
    plan, method = bucket.layout, bucket.grafting
    beta1, beta2 = group["betas"]
    graft_G = flatten(map(update.normalize, stack_views(plan, G))) if group["normalized_grafting"] else G
    graft_beta2 = beta2 if group["grafting_beta2"] is None else group["grafting_beta2"]
    V, graft_bc2 = bucket.exp_avg_sq, update.bias_correction(graft_beta2, t)
    if V is not None:
        update.accumulate(V, graft_G * graft_G, second_moment_decay(method, graft_beta2), present)

    def graft(N: Tensor) -> Tensor:
        return GRAFTING[method](N, V, graft_bc2, group["grafting_eps"])

    bc1 = update.bias_correction(beta1, t) if group["bias_correction"] else 1.0
    N = update.average(bucket.exp_avg, G, beta1, group["nadam"], bc1, present)
    if not bucket.factored or (t < group["start_preconditioning_step"] and method != "none"):
        return graft(N)
    P = [update.precondition(stack, roots) for stack, roots in zip(stack_views(plan, N), bucket.inv_roots, strict=True)]
    if method != "none":
        lengths = stack_views(plan, graft(graft_G if group["normalized_grafting"] else N))
        P = list(map(update.rescale, P, lengths))
    return flatten(P)
