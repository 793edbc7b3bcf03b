"""One step for a bucket of parameters, in the order of the paper: from gradients to directions."""

from torch import Tensor

from . import update
from .blocks import parameter_of
from .copies import Inputs, add, chunks, flat_views, flatten, load, presence, stack_views
from .due import due_blocks
from .options import Group
from .state import Bucket

GRAFTED_AT_A_TIME = 7 * 2**20  # elements of the grafting method's step: 28 MB, which C's allocator still reuses


def compute_directions(bucket: Bucket, inputs: Inputs, finite: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Return the directions P of this rank's blocks at the group's next step, a flat vector and its `flat_views`.

    Zero if `finite`, a bool on a device that the host does not wait for, is False: then gradients count as zero.
    """
    group, layout, grafting, V = bucket.group, bucket.layout, bucket.grafting, bucket.exp_avg_sq
    (beta1, beta2), decay, weights = group["betas"], group["weight_decay"], inputs.views[bucket.rank]
    t, start = group["step"] + 1, group["start_preconditioning_step"] or group["precondition_frequency"]
    # Gradients G, from parameters to stacks
    G, views = load(layout, inputs.grads, bucket.dtype, bucket.device)
    if not layout.stacks:  # more ranks than blocks
        return G, views
    present = presence(layout, inputs, bucket.dtype, bucket.device)
    if finite is not None:
        G.masked_fill_(~finite.to(bucket.device), 0)
    if decay and not group["decoupled_weight_decay"]:
        add(views, weights, decay)
    stacks = stack_views(layout.stacks, G)

    # Factors L and R, and their roots where due
    update_preconditioners(bucket, t, start, stacks, present)

    # Moments V and M, and the averaged gradient N in the memory of G
    normalized = flatten(list(map(update.normalize, stacks))) if group["normalized_grafting"] else G
    graft_beta2 = 1.0 if grafting.sums else beta2 if group["grafting_beta2"] is None else group["grafting_beta2"]
    if V is not None:
        update.accumulate_squares(V, normalized, graft_beta2, present)
    bc1 = update.bias_correction(beta1, t) if group["bias_correction"] else 1.0
    N = update.average(bucket.exp_avg, G, beta1, group["nadam"], bc1, present)

    # Directions P = X_L N X_R, at the length of the grafting method's step A
    bc2, eps = update.bias_correction(graft_beta2, t), group["grafting_eps"]
    if bucket.factored and (t >= start or not grafting.sets_length):
        P = N
        for part, some, lengths in chunks(layout.stacks, GRAFTED_AT_A_TIME):
            A = grafting.step(normalized[part], None if V is None else V[part], bc2, eps).split_with_sizes(lengths)
            for preconditioner, S, A_S in zip(bucket.preconditioners[some], stacks[some], A, strict=True):
                if grafting.sets_length:
                    update.rescale(preconditioner.apply(S), A_S.view_as(S), out=S)
                else:
                    S.copy_(preconditioner.apply(S))
    else:
        P = grafting.step(N, V, bc2, eps)
        views = flat_views(layout, P, inputs.grads)
    # Decoupled decay, then momentum
    if decay and group["decoupled_weight_decay"]:
        add(views, weights, decay)
    if bucket.momentum_buffer is not None:
        update.momentum(bucket.momentum_buffer, P, group["momentum"], group["nesterov"], present)
    return (P if finite is None else P.masked_fill_(~finite.to(bucket.device), 0)), views


def update_preconditioners(bucket: Bucket, t: int, start: int, stacks: list[Tensor], present: Tensor | None) -> None:
    """Update factors from the gradients (B, d1, ..., dk) of each stack, and roots from factors, where due."""
    group, layout, every = bucket.group, bucket.layout, bucket.group["factor_frequency"]
    if not bucket.factored:
        return
    if (t - 1) % every == 0:
        beta2 = group["betas"][1] ** every
        marks = [None] * len(stacks) if present is None else stack_views(layout.stacks, present)
        for preconditioner, G, mark in zip(bucket.preconditioners, stacks, marks, strict=True):
            preconditioner.update(G, beta2, None if mark is None else mark.flatten(1)[:, :1, None])
    due = due_blocks(layout.stacks, t, start, group["precondition_frequency"], group["stagger"])
    if any(due):
        bc2 = factor_correction(group, t)
        for i, (preconditioner, blocks) in enumerate(zip(bucket.preconditioners, due, strict=True)):
            rescued = preconditioner.refresh(blocks, bc2, group)
            bucket.rescued.update((parameter_of(layout, i, block), f"roots {cause}") for block, cause in rescued)


def factor_correction(group: Group, t: int) -> float:
    """Return what factors are divided by at step t: 1 - beta2^s, s being the step up to which their newest gradient counts.

    1 without bias correction.
    """
    every = group["factor_frequency"]
    return update.bias_correction(group["betas"][1], t - (t - 1) % every - 1 + every) if group["bias_correction"] else 1.0
