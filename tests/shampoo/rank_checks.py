"""The functions of (rank, size) that `test_ranks` runs on every rank."""

import copy
from itertools import pairwise

import torch
import torch.distributed as dist
from rank_models import (
    COMMON,
    NAMED,
    batch,
    build,
    failing_function,
    first_error,
    full_weights,
    gradients,
    groups_of,
    layers,
    ones,
    parameters,
    quick_group,
    random_gradients,
    sharded_parameters,
    state_size,
    train,
    train_layers,
)
from torch import nn

import shampoo.optimizer
import shampoo.shards
from shampoo import AdamWShampoo
from shampoo.diagnostics import diagnostics, weights


def weights_after(rank, size, steps=50, **options):
    """Return the weights after `steps` steps."""
    model = build()
    optimizer = AdamWShampoo(groups_of(model), **{**COMMON, **options})
    train(model, optimizer, range(steps))
    return full_weights(model)


def unshared(rank, size, steps=50):
    """Return `weights_after` with all state on every rank, and the number of state elements in a state_dict of this rank."""
    model = build()
    optimizer = AdamWShampoo(groups_of(model), **COMMON, shard=False)
    train(model, optimizer, range(steps))
    entries = optimizer.state_dict()["state"].values() if rank == size - 1 else []
    return full_weights(model), sum(x.numel() for entry in entries for key, x in entry.items() if key != "step")


def single_process(steps=50, **options):
    """Return `weights_after` of a run in this process only."""
    assert not dist.is_initialized()
    return weights_after(0, 1, steps, **options)


def diagnosed(rank, size, sharded=False):
    """Return what this rank reports about step 20 of training `layers`, under FSDP2 if `sharded`."""
    model = layers((24, 40, 6))
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    optimizer = AdamWShampoo(model.parameters(), **{**COMMON, "start_preconditioning_step": 20})
    train_layers(model, optimizer, 20)
    before = weights(optimizer)
    gradients(model, 20)
    optimizer.step()
    return diagnostics(optimizer, before)


def missing_on_one_rank(rank, size):
    """Leave out a gradient on rank 1 at step 3. Return the step at which this rank raises, and the error."""
    model = build()
    named = [{"params": list(model.named_parameters())}] if NAMED else groups_of(model)
    optimizer = AdamWShampoo(named, **COMMON)
    for t in range(6):
        images, words, targets = batch(t)
        optimizer.zero_grad(set_to_none=True)
        model(images, words, 1).sub(targets).square().mean().backward()
        if t == 3 and rank == 1:
            model.mix.weight.grad = None
        try:
            optimizer.step()
        except RuntimeError as error:
            return t, str(error)
    return None


def different_options(rank, size):
    """Give rank 1 another eps, another shape, an unknown option, one more group, no parameters. Return this rank's errors."""
    errors = []
    for case in range(5):
        p = torch.zeros(3, 4 + (case == 1 and rank == 1))
        options = {**COMMON, "eps": 1e-3 if case == 0 and rank == 1 else 1e-4}
        groups = [{"params": [p], **({"momentun": 0.9} if case == 2 and rank == 1 else {})}]
        groups += [{"params": [torch.zeros(2)]}] if case == 3 and rank == 1 else []
        try:
            AdamWShampoo([] if case == 4 and rank == 1 else groups, **options)
        except (ValueError, RuntimeError) as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors


def different_later(rank, size):
    """Return the errors for a different or invalid `to`, a copy, and rates that differ at a consolidation or a load."""
    errors = []

    def attempt(act):
        try:
            act()
            errors.append("")
        except (ValueError, RuntimeError) as error:
            errors.append(str(error))

    optimizer = AdamWShampoo([torch.zeros(3, 4, requires_grad=True)], **COMMON)
    optimizer.consolidate_state_dict(to=None)
    saved = copy.deepcopy(optimizer.state_dict())
    attempt(lambda: optimizer.consolidate_state_dict(to=rank))
    attempt(lambda: optimizer.consolidate_state_dict(to=7))
    attempt(lambda: copy.deepcopy(optimizer))
    optimizer.param_groups[0]["lr"] = 1e-3 + rank
    attempt(optimizer.consolidate_state_dict)
    saved["param_groups"][0]["lr"] = 0.5 + rank
    attempt(lambda: optimizer.load_state_dict(saved))
    return errors


