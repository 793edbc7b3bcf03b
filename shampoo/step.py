"""One step for a bucket of parameters, from gradients to directions, in the paper's order."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from . import update
from .copies import Flat, Inputs, add, chunks, flat_views, flatten, load, spread, stack_views
from .due import due_blocks
from .grafting import GRAFTING, Grafting
from .options import Group
from .preconditioner import Kronecker
from .state import Bucket

GRAFTING_CHUNK = 7 * 2**20  # elements per chunk on a CPU, 28 MiB in float32: glibc's malloc reuses memory up to 32 MiB
DEVICE_GRAFTING_CHUNK = 2**26  # the same on an accelerator, where each chunk takes launches

Spread = Callable[[Sequence[float]], Tensor]  # value per parameter -> flat vector
Method = tuple[Grafting, float, float | Tensor]  # grafting, its beta2, and 1 - beta2^t


def compute_directions(bucket: Bucket, inputs: Inputs, skip: Tensor | None) -> Flat:
    """Update the state of this rank's blocks by one step; return their directions P, a flat vector, and its `flat_views`.

    `skip` is a scalar bool tensor on a device, or None for False: if True, gradients are taken as zero, and so is P.
    """
    group, layout, V = bucket.group, bucket.layout, bucket.exp_avg_sq
    t, start = group["step"] + 1, group["start_preconditioning_step"] or group["precondition_frequency"]
    counts = [steps + 1 if G is not None else 0 for steps, G in zip(bucket.steps, inputs.grads, strict=True)]
    bucket.steps = [count or steps for count, steps in zip(counts, bucket.steps, strict=True)]
    # Gradients G, copied from parameters to stacks
    G, views = load_gradients(bucket, inputs, skip)
    if not layout.stacks:  # more ranks than blocks
        return G, views
    stacks, of_params = stack_views(layout.stacks, G), partial(spread, layout, dtype=bucket.dtype, device=bucket.device)
    present = of_params([float(count > 0) for count in counts]) if 0 in counts else None

    # Factors L and R, and the roots that are due
    if bucket.factored:
        update_factors(bucket, counts, stacks, of_params)
        refresh_roots(bucket, t, start, of_params)

    # Moments V and M, and the averaged gradient N, which overwrites G, and so `grafted` if that is G
    scaled = flatten(list(map(update.normalize, stacks))) if group["normalized_grafting"] else G
    grafted = rotate(bucket.preconditioners, stacks) if bucket.rotates else scaled
    methods = {factored: grafting_method(group, factored, counts, of_params) for factored in set(bucket.has_factors)}
    parts = chunks(layout.stacks, bucket.has_factors, GRAFTING_CHUNK if skip is None else DEVICE_GRAFTING_CHUNK)
    for part, _, _, factored in parts if V is not None else ():
        update.accumulate_squares(update.at(V, part), grafted[part], methods[factored][1], update.at(present, part))
    bc1 = update.bias_corrections(group["betas"][0], counts, of_params) if group["bias_correction"] else 1.0
    N = update.average(bucket.exp_avg, G, group["betas"][0], group["nadam"], bc1, present)

    # Directions P = X_L N X_R, rescaled to the norm of the grafting method's step A, overwrite N
    for part, some, lengths, factored in parts:
        method, _, bc2 = methods[factored]
        step = partial(method.step, V=update.at(V, part), bc2=update.at(bc2, part), eps=group["grafting_eps"])
        if not factored or (t < start and method.sets_length):
            N[part].copy_(step(N[part]))
            continue
        A = step(rotate(bucket.preconditioners[some], stacks[some]) if bucket.rotates else grafted[part])
        steps = list(map(Tensor.view_as, A.split_with_sizes(lengths), stacks[some]))
        sets_length = method.sets_length and not bucket.rotates
        triples = zip(bucket.preconditioners[some], stacks[some], steps, strict=True)
        if skip is not None:  # the host does not wait for the device
            update.graft_all([own.direction(S, A_S) for own, S, A_S in triples], steps, sets_length, out=stacks[some])
            continue
        for i, (own, S, A_S) in enumerate(triples, some.start):
            if bad := update.graft(own.direction(S, A_S), A_S, sets_length, out=S):
                bucket.unusual.update((layout.params[i][block], "directions not finite") for block in bad)

    # Decoupled decay, then momentum
    if group["weight_decay"] and group["decoupled_weight_decay"]:
        (update.cautious_decay if group["cautious_decay"] else add)(views, inputs.views[bucket.rank], group["weight_decay"])
    if bucket.momentum_buffer is not None:
        update.momentum(bucket.momentum_buffer, N, group["momentum"], group["nesterov"], present)
    return (N if skip is None else N.masked_fill_(skip.to(bucket.device), 0)), views


def grafting_method(group: Group, factored: bool, counts: Sequence[int], of_params: Spread) -> Method:
    """Return the grafting method of the group's blocks with factors, or of those without, its beta2, and 1 - beta2^t.

    That of blocks without factors must scale by V.
    """
    chosen = GRAFTING[group["grafting"]]
    grafting = chosen if factored or chosen.second_moment else GRAFTING["adam"]
    own = group["grafting_beta2"] if factored or group["unfactored_beta2"] is None else group["unfactored_beta2"]
    beta2 = 1.0 if grafting.sums else group["betas"][1] if own is None else own
    return grafting, beta2, update.bias_corrections(beta2, counts, of_params)


def rotate(preconditioners: Sequence[Kronecker], stacks: Sequence[Tensor]) -> Tensor:
    """Return each preconditioner's `rotate` of its stack, in a new flat vector."""
    return flatten([preconditioner.rotate(S) for preconditioner, S in zip(preconditioners, stacks, strict=True)])


