"""The functions of (rank, size) that `test_ranks` runs on every rank."""

import contextlib
import copy
import pickle
import warnings
from datetime import timedelta
from itertools import pairwise
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import shampoo.copies
import shampoo.optimizer
from shampoo import AdamWShampoo
from shampoo.diagnostics import diagnostics, weights

NAMED = torch.__version__ >= "2.6"  # whether torch's optimizers take names
COMMON = {"lr": 1e-3, "eps": 1e-4, "block_size": 16, "precondition_frequency": 20, "start_preconditioning_step": 40}


class Net(nn.Module):
    """A convolution, an embedding, attention, a scalar, linear layers, and one layer that every third step skips."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 20, 3)
        self.embedding = nn.Embedding(37, 24)
        # No bias: the gradient of the keys' bias is rounding noise.
        self.attention = nn.MultiheadAttention(24, 3, bias=False, batch_first=True)
        self.mix = nn.Linear(20, 24)
        self.sometimes = nn.Linear(24, 24)
        self.output = nn.Linear(24, 7)
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, images, words, t):
        x = self.embedding(words) + self.mix(self.conv(images).relu().mean(dim=(2, 3)))[:, None]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.sometimes(x).tanh() if t % 3 else x
        return self.scale * self.output(x.mean(dim=1))


def build(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Net().to(dtype)


def batch(t):
    """Return the images, words and targets of step t."""
    draw = torch.Generator().manual_seed(t)
    images = torch.randn(8, 3, 6, 6, generator=draw)
    return images, torch.randint(37, (8, 5), generator=draw), torch.randn(8, 7, generator=draw)


def train(model, optimizer, steps, scheduler=None):
    """Train on the same batches on all ranks."""
    dtype = next(model.parameters()).dtype
    for t in steps:
        images, words, targets = batch(t)
        optimizer.zero_grad(set_to_none=True)
        (model(images.to(dtype), words, t) - targets).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def groups_of(model):
    """Return two parameter groups with different options: matrices, and the rest."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "betas": (0.8, 0.95), "block_size": 8}]


def full_weights(model):
    """Return copies of the weights, DTensors gathered."""
    return [p.full_tensor().detach() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]


def weights_after(rank, size, steps=50, **options):
    """Return the weights after `steps` steps."""
    model = build()
    optimizer = AdamWShampoo(groups_of(model), **{**COMMON, **options})
    train(model, optimizer, range(steps))
    return full_weights(model)


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


def fully_sharded(rank, size, sizes):
    """Train layers of these sizes under FSDP2. Return the weights and this rank's number of state elements."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = layers(sizes)
    mesh = init_device_mesh("cpu", (size,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = AdamWShampoo(model.parameters(), **COMMON, weight_decay=0.1)
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


def layers(sizes):
    torch.manual_seed(0)
    return nn.Sequential(*(x for a, b in pairwise(sizes) for x in (nn.Linear(a, b), nn.Tanh())))


def gradients(model, t):
    """Compute the gradients of step t."""
    draw = torch.Generator().manual_seed(t)
    model.zero_grad(set_to_none=True)
    x = torch.randn(16, model[0].in_features, generator=draw)
    model(x).sub(torch.randn(16, model[-2].out_features, generator=draw)).square().mean().backward()


def train_layers(model, optimizer, steps=50):
    for t in range(steps):
        gradients(model, t)
        optimizer.step()


def train_unsharded(sizes):
    model = layers(sizes)
    optimizer = AdamWShampoo(model.parameters(), **COMMON, weight_decay=0.1)
    train_layers(model, optimizer)
    return full_weights(model), state_size(optimizer)


def state_size(optimizer):
    """Return the number of state elements on this rank."""
    from shampoo.state import tensors

    return sum(x.numel() for bucket in optimizer._buckets for x in tensors(bucket))


def received_bytes(rank, size):
    """Return the bytes per parameter that a rank receives in one step, exchanged in full precision and in bfloat16."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    count, found = sum(p.numel() for p in model.parameters()), []
    for dtype in (None, torch.bfloat16):
        optimizer = AdamWShampoo(model.parameters(), **COMMON, exchange_dtype=dtype)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        found.append(sum(exchange._received.nbytes for exchange in optimizer._exchanges) / count)
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


