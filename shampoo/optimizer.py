"""AdamW-style Shampoo as a torch optimizer."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import checkpoint
from .health import Health
from .layout import Load
from .options import (
    OPTIONS,
    check_exchange,
    check_gradients,
    check_limit,
    check_options,
    check_parameters,
    check_rank,
    describe,
    parameter_names,
    plain,
)
from .ranks import Exchange, agree, attempt, find_ranks, make_exchanges
from .state import Bucket, make_buckets
from .step import Gathered, gather, move, step_bucket

# Keys of a group that are no options: torch's, our count of steps, and what schedulers and other libraries add first.
FOREIGN_KEYS = {"params", "param_names", "step", "initial_lr", "name", "lr_scale"}
# What pickles and copies keep.
KEPT = ("_made", "_buckets", "_ranks", "_exchange_dtype", "_loads", "_exchanges", "_consolidated", "_health")


def moves(group: dict[str, Any]) -> bool:
    """Whether any of a group's parameters has a gradient."""
    return any(p.grad is not None for p in group["params"])


class AdamWShampoo(Optimizer):
    """Shampoo with AdamW's conventions: averaged gradients and factors, decoupled decay, blocking, grafting.

    For a matrix W with gradient G, L and R being averages of G G^T and G^T G and M one of G, it moves W along
    L^(-1/4) M R^(-1/4) (`update.py` has the formulas), each block of at most block_size x block_size on its own, and scaled to
    the length that the grafting method's step would have.

    Args:
        params: tensors, named tensors (torch >= 2.6) or group dicts; options but the last three may differ per group. Weights
            of any floating dtype, DTensors too; state is float32 (float64 for float64 weights).
        lr: learning rate; torch schedulers may change it.
        betas: decay of the gradient's average (theta in the paper) and of the factors' (beta); betas[1] = 1 is a plain sum.
        eps: added to every eigenvalue of a factor before its root; with relative_eps that part of the factor's trace is.
        weight_decay: W <- W - lr weight_decay W if decoupled_weight_decay (the convention of torch.optim.AdamW), else added
            to the gradient as weight_decay W. Decoupled decay enters before momentum.
        momentum, nesterov: an average of the directions with this decay; 0 is none, and then nesterov does nothing.
        nadam: look one averaging step ahead, (betas[0] M + (1 - betas[0]) G) instead of M.
        bias_correction: divide averages by 1 - beta^t, t being the group's steps with a gradient. Grafting "adam" always does.
        block_size, merge_dims: see `blocking`. Merging makes a vector of a matrix with at most block_size elements.
        max_dim: a parameter with a dimension >= max_dim gets no factors; it moves by its grafting method (by Adam where that is
            "none" or "sgd").
        precondition_frequency: steps between refreshes of the roots.
        factor_frequency: k: factors take the gradients of steps 1, k + 1, 2k + 1, ... alone, with decay betas[1]^k.
        start_preconditioning_step: step of the first refresh; before it the grafting method moves alone. None: the frequency
            that the group begins with. With grafting "none" roots are zero before it, and only decay acts.
        exponents, exponent_multiplier: see `update.block_exponents`; None is 1/(2k) for each of k dimensions.
        grafting: one of "none", "sgd", "adagrad", "rmsprop", "adam".
        grafting_beta2: decay of the grafting method's second moment; None: betas[1].
        grafting_eps: added to the square root of the second moment.
        normalized_grafting: feed the grafting method G / ||G||_F, block by block.
        solver: how roots are computed: "eigh", exact; "qr", from the last eigenvectors, which it keeps, another half of the
            matrices' memory; "newton", by products of matrices alone, for accelerators, for powers 1/1, 1/2, 1/3, ...
        qr_tolerance: of "qr": how much of a factor may lie beside the diagonal in its basis, relative to ||A||_F.
        stagger: refresh a part of the roots at every step, each once in `precondition_frequency` steps, and no step is long.
        precondition_vectors: whether blocks of order 1 (biases, norms, what is merged into a vector) have a factor, d x d, or
            move by the grafting method alone (by Adam where that is "none" or "sgd").
        bf16_roots: keep roots, whatever they are computed in, in bfloat16.
        exchange_dtype: dtype in which ranks exchange directions, torch.bfloat16 for half the bytes; None: that of the state.
        max_skipped_steps: so many steps in a row may be skipped for gradients with NaN or Inf; the last of them is an error.
        process_group: the ranks that share the blocks out, a ProcessGroup or a one-dimensional DeviceMesh; None: the default
            group where torch.distributed is initialised, else this process alone.

    Between steps lr, eps, decay, frequency and the like may be changed in `param_groups`. What decides which state there is may
    not: block_size, merge_dims, max_dim, precondition_vectors, exponents, grafting, solver, bf16_roots, and whether betas[0] or
    momentum is zero.

    Raises:
        ValueError: for an option out of range, an unknown option of a group, a complex or integer parameter, no parameters.
        RuntimeError: in `step`, for a sparse or complex gradient, before anything is changed; of several ranks also if at the
            last step a rank failed, or some had a gradient where others had none. In `state_dict`, without `consolidate()`.
        FloatingPointError: in `step`, when as many steps in a row were skipped as may be.

    A step with a gradient that holds NaN or Inf, or whose squares overflow, is skipped: weights and state stay. (On an
    accelerator, which the host does not wait for, gradients count as zero in such a step, weights stay, and the next step
    counts it.) `events` counts them, and roots that could not be computed as usual; the logger "shampoo" names the parameters.

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
        factor_frequency: int = 1,
        start_preconditioning_step: int | None = None,
        exponents: float | tuple[float, float] | None = None,
        exponent_multiplier: float = 1.0,
        grafting: str = "adam",
        grafting_beta2: float | None = None,
        grafting_eps: float = 1e-8,
        normalized_grafting: bool = False,
        relative_eps: bool = False,
        solver: str = "eigh",
        qr_tolerance: float = 0.3,
        stagger: bool = False,
        precondition_vectors: bool = True,
        bf16_roots: bool = False,
        exchange_dtype: torch.dtype | None = None,
        max_skipped_steps: int = 100,
        process_group: Any = None,
    ):
        options = {name: plain(value) for name, value in locals().items() if name in OPTIONS}
        self._buckets: list[list[Bucket]] = []  # of each group
        self._ranks, self._exchange_dtype = find_ranks(process_group), exchange_dtype
        self._loads = [Load(0.0, 0)] * self._ranks.size  # the blocks that each rank owns
        self._exchanges: list[Exchange] | None = None  # of several ranks; made at the first step
        self._consolidated: dict[int, dict[str, Tensor]] | None = None  # the state of all ranks, until the next step
        self._health = Health(max_skipped_steps)
        self._made = False
        _, error = attempt(self._make, params, options)
        own = [f"exchange_dtype {exchange_dtype}", f"max_skipped_steps {max_skipped_steps}"]
        agree(self._ranks, own + describe(vars(self).get("param_groups", [])), error)
        self._mark()
        self._made = True

    @property
    def events(self) -> Counter[str]:
        """How many steps were skipped, and how many roots were not computed as usual."""
        return self._health.events

    def _make(self, params: Any, options: dict[str, Any]) -> None:
        check_exchange(self._exchange_dtype)
        check_limit(self._health.limit)
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options that it does not name take the optimizer's. Raises ValueError as the constructor does.

        Of several ranks all must call it, with the same group.
        """
        if not self._made:  # the constructor's ranks agree on all groups at once
            self._add(param_group)
            return
        count, loads = len(self.param_groups), list(self._loads)
        _, error = attempt(self._add, param_group)
        try:
            agree(self._ranks, describe(self.param_groups), error)
        except Exception:  # this rank's or another's: no rank keeps the group
            del self.param_groups[count:], self._buckets[count:]
            self._loads = loads
            raise
        self._mark()

    def _add(self, param_group: dict[str, Any]) -> None:
        unknown = set(param_group) - set(OPTIONS) - FOREIGN_KEYS
        if unknown:
            raise ValueError(f"a parameter group has the unknown options {sorted(unknown)}; allowed are {sorted(OPTIONS)}")
        param_group = {name: plain(value) for name, value in param_group.items()}
        check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("step", 0)
        if group["start_preconditioning_step"] is None:  # fixed here, so that a later change of the frequency does not move it
            group["start_preconditioning_step"] = group["precondition_frequency"]
        check_parameters(group)
        self._buckets.append(make_buckets(group, self._ranks.rank, self._loads))
        self._exchanges = None

    def _mark(self) -> None:
        """State is in buckets; with an empty `state` torch's checkpoints would take a step first, to have one."""
        for p in self._params():
            self.state[p] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; returns the closure's loss, if there is a closure."""
        self._check_exchanges()
        self._health.count(self._names)
        self._consolidated = None

        loss, error = attempt(torch.enable_grad()(closure)) if closure is not None else (None, None)
        gathered = [gather(bucket, group["weight_decay"]) for group, bucket in self._grouped()]
        directions, error = attempt(self._directions, gathered) if error is None else (None, error)
        skipped = directions is None
        if directions is None:
            directions = [bucket.zeros() for bucket in chain(*self._buckets)]
        everyones = self._exchange(directions, [skipped, error is not None])
        if error is not None:
            raise error  # the other ranks raise at their next step
        for (group, bucket), of_ranks in zip(self._grouped(), everyones, strict=True) if not skipped else ():
            self._health.report(bucket, self._names)
            move(bucket, of_ranks, scale=-group["lr"])
        return loss

    def _directions(self, gathered: list[Gathered]) -> list[Tensor] | None:
        """The directions of this rank's blocks for each bucket, given its gradients and weights; None to skip the step."""
        for group in self.param_groups:
            check_gradients(group)
        healthy = self._health.look(chain(*self._buckets), [grads for grads, _ in gathered])
        if healthy is None and self._health.count(self._names):
            return None
        directions = [
            step_bucket(bucket, group, group["step"] + 1, found, healthy) if moves(group) else bucket.zeros()
            for (group, bucket), found in zip(self._grouped(), gathered, strict=True)
        ]
        for group in filter(moves, self.param_groups):
            group["step"] += 1
        return directions

    def _grouped(self) -> Iterator[tuple[dict[str, Any], Bucket]]:
        """Each bucket after its group."""
        return ((group, bucket) for group, buckets in zip(self.param_groups, self._buckets, strict=True) for bucket in buckets)

    def _exchange(self, directions: list[Tensor], flags: list[bool]) -> list[list[Tensor]]:
        """For each bucket the directions of all ranks, given this rank's, and whether its step was skipped, or failed."""
        if self._ranks.size == 1:
            return [[P] for P in directions]
        if self._exchanges is None:
            self._exchanges = make_exchanges(list(chain(*self._buckets)), self._names(), self._ranks, self._exchange_dtype)
        found = {place: of_ranks for exchange in self._exchanges for place, of_ranks in exchange.gather(directions, flags)}
        return [found[place] for place in range(len(directions))]

    def _check_exchanges(self) -> None:
        for exchange in self._exchanges or ():
            exchange.check()

    def _names(self) -> dict[Tensor, str]:
        """What errors call the parameters."""
        return parameter_names(self.param_groups)

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
                "all ranks after the last step, then state_dict() on the rank that it gathers to; for "
                "torch.distributed.checkpoint call consolidate(to=None) on all ranks, before loading too"
            )
        else:
            state = dict(self._consolidated)  # torch's checkpoints rename the keys of what they get
        whole = super().state_dict()
        groups = [{name: plain(value) for name, value in group.items()} for group in whole["param_groups"]]
        return {**whole, "state": state, "param_groups": groups}

    @torch.no_grad()
    def consolidate(self, to: int | None = 0) -> None:
        """Gather the state of all ranks, for `state_dict()`, to the CPU of one rank of the process group, or with None of all.

        A collective: all ranks must call it. It holds until the next step. On one rank it does nothing. Raises ValueError for
        another `to`, and if ranks differ in it, in options or in steps, RuntimeError as `step` does.
        """
        self._check_exchanges()
        _, error = attempt(check_rank, to, self._ranks.size)
        agree(self._ranks, [f"to {to}", *describe(self.param_groups)], error)
        if self._ranks.size > 1:
            shards = checkpoint.collect(self._buckets, self.param_groups, self._ranks, to)
            self._consolidated = checkpoint.pack(shards, self._params()) if shards else None

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a `state_dict()` in, options too, as torch does. Raises ValueError, leaving the optimizer as it was.

        A collective: all ranks must call it, with the same state_dict.
        """
        read, error = attempt(checkpoint.read, state_dict, self.param_groups, self._ranks)
        agree(self._ranks, describe(read[0]) if read else [], error)
        groups, buckets, loads = read
        places = iter(range(len(self._params())))
        numbered = [{**group, "params": [next(places) for _ in group["params"]]} for group in groups]
        super().load_state_dict({"state": {}, "param_groups": numbered})
        self._buckets, self._loads, self._consolidated, self._exchanges = buckets, loads, None, None
        self._health.forget()
        self._mark()

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def __getstate__(self) -> dict[str, Any]:  # torch keeps only groups and state, for pickle and deepcopy
        if self._ranks.size > 1:
            raise RuntimeError("an optimizer of several ranks cannot be pickled or copied: use consolidate() and state_dict()")
        return {**super().__getstate__(), **{name: value for name, value in vars(self).items() if name in KEPT}}