def load_gradients(bucket: Bucket, inputs: Inputs, skip: Tensor | None) -> Flat:
    """Return a bucket's gradients G, negated if maximize, plus coupled decay: a flat vector, and its `flat_views`."""
    layout, found, G = bucket.layout, inputs.grads, inputs.flat
    G, views = load(layout, found, bucket.dtype, bucket.device) if G is None else (G, flat_views(layout, G, found))
    if bucket.group["maximize"]:
        G.neg_()
    if skip is not None:
        G.masked_fill_(skip.to(bucket.device), 0)
    if bucket.group["weight_decay"] and not bucket.group["decoupled_weight_decay"]:
        add(views, inputs.views[bucket.rank], bucket.group["weight_decay"])
    return G, views


def update_factors(bucket: Bucket, counts: Sequence[int], stacks: Sequence[Tensor], of_params: Spread) -> None:
    """Update the factors from the gradients (B, d1, ..., dk) of each stack.

    `counts` has each parameter's number of gradients so far, or 0 if it has none at this step. Factors take a parameter's first
    gradient and then every `factor_frequency`-th.
    """
    every = bucket.group["factor_frequency"]
    taken = [float(count % every == 1 % every and count > 0) for count in counts]
    if not any(taken):
        return
    marks = [None] * len(stacks) if all(taken) else stack_views(bucket.layout.stacks, of_params(taken))
    for preconditioner, G, mark in zip(bucket.preconditioners, stacks, marks, strict=True):
        mark = None if mark is None else mark.flatten(1)[:, :1, None]
        preconditioner.update(G, bucket.group["betas"][1] ** every, mark)


def refresh_roots(bucket: Bucket, t: int, start: int, of_params: Spread) -> None:
    """Refresh the roots that are due at the group's step t and, from step `start` on, those of blocks without roots.

    Blocks whose parameter has had no gradient yet are left out, since their factors are zero.
    """
    group, layout, every = bucket.group, bucket.layout, bucket.group["factor_frequency"]
    due = due_blocks(layout.stacks, t, start, group["precondition_frequency"], group["stagger"])
    found: dict[int, Sequence[int]] = {}
    for i, preconditioner in enumerate(bucket.preconditioners):
        blocks = due[i] if due else ()
        if preconditioner.rootless:
            late = preconditioner.rootless if t >= start else ()
            started = [b for b in sorted({*blocks, *late}) if bucket.steps[layout.params[i][b]]]
            blocks = started if len(started) < layout.stacks[i][0] else range(len(started))
        if blocks:
            found[i] = blocks
    if not found:
        return
    counted = [update.factor_steps(steps, every) for steps in bucket.steps]
    bc2 = update.bias_corrections(group["betas"][1], counted, of_params) if group["bias_correction"] else 1.0
    V = stack_views(layout.stacks, bucket.exp_avg_sq) if bucket.exp_avg_sq is not None else [None] * len(layout.stacks)
    for i, blocks in found.items():
        own = stack_views(layout.stacks, bc2)[i].flatten(1)[:, :1] if isinstance(bc2, Tensor) else bc2
        for block, cause in bucket.preconditioners[i].refresh(blocks, own, group, V[i]):
            bucket.unusual[layout.params[i][block], f"roots {cause}"] += 1