def unconsolidated(rank, size):
    """Return the errors of state_dict() without consolidate_state_dict(), after it, and after one more step."""
    model = build()
    optimizer = AdamWShampoo(model.parameters(), **COMMON)
    errors = []
    train(model, optimizer, [0])
    for prepare in (lambda: None, optimizer.consolidate_state_dict, lambda: train(model, optimizer, [0])):
        prepare()
        try:
            optimizer.state_dict()
            errors.append("")
        except RuntimeError as error:
            errors.append(str(error))
    return errors


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
    """Do what `distributed_checkpoint` does with a frozen embedding, and if `flat` as torchtitan does, flattened."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as sd

    model = build()
    model.embedding.weight.requires_grad_(False)
    optimizer = AdamWShampoo(groups_of(model), **{**COMMON, "start_preconditioning_step": 10, "precondition_frequency": 5})
    options = sd.StateDictOptions(flatten_optimizer_state_dict=flat)

    def gather():
        if size > 1:
            optimizer.consolidate_state_dict(to=None)
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


SHAPES = [(24, 20), (7, 9), (7, 9), (5,), (6, 5, 4)]


def random_gradients(params, t):
    """Set the same standard normal gradients on all ranks."""
    draw = torch.Generator().manual_seed(t)
    for p in params:
        p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)


def parameters(*shapes, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in shapes]


def quick_group(size):
    """Return a process group of all ranks in which nothing waits for longer than 20 seconds."""
    return dist.new_group(list(range(size)), timeout=timedelta(seconds=20))


def first_error(optimizer, params, steps, fails=lambda t: contextlib.nullcontext(), gradients=random_gradients):
    """Take steps, each within `fails(t)`. Return the one that raises on this rank and its error."""
    for t in range(steps):
        gradients(params, t)
        try:
            with fails(t):
                optimizer.step()
        except Exception as error:
            return t, f"{type(error).__name__}: {error}"
    return None


def failing_function(module, name, at, rank, before=True):
    """Return a function of t: a context in which, at step `at` on rank 1, a function raises before or after its work."""

    def fails(t):
        if (t, rank) != (at, 1):
            return contextlib.nullcontext()
        original, calls = getattr(module, name), []

        def call(*arguments, **options):
            """Fail at the first call."""
            calls.append(name)
            found = original(*arguments, **options) if len(calls) > 1 or not before else None
            if len(calls) == 1:
                raise RuntimeError("out of memory")
            return found

        return mock.patch.object(module, name, call)

    return fails


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
    """Add a group to a consolidated state. Return the error of state_dict(), and the state after one more consolidation."""
    p, q = parameters((9, 7), (8, 8))
    optimizer = AdamWShampoo([p], **COMMON)
    first_error(optimizer, [p], 3)
    optimizer.consolidate_state_dict(to=None)
    optimizer.add_param_group({"params": [q]})
    error = None
    try:
        optimizer.state_dict()
    except RuntimeError as found:
        error = str(found)
    optimizer.consolidate_state_dict(to=None)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    first_error(optimizer, [p, q], 2)
    return error, {i: {key: tuple(x.shape) for key, x in entry.items()} for i, entry in saved["state"].items()}


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


def ones(params, t):
    """Set all gradients to one."""
    for p in params:
        p.grad = torch.ones_like(p)


def sharded_parameters(group):
    """Return two DTensors on the ranks of a group."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = DeviceMesh.from_group(group, "cpu")
    return [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in parameters((9, 7), (4, 6))]


def failing_after_exchange(rank, size, function, sharded=False):
    """Fail in a function behind the exchange on rank 1 at step 3. Return the step at which this rank raises, and its error."""
    group = quick_group(size)
    params = sharded_parameters(group) if sharded else parameters((9, 7), (4,))
    optimizer = AdamWShampoo(params, **COMMON, process_group=group)
    return first_error(optimizer, params, 8, failing_function(shampoo.optimizer, function, 3, rank), ones)


def failing_while_reading(rank, size, before, decay):
    """Fail on rank 1 at step 3 while reading the first of two DTensors, before or after its first collective."""
    group = quick_group(size)
    params = sharded_parameters(group)
    optimizer = AdamWShampoo(params, **COMMON, weight_decay=decay, process_group=group)
    return first_error(optimizer, params, 8, failing_function(shampoo.copies, "full_tensor", 3, rank, before), ones)


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
    """Load a trained state before the first step. Return the error of state_dict(), which now needs to be gathered."""
    params = parameters((9, 7), (4,))
    trained, fresh = AdamWShampoo(params, **COMMON), AdamWShampoo(params, **COMMON)
    first_error(trained, params, 3)
    trained.consolidate_state_dict(to=None)
    fresh.load_state_dict(trained.state_dict())
    try:
        fresh.state_dict()
    except RuntimeError as error:
        return str(error)
    return None


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
    """Change the block size of a consolidated state. Return the error of state_dict(), and that of the next consolidation."""
    params = parameters((9, 7))
    optimizer = AdamWShampoo(params, **COMMON)
    first_error(optimizer, params, 3)
    optimizer.consolidate_state_dict(to=None)
    optimizer.param_groups[0]["block_size"] = 5
    error = None
    try:
        optimizer.state_dict()
    except RuntimeError as found:
        error = str(found)
    try:
        optimizer.consolidate_state_dict(to=None)
        optimizer.load_state_dict(optimizer.state_dict())
    except (ValueError, RuntimeError) as refused:  # on all ranks, its own or another's
        return error, str(refused)
    return error, None


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