def fully_sharded(rank, size, sizes, shard=True):
    """Train layers of these sizes under FSDP2. Return the weights and this rank's number of state elements."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = layers(sizes)
    mesh = init_device_mesh("cpu", (size,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = AdamWShampoo(model.parameters(), **COMMON, weight_decay=0.1, shard=shard)
    train_layers(model, optimizer)
    return full_weights(model), state_size(optimizer)


def placed(rank, size, case):
    """Do what `fully_sharded` does, with the layers placed by hybrid or tensor parallelism, both, or by hand."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = layers((24, 40, 7))
    if case == "hybrid":  # replicated over one mesh dimension, sharded over the other
        fully_shard(model, mesh=init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard")))
    elif case == "tensor":
        parallelize_module(model, init_device_mesh("cpu", (size,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    elif case == "both":  # FSDP2 over tensor parallelism
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["data"])
    else:  # by hand, with ordinary tensors as biases
        mesh = init_device_mesh("cpu", (size,))
        for layer, placement in ((model[0], Shard(1)), (model[2], Replicate())):
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [placement]))
    optimizer = AdamWShampoo(model.parameters(), **COMMON, weight_decay=0.1)
    if case == "by hand":
        full = layers((24, 40, 7))
        for t in range(50):
            for p, q in zip(model.parameters(), full.parameters(), strict=True):
                q.data = p.full_tensor().detach() if hasattr(p, "full_tensor") else p.detach()
            gradients(full, t)
            for p, q in zip(model.parameters(), full.parameters(), strict=True):
                p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements) if hasattr(p, "full_tensor") else q.grad
            optimizer.step()
    else:
        train_layers(model, optimizer)
    return full_weights(model), state_size(optimizer)


def sharded_gradient_missing_on_one_rank(rank, size):
    """Do what `missing_on_one_rank` does, with a DTensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    p = nn.Parameter(distribute_tensor(torch.zeros(4, 6), init_device_mesh("cpu", (size,)), [Shard(0)]))
    optimizer = AdamWShampoo([p], **COMMON, weight_decay=0.1)
    for t in range(6):
        p.grad = None if t == 3 and rank == 1 else torch.ones_like(p)
        try:
            optimizer.step()
        except RuntimeError as error:
            return t, str(error)
    return None


def train_unsharded(sizes):
    model = layers(sizes)
    optimizer = AdamWShampoo(model.parameters(), **COMMON, weight_decay=0.1)
    train_layers(model, optimizer)
    return full_weights(model), state_size(optimizer)


def received_bytes(rank, size):
    """Return the bytes per parameter that a rank receives in one step, exchanged in full precision and in bfloat16."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    count, found = sum(p.numel() for p in model.parameters()), []
    for dtype in (None, torch.bfloat16):
        optimizer = AdamWShampoo(model.parameters(), **COMMON, exchange_dtype=dtype)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        found.append(optimizer._exchange._received.nbytes / count)
    return found


def not_finite(rank, size, one_rank):
    """Put NaN into a gradient at step 2, on all ranks, or on rank 1 only if `one_rank`.

    Return which steps moved the weights, the events, the step counts and the weights; or the step that raised, and the error.
    """
    model, seen = build(), []
    optimizer = AdamWShampoo(groups_of(model), **{**COMMON, "start_preconditioning_step": 2})
    for t in range(6):
        images, words, targets = batch(t)
        optimizer.zero_grad(set_to_none=True)
        (model(images, words, 1) - targets).square().mean().backward()
        if t == 2 and (rank == 1 or not one_rank):
            model.mix.weight.grad[3, 4] = torch.nan
        seen.append(full_weights(model))
        try:
            optimizer.step()
        except RuntimeError as error:
            return t, str(error)
    moved = [any((x != y).any() for x, y in zip(a, b, strict=True)) for a, b in pairwise([*seen, full_weights(model)])]
    return moved, dict(optimizer.events), [group["step"] for group in optimizer.param_groups], full_weights(model)


def failing_on_one_rank(rank, size, closure):
    """Fail on rank 1 at step 1: sparse gradient, or closure. Return the step at which this rank raises, and its error."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    p = torch.zeros(3, 4, requires_grad=True)
    sharded = nn.Parameter(distribute_tensor(torch.zeros(4, 6), init_device_mesh("cpu", (size,)), [Shard(0)]))
    optimizer = AdamWShampoo([{"params": [p]}, {"params": [sharded]}], **COMMON)
    for t in range(4):
        p.grad, sharded.grad = torch.ones(3, 4), torch.ones_like(sharded)
        fails = t == 1 and rank == 1
        if fails and not closure:
            p.grad = torch.sparse_coo_tensor(size=(3, 4))
        try:
            optimizer.step((lambda: [][0]) if fails and closure else None)
        except (RuntimeError, IndexError) as error:
            return t, str(error)
    return None


def replicated(rank, size):
    """Distribute the blocks within each of two groups of ranks. Return the weights and this rank's number of state elements."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    model = build()
    optimizer = AdamWShampoo(groups_of(model), **COMMON, process_group=mesh["shard"])
    train(model, optimizer, range(50))
    return full_weights(model), state_size(optimizer)


