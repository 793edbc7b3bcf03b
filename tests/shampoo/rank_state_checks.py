"""The functions of (rank, size) that `test_rank_state` runs on every rank."""

import copy
import pickle
import warnings
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
from rank_models import (
    COMMON,
    SHAPES,
    build,
    first_error,
    full_weights,
    gradients,
    groups_of,
    layers,
    parameters,
    random_gradients,
    train,
)

from shampoo import AdamWShampoo


def checkpointed(rank, size, path, first, last, dtype=torch.float32, **options):
    """Train from the checkpoint of step `first` (0: none) to step `last`, and save. Return weights and learning rates."""
    model = build(dtype=dtype)
    options = {**COMMON, "start_preconditioning_step": 10, "precondition_frequency": 5, **options}
    optimizer = AdamWShampoo(groups_of(model), **options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    if first:
        saved = torch.load(f"{path}/{first}", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
    train(model, optimizer, range(first, last), scheduler)
    optimizer.consolidate_state_dict()
    if rank == 0:
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        torch.save(saved, f"{path}/{last}")
    if size > 1:
        dist.barrier()
    return full_weights(model), scheduler.get_last_lr()


def state_dicts(rank, size):
    """Return state_dict() of all ranks after one step, and after two, each without and with `consolidate_state_dict`."""
    model, found = build(), []
    optimizer = AdamWShampoo(model.parameters(), **COMMON)
    for t in range(2):
        train(model, optimizer, [t])
        found.append(copy.deepcopy(optimizer.state_dict()))
        optimizer.consolidate_state_dict(to=None)
        found.append(copy.deepcopy(optimizer.state_dict()))
    return found


def error_of(call):
    """Return the text of the error that a call raises, or None."""
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return None


def state_dict_on_rank_0_alone(rank, size):
    """Return the error of state_dict() on rank 0 alone, and that on all ranks then, after gathering there, and a step later."""
    model, found = build(), []
    optimizer = AdamWShampoo(model.parameters(), **COMMON)
    train(model, optimizer, [0])
    if rank == 0:
        with mock.patch("shampoo.ranks.PATIENCE", timedelta(seconds=1)):
            found.append(error_of(optimizer.state_dict))
    dist.barrier()
    found.append(error_of(optimizer.state_dict))
    train(model, optimizer, [1])
    optimizer.consolidate_state_dict()
    found.append(error_of(optimizer.state_dict))
    train(model, optimizer, [2])
    found.append(error_of(optimizer.state_dict))
    return found


def distributed_checkpoint(rank, size, path, first, last):
    """Do what `checkpointed` does with torch.distributed.checkpoint, whose state dicts are keyed by parameter name."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = build()
    optimizer = AdamWShampoo(groups_of(model), **{**COMMON, "start_preconditioning_step": 10, "precondition_frequency": 5})
    if first:
        optimizer.consolidate_state_dict(to=None)
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=f"{path}/{first}")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    train(model, optimizer, range(first, last))
    optimizer.consolidate_state_dict(to=None)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{path}/{last}")
    return full_weights(model)


def refused_group(rank, size):
    """Add a group with different options per rank.

    Return the error, the numbers of groups and of parameters with state that remain, and whether the next step moves weights.
    """
    p, q = (torch.zeros(3, 4, requires_grad=True) for _ in range(2))
    optimizer = AdamWShampoo([p], **COMMON)
    try:
        optimizer.add_param_group({"params": [q], "eps": 1e-3 if rank else 1e-4})
    except ValueError as error:
        p.grad = torch.ones(3, 4)
        optimizer.step()
        return str(error), len(optimizer.param_groups), len(optimizer.state), p.abs().sum().item() > 0
    return None


def checkpoint_with_a_frozen_parameter(rank, size, path, first, last, flat):
    """Do what `distributed_checkpoint` does with a frozen embedding, without gathering first; if `flat`, as torchtitan does."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as sd

    model = build()
    model.embedding.weight.requires_grad_(False)
    optimizer = AdamWShampoo(groups_of(model), **{**COMMON, "start_preconditioning_step": 10, "precondition_frequency": 5})
    options = sd.StateDictOptions(flatten_optimizer_state_dict=flat)

    def gather():
        found = sd.get_optimizer_state_dict(model, optimizer, options=options)
        return {"model": sd.get_model_state_dict(model), "optimizer": found}

    if first:
        found = gather()
        dcp.load(found, checkpoint_id=f"{path}/{first}")
        sd.set_model_state_dict(model, found["model"])
        sd.set_optimizer_state_dict(model, optimizer, found["optimizer"], options=options)
    train(model, optimizer, range(first, last))
    dcp.save(gather(), checkpoint_id=f"{path}/{last}")
    return full_weights(model)


def changed_groups(rank, size, sharded=False):
    """Replace, append, remove and regroup parameters between steps, under FSDP2 if `sharded`. Return all weights."""
    spare, model = layers((24, 10, 7)), layers((24, 40, 7))
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        for each in (spare, model):
            fully_shard(each, mesh=init_device_mesh("cpu", (size,)))
    optimizer = AdamWShampoo(
        [{"params": [p], "lr": 1e-3 * (i + 1)} for i, p in enumerate(model.parameters())],
        **{**COMMON, "start_preconditioning_step": 4, "precondition_frequency": 3},
    )

    def both(steps):
        for t in steps:
            gradients(model, t)
            gradients(spare, t)
            optimizer.step()

    both(range(6))
    groups = optimizer.param_groups
    groups[0]["params"][0] = spare[0].weight
    groups[1]["params"] += [spare[2].weight, spare[2].bias]
    both(range(6, 9))
    groups.pop(2)
    groups.reverse()
    both(range(9, 12))
    groups[0]["params"].append(model[0].weight)
    both(range(12, 18))
    return full_weights(model) + full_weights(spare)


def changed_state(rank, size):
    """Edit, delete and add state that is gathered on all ranks. Return the weights and what became of a foreign key."""
    model = build()
    params = list(model.parameters())
    optimizer = AdamWShampoo(params, **{**COMMON, "start_preconditioning_step": 4, "precondition_frequency": 3})
    for change in range(4):
        train(model, optimizer, range(5 * change, 5 * change + 5))
        if size > 1:
            optimizer.consolidate_state_dict(to=None)
        if change == 0:
            for p in params:
                optimizer.state[p]["z"] = torch.ones(2)
                optimizer.state[p]["exp_avg"].mul_(0.5)
        elif change == 1:
            del optimizer.state[params[1]]
            optimizer.state[params[2]]["exp_avg"] = torch.zeros_like(params[2])
        elif change == 2:
            optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(20, 24))
    return full_weights(model), ["z" in optimizer.state[p] for p in params], optimizer.state[params[1]]["step"].item()


def schedule_free(rank, size):
    """Train with schedulefree's wrapper, which keeps `z` in `state`, and resume half-way. Return the weights."""
    import copy

    import schedulefree

    model, saved = layers((24, 40, 7)), None
    for half in range(2):
        options = {**COMMON, "start_preconditioning_step": 10, "precondition_frequency": 5}
        optimizer = schedulefree.ScheduleFreeWrapper(AdamWShampoo(model.parameters(), **options), momentum=0.9)
        if saved:
            optimizer.load_state_dict(saved)
        optimizer.train()
        for t in range(20 * half, 20 * half + 20):
            gradients(model, t)
            optimizer.step()
        optimizer.base.consolidate_state_dict(to=None)
        saved = copy.deepcopy(optimizer.state_dict())
    optimizer.eval()
    return full_weights(model)


def set_without_gathering(rank, size):
    """Set a moment where `state` shows `step` alone. Return the moment after one more step, or the error."""
    p = torch.nn.Parameter(torch.zeros(3, 4))
    optimizer = AdamWShampoo([p], **COMMON)
    for t in range(2):
        p.grad = torch.zeros(3, 4)
        if t:
            optimizer.state[p]["exp_avg"] = torch.ones(3, 4)
        try:
            optimizer.step()
        except (RuntimeError, ValueError) as error:
            return str(error)
    optimizer.consolidate_state_dict(to=None)
    return optimizer.state[p]["exp_avg"].max().item()


def staggered_resume(rank, size, path, first, last, **options):
    """Resume from step `first` (0: none) and train to step `last` with staggered roots.

    Return the steps at which some weight did not move, and the roots that are zero at the end.
    """
    params = parameters(*SHAPES)
    optimizer = AdamWShampoo(params, lr=1e-3, block_size=6, stagger=True, precondition_frequency=7, **options)
    if first:
        saved = torch.load(f"{path}/{first}", weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        for p, w in zip(params, saved["weights"], strict=True):
            p.data.copy_(w)
    stuck = []
    for t in range(first + 1, last + 1):
        random_gradients(params, t)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        stuck += [t] if any((p == q).any() for p, q in zip(params, before, strict=True)) else []
    optimizer.consolidate_state_dict(to=None)
    state = optimizer.state_dict()
    if rank == 0:
        torch.save({"optimizer": state, "weights": [p.detach() for p in params]}, f"{path}/{last}")
    if size > 1:
        dist.barrier()
    roots = [(i, key, X) for i, entry in state["state"].items() for key, X in entry.items() if "roots" in key]
    return stuck, [(i, key, b) for i, key, X in roots for b in range(len(X)) if not X[b].any()]


def group_added_after_consolidation(rank, size):
    """Add a group to a consolidated state. Return the shapes in the state_dict."""
    p, q = parameters((9, 7), (8, 8))
    optimizer = AdamWShampoo([p], **COMMON)
    first_error(optimizer, [p], 3)
    optimizer.consolidate_state_dict(to=None)
    optimizer.add_param_group({"params": [q]})
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    first_error(optimizer, [p, q], 2)
    return {i: {key: tuple(x.shape) for key, x in entry.items()} for i, entry in saved["state"].items()}


def pickled_alone(rank, size):
    """Pickle an optimizer whose process group is this rank alone, train both, and return both weights."""
    group = [dist.new_group([r]) for r in range(size)][rank]
    params = parameters((9, 7), (4,))
    optimizer = AdamWShampoo(params, **COMMON, process_group=group)
    first_error(optimizer, params, 3)
    other_params, other = pickle.loads(pickle.dumps((params, optimizer)))
    twin_params, twin = copy.deepcopy((params, optimizer))
    for pair in ((optimizer, params), (other, other_params), (twin, twin_params)):
        first_error(*pair, 3)
    return [[p.detach() for p in found] for found in (params, other_params, twin_params)]


def state_before_the_first_step(rank, size):
    """Take the state_dict on rank 0 alone. Return it, and weights of a run that loads it and of one that does not."""
    params, others = parameters((9, 7), (4,)), parameters((9, 7), (4,))
    optimizer, other = AdamWShampoo(params, **COMMON), AdamWShampoo(others, **COMMON)
    saved = copy.deepcopy(optimizer.state_dict()) if rank == 0 else None
    shared = [saved]
    dist.broadcast_object_list(shared, 0)
    other.load_state_dict(shared[0])
    again = copy.deepcopy(other.state_dict()) if rank == 0 else None  # still all zero
    for pair in ((optimizer, params), (other, others)):
        first_error(*pair, 45)
    return saved, again, [[p.detach() for p in found] for found in (params, others)]


def state_after_a_load(rank, size):
    """Load a trained state before the first step. Return it, and the state_dict of the optimizer that loaded it."""
    params = parameters((9, 7), (4,))
    trained, fresh = AdamWShampoo(params, **COMMON), AdamWShampoo(params, **COMMON)
    first_error(trained, params, 3)
    trained.consolidate_state_dict(to=None)
    fresh.load_state_dict(trained.state_dict())
    return trained.state_dict(), fresh.state_dict()


def former_name(rank, size):
    """Call consolidate(). Return its warnings, and whether the state was gathered, to all and to rank 1."""
    params, found = parameters((9, 7)), []
    optimizer = AdamWShampoo(params, **COMMON)
    for to in (None, 1):
        first_error(optimizer, params, 1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.consolidate(to)
        try:
            found.append(len(optimizer.state_dict()["state"]))
        except RuntimeError:
            found.append(None)
        found.append([f"{w.category.__name__}: {w.message}" for w in caught if w.filename == __file__])
    return found


def loaded_into_other_blocks(rank, size):
    """Load a state with another block size, so that buckets have other lengths. Return errors, and weights of both runs."""
    params, others = parameters((24, 20), (9,)), parameters((24, 20), (9,))
    optimizer = AdamWShampoo(params, **{**COMMON, "block_size": 5, "start_preconditioning_step": 2})
    other = AdamWShampoo(others, **{**COMMON, "block_size": 16})
    first_error(other, others, 1)
    first_error(optimizer, params, 4)
    optimizer.consolidate_state_dict(to=None)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    errors = [first_error(optimizer, params, 4), first_error(other, others, 4)]
    return errors, [p.detach() for p in params], [p.detach() for p in others]


def group_that_one_rank_cannot_add(rank, size):
    """Add a group that is an error on rank 1 alone.

    Return the error, the groups that remain, whether a right group can be added then, and whether it trains.
    """
    p, q = parameters((9, 7), (4,))
    optimizer = AdamWShampoo([p], **COMMON)
    first_error(optimizer, [p], 1)
    try:
        optimizer.add_param_group({"params": [q], "eps": -1.0 if rank == 1 else 1e-4})
    except (ValueError, RuntimeError) as error:
        remaining = len(optimizer.param_groups)
        failed = first_error(optimizer, [p], 1)
        optimizer.add_param_group({"params": [q]})
        before = q.detach().clone()
        return str(error), remaining, failed or first_error(optimizer, [p, q], 2), (q != before).all().item()
    return None


def option_changed_after_consolidation(rank, size):
    """Change the block size of a consolidated state. Return the error of state_dict()."""
    params = parameters((9, 7))
    optimizer = AdamWShampoo(params, **COMMON)
    first_error(optimizer, params, 3)
    optimizer.consolidate_state_dict(to=None)
    optimizer.param_groups[0]["block_size"] = 5
    return error_of(optimizer.state_dict)


def state_set_before_the_first_step(rank, size):
    """Set a moment before the first step, gather, and return its sums in the state_dict of each rank, before and after."""
    params = parameters((9, 7), (4,))
    optimizer = AdamWShampoo(params, **COMMON)
    optimizer.state[params[0]]["exp_avg"] = torch.ones_like(params[0])
    optimizer.consolidate_state_dict(to=None)
    gathered = optimizer.state_dict()["state"][0]["exp_avg"].sum().item()
    first_error(optimizer, params, 1)
    optimizer.consolidate_state_dict(to=None)
    return gathered, optimizer.state_dict()["state"][0]["step"].item()


def held_entry(rank, size):
    """Hold an entry over steps and consolidations, and then add 5 to its step.

    Return its keys and step after each, the step in the state_dict, and the entry's after one more step.
    """
    (p,) = params = parameters((4,))
    optimizer = AdamWShampoo(params, **COMMON)
    entry, found = optimizer.state[p], []
    for act in (lambda: first_error(optimizer, params, 2), lambda: optimizer.consolidate_state_dict(to=None)) * 2:
        act()
        found.append((sorted(entry), entry["step"].item()))
    entry["step"] += 5
    counted = optimizer.state_dict()["state"][0]["step"].item()
    first_error(optimizer, params, 1)
    return found, counted, entry["step"].item()


def factors_edited_in_place(rank, size):
    """Gather, double all factors in place, take a step without a refresh, and return the factors before and after."""
    params, found = parameters((9, 7), (24, 20)), []
    optimizer = AdamWShampoo(params, **{**COMMON, "betas": (0.9, 1.0), "precondition_frequency": 50})
    first_error(optimizer, params, 3)
    for scale in (1, 2, 1):
        if size > 1:
            optimizer.consolidate_state_dict(to=None)
        for p in params:
            entry = optimizer.state[p]
            found += [entry[key].mul_(scale).clone() for key in sorted(entry) if key.startswith("factors")]
            p.grad = torch.zeros_like(p)
        optimizer.step()
    return found
