"""AdamW-style Shampoo as a torch optimizer."""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, _disable_dynamo  # type: ignore[attr-defined]

from .bucketed import BucketedOptimizer
from .copies import Flat, Inputs, attempt, flat_views, move
from .options import OPTIONS, SETTINGS, CovarianceName, ExponentsOption, GraftingName, PreconditionerName, SolverName, plain
from .roots import QR_TOLERANCE
from .step import compute_directions


class AdamWShampoo(BucketedOptimizer):
    """Shampoo with AdamW's conventions: averaged gradients and factors, decoupled decay, blocking, grafting.

    For a matrix W with gradient G and averages L of G G^T, R of G^T G, M of G: W <- W - lr P, where P = L^(-1/2) M R^(-1/2),
    rescaled to the norm of the grafting method's step. Blocks of at most block_size x block_size are preconditioned separately.
    `update` has the formulas.

    Args:
        params: tensors, named tensors (torch >= 2.6), or group dicts; all options but the last five may differ per group.
            Weights of any floating dtype, DTensors too; state is float32 (float64 for float64 weights).
        lr: learning rate, a number or a tensor of one element.
        betas: decay rates of the gradient's average (theta in the paper) and of the factors (beta); betas[1] = 1: plain sums.
        eps: added to every eigenvalue of a factor before its root; with relative_eps, eps times the factor's trace.
        weight_decay: W <- W - lr weight_decay W if decoupled_weight_decay (as in torch.optim.AdamW); otherwise weight_decay W
            is added to the gradient. Decoupled decay is added to the direction before momentum.
        cautious_decay: apply decoupled decay only to elements whose weight and direction have the same sign.
        momentum, nesterov: decay rate of an average of the directions, and whether in Nesterov's form; momentum 0: none.
        nadam: precondition betas[0] M + (1 - betas[0]) G instead of M, as NAdam does.
        maximize: take -G for G.
        bias_correction: divide averages by 1 - beta^t, where t counts a parameter's own gradients. Grafting "adam" always
            corrects its second moment.
        block_size, merge_dims: see `blocks`. Without max_factor_ratio, merging turns a matrix with at most block_size elements
            into a vector.
        max_dim: a parameter with a dimension >= max_dim has no factors; the grafting method alone updates it (Adam if that is
            "none" or "sgd").
        precondition_frequency: steps between refreshes of the roots.
        factor_frequency: update factors with a parameter's first gradient, then with every k-th, with decay rate betas[1]^k.
        start_preconditioning_step: step of the first refresh; before it the grafting method alone updates all blocks. None: the
            group's initial precondition_frequency, or 1 for "soap". With grafting "none", roots are zero before it, and only
            decay acts.
        preconditioner: "shampoo", or "soap": Adam's step in the eigenbases of the factors (see `preconditioner.Eigenbasis`),
            with the length that it has there. "soap" needs covariance "gram", a solver other than "newton", a start at step 1,
            and grafting "adam" (or "rmsprop" or "adagrad", to take their step instead of Adam's). Vectors have no factors then.
        covariance: "gram": factors are averages of G G^T and G^T G; "kl": of the gradient preconditioned on the other sides
            (see `Kronecker.update`), for exponents 1/2.
        max_factor_ratio: c, or None for no limit. A dimension of size d in a block of n elements has a factor only if
            d^2 <= c n, so that each factor and its root take at most 2 c n elements. c = 1 leaves out vectors and the long
            sides of thin matrices. "auto": 2, or None with grafting "none".
        exponents, exponent_multiplier: see `blocks.block_exponents`; None is 1/(2k) for each of a block's k factors.
            "auto": 1/2, or None with grafting "none", so that steps do not grow where gradients shrink. For "soap", it only
            matters which exponents are 0.
        grafting: one of "none", "sgd", "adagrad", "rmsprop", "adam".
        grafting_beta2: decay rate of the grafting method's second moment; None: betas[1].
        unfactored_beta2: the same for blocks without factors, such as vectors; None: as for the others.
        grafting_eps: added to the square root of the second moment.
        normalized_grafting: update the grafting method's second moment from each block's G / ||G||_F and, once there are
            roots, take its step from that instead of the averaged gradient.
        solver: "eigh", exact; "qr", updates the previous eigenvectors, at 50% more memory for matrices; "newton", matrix
            products only, for exponents 1, 1/2, 1/3, ...; "auto", "newton" on accelerators for exponents 1/2 and a relative
            eps of at least 1e-6 (for "soap", "qr"), else "eigh".
        qr_tolerance: "qr" keeps a basis Q while the off-diagonal part of Q^T A Q is at most this fraction of ||A||_F.
        stagger: spread refreshes over steps; each root is refreshed once per precondition_frequency steps.
        precondition_vectors: whether blocks of order 1 (biases, norms, merged dimensions) can have factors; else, see max_dim.
        bf16_roots: keep roots in bfloat16.
        exchange_dtype: dtype in which ranks exchange directions; None: that of the state.
        gather_mb: MB (2^20 bytes) that buffers may take in which ranks exchange gradients, weights, and directions of DTensors.
        max_skipped_steps: raise FloatingPointError on this many consecutive non-finite steps.
        process_group: the ranks that share the blocks, a ProcessGroup or a one-dimensional DeviceMesh; None: the default group
            if torch.distributed is initialized, otherwise this process alone.
        shard: if False, ranks do not share blocks: each has the entire state and computes all directions, without an exchange.
            Weights stay equal on all ranks as far as gradients do.

    Options may be changed in `param_groups` between steps, on all ranks alike. Only those that decide which state there is
    (block_size, exponents, solver, ...), or that "soap" restricts, are then checked: the next step keeps the state that fits,
    and raises ValueError if some does not.

    Raises:
        ValueError: for an invalid option, a complex or integer parameter, or no parameters; in `step`, for state that does not
            fit, and on multiple ranks at the first step for weights that differ.
        RuntimeError: in `step`, for a sparse or complex gradient, before anything changes; on multiple ranks also if, at the
            previous step, a rank failed or only some ranks had a gradient. In `state_dict`, on a rank without gathered state.
        FloatingPointError: in `step`, on the max_skipped_steps-th consecutive non-finite step.

    A step with a gradient that holds NaN or Inf, or whose squares overflow, is skipped: weights and state do not change. (On an
    accelerator the host does not wait: such a step runs with zero gradients, so that averages decay but weights stay, and the
    next step counts it.) A block whose direction is not finite takes the grafting method's step, or none without grafting.
    `events` counts both, and roots that could not be computed as usual; the logger "shampoo" names the parameters.

    Paper settings: betas=(theta, beta), grafting="none", bias_correction=False, precondition_frequency=1, exponents=(1/p, 1/q),
    relative_eps=False, block_size at least the largest dimension, and merge_dims=False, which keeps small matrices from
    becoming vectors.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        cautious_decay: bool = False,
        momentum: float = 0.0,
        nesterov: bool = False,
        nadam: bool = False,
        maximize: bool = False,
        bias_correction: bool = True,
        block_size: int = 128,
        merge_dims: bool = True,
        max_dim: int = 1_000_000,
        precondition_frequency: int = 5,
        factor_frequency: int = 1,
        start_preconditioning_step: int | None = None,
        preconditioner: PreconditionerName = "shampoo",
        covariance: CovarianceName = "gram",
        max_factor_ratio: float | Literal["auto"] | None = "auto",
        exponents: ExponentsOption = "auto",
        exponent_multiplier: float = 1.0,
        grafting: GraftingName = "adam",
        grafting_beta2: float | None = None,
        unfactored_beta2: float | None = None,
        grafting_eps: float = 1e-8,
        normalized_grafting: bool = False,
        relative_eps: bool = True,
        solver: SolverName = "auto",
        qr_tolerance: float = QR_TOLERANCE,
        stagger: bool = False,
        precondition_vectors: bool = True,
        bf16_roots: bool = False,
        exchange_dtype: torch.dtype | None = None,
        gather_mb: int = 256,
        max_skipped_steps: int = 100,
        process_group: Any = None,
        shard: bool = True,
    ):
        defaults = {name: plain(value) for name, value in locals().items() if name in OPTIONS}
        settings = {name: value for name, value in locals().items() if name in SETTINGS}
        super().__init__(params, defaults, settings, process_group)

    @property
    def events(self) -> Counter[str]:
        """Counts of skipped steps, of roots that needed a fallback, and on a CPU of directions that were not finite."""
        return self._health.events

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient. Return the loss of `closure`, called with gradients enabled, or None."""
        # 1. Loss and gradients
        loss, error = attempt(torch.enable_grad()(closure)) if closure else (None, None)
        moving = {id(group) for group in self.param_groups if any(p.grad is not None for p in group["params"])}
        if self._ranks.size > 1 or self._health.norms or self._shown.own or self._shown.changed(self.state, self.param_groups):
            self._start_step()
        inputs: list[Inputs] = []
        for bucket in self._buckets:  # with DTensors collectives, so all before what may fail on one rank alone
            found, failure = attempt(bucket.read, bucket.group["weight_decay"])
            inputs, error = [*inputs, found], error or failure

        # 2. Directions of this rank's blocks. A rank that fails still joins the exchange, so that the others do not hang.
        directions, skip = list[Flat](), error is not None
        try:
            if not skip:
                skip_on_device = self._health.check(self._buckets, inputs, self._names)
                skip = skip_on_device is None and self._health.count(self._names)
            for bucket, of_bucket in zip(self._buckets, inputs, strict=True) if not skip else ():
                moves = id(bucket.group) in moving
                kind = bucket.device.type  # `step` may be called under autocast, but products keep their dtype
                with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
                    P = compute_directions(bucket, of_bucket, skip_on_device) if moves else (bucket.zeros(), [])
                directions.append(P)
            for group in self.param_groups if not skip else ():
                group["step"] += id(group) in moving
        except Exception as failure:
            error, skip = failure, True

        # 3. Directions of all ranks, and weights. A rank that fails only here joins the next exchange, so that others hear it
        exchange, outcome = self._exchange, [skip, error is not None]
        try:
            gathered = exchange.run([P for P, _ in directions] if not skip else [], outcome) if exchange is not None else []
            for i, (bucket, of_bucket) in enumerate(zip(self._buckets, inputs, strict=True)) if not skip else ():
                if bucket.unusual:
                    self._health.report(bucket, self._names)
                views = [directions[i][1]]
                if gathered and not bucket.shards:
                    of_ranks = zip(bucket.layouts, gathered[i], strict=True)  # gathered: [bucket][rank]
                    views = [flat_views(layout, P.to(bucket.device, bucket.dtype), of_bucket.grads) for layout, P in of_ranks]
                move(bucket.params, bucket.layouts, of_bucket, views, float(bucket.group["lr"]))
        except Exception as failure:
            if error is None:
                self._join_next_exchange()
            error = error or failure
        if error is not None:
            raise error
        if not self._health.weighed:
            self._health.weigh(self._buckets)
        if self._shown.own:
            self._shown.write()
        return loss

    def _join_next_exchange(self) -> None:
        """Take part in the other ranks' next step as a rank that failed."""
        if self._exchange is not None:
            for bucket in self._buckets:
                attempt(bucket.read, bucket.group["weight_decay"])
            attempt(self._exchange.run, [], [True, True])