def few_blocks(rank, size):
    """Train one small matrix, so that some ranks own nothing.

    Return the weights, this rank's number of state elements, and the keys of the consolidated state.
    """
    torch.manual_seed(0)
    p = torch.randn(3, 4, requires_grad=True)
    optimizer = AdamWShampoo([p], **{**COMMON, "start_preconditioning_step": 5, "precondition_frequency": 5})
    for t in range(20):
        p.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(t))
        optimizer.step()
    optimizer.consolidate_state_dict(to=None)
    return p.detach().clone(), state_size(optimizer), list(optimizer.state_dict()["state"][0])


def large_directions(rank, size, dtype):
    """Exchange directions of up to 1e6 in a dtype. Return the weights after each of three steps."""
    params, found = parameters((9, 7), (4,), dtype=torch.float32), []
    options = {**COMMON, "grafting": "sgd", "start_preconditioning_step": 100, "lr": 1e-6, "betas": (0.0, 0.9)}
    optimizer = AdamWShampoo(params, **options, exchange_dtype=dtype)
    for t in range(3):
        random_gradients(params, t)
        params[0].grad[:3] *= 1e6
        optimizer.step()
        found.append(full_weights(nn.ParameterList(params)))
    return found


def failing_after_exchange(rank, size, function, sharded=False):
    """Fail in a function behind the exchange on rank 1 at step 3. Return the step at which this rank raises, and its error."""
    group = quick_group(size)
    params = sharded_parameters(group) if sharded else parameters((9, 7), (4,))
    optimizer = AdamWShampoo(params, **COMMON, gather_mb=1, process_group=group)
    module = shampoo.shards if sharded else shampoo.optimizer
    return first_error(optimizer, params, 8, failing_function(module, function, 3, rank), ones)


def failing_while_reading(rank, size, decay):
    """Fail on rank 1 at step 3 while reading DTensors, after the first of several collectives."""
    group = quick_group(size)
    params = sharded_parameters(group)
    optimizer = AdamWShampoo(params, **COMMON, weight_decay=decay, gather_mb=1, process_group=group)
    return first_error(optimizer, params, 8, failing_function(shampoo.shards, "all_to_all", 3, rank, before=False), ones)


def different_weights(rank, size, case):
    """Make weights of rank 1 differ at construction. Return the step that raises, its error, and whether weights moved."""
    params = parameters((9, 7), (4,), (5, 5), dtype=torch.bfloat16 if case == "bfloat16" else torch.float32)
    W = params[2].data
    if rank == 1 and case == "one bit":
        W.view(torch.int32)[4, 3] ^= 1
    elif rank == 1 and case == "a sign of zero":
        W[0, 0] = -0.0
    elif rank == 1 and case == "two rows swapped":
        W.copy_(W[[1, 0, 2, 3, 4]])
    elif rank == 1 and case == "transposed":
        W.copy_(W.T.clone())
    elif rank == 1:
        W.copy_(torch.randn(5, 5))
    if rank == 0 and case == "a sign of zero":
        W[0, 0] = 0.0
    optimizer = AdamWShampoo([(f"layer{i}", p) for i, p in enumerate(params)] if NAMED else params, **COMMON)
    before = [p.detach().clone() for p in params]
    if case == "repaired before the first step":
        for p in params:
            dist.broadcast(p.data, 0)
        before = [p.detach().clone() for p in params]
    found = first_error(optimizer, params, 2)
    return found, any((p != q).any() for p, q in zip(params, before, strict=True))


def mixed_dtypes(rank, size):
    """Train parameters whose states are float32 and float64, with equal gradients. Return the weights."""
    params = [*parameters((9, 7), dtype=torch.float32), *parameters((8, 5), dtype=torch.float64)]
    optimizer = AdamWShampoo(params, **COMMON)
    for t in range(20):
        random_gradients(params, t)
        optimizer.step()
    return full_weights(nn.ParameterList(params))
