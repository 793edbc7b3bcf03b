"""A step of the algorithm for one bucket: from gradients to directions, from the directions of all ranks to weights."""

from collections.abc import Sequence
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from . import update
from .grafting import GRAFTING, second_moment_decay
from .layout import Load, add, apply, deal, few_stacks, flatten, load, owner, stack_views
from .ranks import add_part, is_sharded, whole
from .state import Bucket

GRAFTED_AT_A_TIME = 7 * 2**20  # numbers of the grafting method's step: 28 MB, which C's allocator still reuses

Gathered = tuple[list[Tensor | None], list[Tensor | None]]


def gather(bucket: Bucket, decay: float) -> Gathered:
    """The whole gradients of a bucket, and the whole weights where decay needs them; None without a gradient.

    A collective for each DTensor, also for one that has a gradient on other ranks only. It comes for all buckets before what
    may fail on one rank alone: none shall wait for that one.
    """
    grads = [whole(torch.zeros_like(p) if p.grad is None and is_sharded(p) else p.grad) for p in bucket.params]
    weights = [whole(p) if decay else None for p in bucket.params]
    return grads, [W if p.grad is not None else None for p, W in zip(bucket.params, weights, strict=True)]


def step_bucket(bucket: Bucket, group: dict[str, Any], t: int, gathered: Gathered, healthy: Tensor | None = None) -> Tensor:
    """Step t = 1, 2, ... of the algorithm for a bucket: the directions of the blocks that this rank owns, a flat vector.

    Where `healthy`, a bool on a device that the host does not wait for, is false, gradients and directions are zero.
    """
    plan, decay, decoupled = bucket.layout, group["weight_decay"], group["decoupled_weight_decay"]
    place = (bucket.dtype, bucket.device)
    grads, weights = gathered

    # 1. From parameters to stacks.
    G = load(plan, grads, *place)
    present = bucket.presence()
    if healthy is not None:
        G.masked_fill_(~healthy.to(bucket.device), 0)
    if not plan.stacks:  # more ranks than blocks
        return G
    if decay and not decoupled:
        add(plan, G, weights, decay)

    # 2. Factors, roots and moments give the direction.
    update_preconditioner(bucket, group, t, G, present)
    P = direction(bucket, group, t, G, present)
    if decay and decoupled:
        add(plan, P, weights, decay)
    if bucket.momentum_buffer is not None:
        P = update.momentum(bucket.momentum_buffer, P, group["momentum"], group["nesterov"], present)
    return P if healthy is None else P.masked_fill(~healthy.to(bucket.device), 0)


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
    """Factors from the gradients G, and roots from the factors, where due."""
    plan, beta2, every = bucket.layout, group["betas"][1], group["factor_frequency"]
    start, frequency = group["start_preconditioning_step"], group["precondition_frequency"]
    since = (t - 1) % every
    if since == 0:
        stacks = stack_views(plan, G)
        marks = [None] * len(stacks) if present is None else [S.flatten(1)[:, :1, None] for S in stack_views(plan, present)]
        for factors, stack, here in zip(bucket.factors, stacks, marks, strict=True):
            update.update_factors(factors, stack, beta2**every, here)
    due = due_blocks(tuple(plan.stacks), t, start, frequency, group["stagger"])
    if any(due):
        bc2 = factor_correction(group, t)
        options = {name: group[name] for name in ("eps", "relative_eps", "solver", "qr_tolerance")}
        for i, blocks in enumerate(due):
            matrices = bucket.inv_roots[i], bucket.factors[i], bucket.eigvecs[i]
            rescued = update.refresh_roots(*matrices, bucket.exponents[i], bc2, blocks, **options)
            bucket.rescued.update((owner(plan, i, block), f"roots {cause}") for block, cause in rescued)


def factor_correction(group: dict[str, Any], t: int) -> float:
    """What factors are divided by at step t: 1 - beta2^s, s being the step up to which their newest gradient counts; 1 without
    bias correction.
    """
    every = group["factor_frequency"]
    return update.bias_correction(group["betas"][1], t - (t - 1) % every - 1 + every) if group["bias_correction"] else 1.0


def due_blocks(
    stacks: tuple[tuple[int, ...], ...], t: int, start: int, frequency: int, stagger: bool
) -> Sequence[Sequence[int]]:
    """The blocks of each stack (B, d1, ..., dk) whose roots are refreshed at step t: all at `start` and later multiples of the
    frequency; staggered, each at its own step modulo the frequency, from start - frequency + 1 on, so that at `start` all have
    had theirs (if that is too early for some, they have it at `start`).
    """
    everything = [range(blocks) for blocks, *_ in stacks]
    if not stagger:
        return everything if t == start or (t > start and t % frequency == 0) else []
    first = max(1, start - frequency + 1)
    if t < first:
        return []
    late = [] if t != start else [step % frequency for step in range(start + 1, first + frequency)]
    return [
        [b for b in blocks if turn[b] == t % frequency or turn[b] in late]
        for blocks, turn in zip(everything, turns(stacks, frequency), strict=True)
    ]


@cache
def turns(stacks: tuple[tuple[int, ...], ...], frequency: int) -> list[list[int]]:
    """For each block of each stack (B, d1, ..., dk) the step modulo the frequency at which its roots are due, such that all
    steps have alike to do, d^3 for each root.
    """
    items = [Load(float(sum(d**3 for d in block)), 0) for blocks, *block in stacks for _ in range(blocks)]
    dealt = iter(deal(items, [Load(0.0, 0)] * frequency, most=0.0)[0])
    return [list(islice(dealt, blocks)) for blocks, *_ in stacks]


def direction(bucket: Bucket, group: dict[str, Any], t: int, G: Tensor, present: Tensor | None) -> Tensor:
    """The flat direction P: the averaged gradient, preconditioned, at the length of the grafting method's step.

    It may take the place of G.
    """
    plan, method = bucket.layout, bucket.grafting
    beta1, beta2 = group["betas"]
    normalized = flatten(map(update.normalize, stack_views(plan, G))) if group["normalized_grafting"] else None
    graft_beta2 = beta2 if group["grafting_beta2"] is None else group["grafting_beta2"]
    V, graft_bc2 = bucket.exp_avg_sq, update.bias_correction(graft_beta2, t)
    if V is not None:
        update.accumulate_squares(V, G if normalized is None else normalized, second_moment_decay(method, graft_beta2), present)

    def graft(N: Tensor, part: slice = slice(None)) -> Tensor:
        """The grafting method's step, or a part of it."""
        return GRAFTING[method](N[part], V if V is None else V[part], graft_bc2, group["grafting_eps"])

    bc1 = update.bias_correction(beta1, t) if group["bias_correction"] else 1.0
    N = update.average(bucket.exp_avg, G, beta1, group["nadam"], bc1, present)
    if not bucket.factored or (t < group["start_preconditioning_step"] and method != "none"):
        return graft(N)
    each_roots = iter(bucket.inv_roots)
    for part, few in few_stacks(plan, GRAFTED_AT_A_TIME):
        A = graft(N if normalized is None else normalized, part)
        for stack, length in zip(stack_views(few, N[part]), stack_views(few, A), strict=True):
            P = update.precondition(stack, next(each_roots))
            if method == "none":
                stack.copy_(P)
            else:
                update.rescale(P, length, out=stack)
    return N
