"""The functions of (rank, size) that `test_shards` runs on every rank."""

import torch
import torch.distributed as dist
from rank_models import COMMON, full_weights
from torch import nn

from experiments.step_time import Watch
from shampoo import AdamWShampoo

# More than one MB; one row; three dimensions, of which two are merged; fewer rows than ranks; a bias; a scalar
SHAPES = [(700, 400), (1, 300), (8, 6, 50), (1, 3, 4), (2,), (37,), ()]


def distribute(X, mesh, placements):
    """Return a DTensor with the elements of X, which is equal on all ranks."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(X.clone(), mesh, placements)


def partial_sum(X, mesh):
    """Return a DTensor of which each rank holds a part of the sum, as of a gradient in sequence parallelism."""
    from torch.distributed.tensor import DTensor, Partial

    own = X if dist.get_rank() == 1 else torch.zeros_like(X)
    return DTensor.from_local(own, mesh, [Partial()] * mesh.ndim, run_check=False)


def placements_of(case, shape, mesh):
    """Return the placements of a parameter, for each dimension of the mesh."""
    from torch.distributed.tensor import Replicate, Shard

    if not shape or case == "replicated":
        return [Replicate()] * mesh.ndim
    dims = {"rows": [0, 0], "columns": [len(shape) - 1] * 2, "hybrid": [None, 0], "both": [0, len(shape) - 1]}[case]
    return [Replicate() if dim is None else Shard(dim) for dim in dims[-mesh.ndim :]]


def beside_whole_tensors(rank, size, case, dtype=torch.float32, **options):
    """Train DTensors and ordinary tensors with the same weights and gradients. Return the steps after which they differ.

    Every third step, two parameters have no gradient. At step 5, the square of a gradient overflows, and all ranks skip
    the step; at step 6, twice the square would.
    """
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, size // 2) if size > 2 else (size,))
    draw = torch.Generator().manual_seed(0)
    whole = [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in SHAPES]
    sharded = [nn.Parameter(distribute(p.detach(), mesh, placements_of(case, p.shape, mesh))) for p in whole]
    options = {**COMMON, "precondition_frequency": 3, "start_preconditioning_step": 3, "weight_decay": 0.1, **options}
    optimizers = [AdamWShampoo(params, gather_mb=1, **options) for params in (whole, sharded)]
    different = []
    for t in range(9):
        for i, (p, q) in enumerate(zip(whole, sharded, strict=True)):
            G = torch.randn(p.shape, generator=draw).to(dtype)
            if t in (5, 6) and i == 0:
                G[-1, -1] = 1e30 if t == 5 else 1.5e19
            p.grad = None if t % 3 == 2 and i % 4 == 1 else G
            if p.grad is None:
                q.grad = None
            elif case == "replicated":
                q.grad = partial_sum(G, mesh)
            else:
                q.grad = distribute(G, mesh, q.placements)
        for optimizer in optimizers:
            optimizer.step()
        if not all(torch.equal(p, q.full_tensor()) for p, q in zip(whole, sharded, strict=True)):
            different.append(t)
    skipped = [optimizer.events["steps skipped"] for optimizer in optimizers]
    return different, skipped, sharded[0].full_tensor().std().item()


def peak_memory(rank, size, gather_mb, decay):
    """Return MB that a rank holds, beyond its own blocks: at the peak of reading, of moving, of a step, and between steps.

    A step is compared with one of ordinary tensors that are as large as this rank's blocks, on this rank alone.
    """
    from torch.distributed.device_mesh import init_device_mesh

    mesh, shapes = init_device_mesh("cpu", (size,)), [*[(512, 512)] * 4 * size, (1024 * size, 512)]

    def train(params, **options):
        """Return an optimizer after a step, and the peak of its next step, both before the first roots."""
        optimizer = AdamWShampoo(params, weight_decay=decay, **options)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        with Watch(record=False) as watch:
            optimizer.step()
        return optimizer, watch.peak

    sharded = [nn.Parameter(distribute(torch.zeros(shape), mesh, placements_of("rows", shape, mesh))) for shape in shapes]
    optimizer, peak = train(sharded, gather_mb=gather_mb)
    alone = [dist.new_group([r]) for r in range(size)][rank]
    _, peak_alone = train([nn.Parameter(torch.zeros(shape)) for shape in [*[(512, 512)] * 4, (1024, 512)]], process_group=alone)
    (bucket,), exchange, own = optimizer._buckets, optimizer._exchange, sum(p.numel() for p in sharded) // size
    with torch.no_grad(), Watch(record=False) as reading:
        bucket.read(decay)
    with torch.no_grad(), Watch(record=False) as moving:
        exchange.run([bucket.zeros()], [False, False])
    kept = 4 * own * (2 if decay else 1)  # gradients, and weights if they decay
    sizes = reading.peak - kept, moving.peak - 4 * own, peak - peak_alone, exchange._received.nbytes
    return [size / 2**20 for size in sizes]


def lacking(rank, size):
    """Return the error for a process group of two of four ranks that hold shards."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh, groups = init_device_mesh("cpu", (size,)), [dist.new_group([r, r + 1]) for r in range(0, size, 2)]
    p = nn.Parameter(distribute(torch.zeros(8, 5), mesh, placements_of("rows", (8, 5), mesh)))
    try:
        AdamWShampoo([p], process_group=groups[rank // 2])
    except ValueError as error:
        return str(error)
    return None


def alone(rank, size, case):
    """Train DTensors on all ranks, with all state on each, and ordinary tensors. Return both weights."""
    from torch.distributed.device_mesh import init_device_mesh

    group, mesh = [dist.new_group([r]) for r in range(size)][rank], init_device_mesh("cpu", (size,))
    draw = torch.Generator().manual_seed(0)
    whole = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in [(9, 7), (1, 9), (5,)]]
    sharded = [nn.Parameter(distribute(p.detach(), mesh, placements_of(case, p.shape, mesh))) for p in whole]
    optimizers = [AdamWShampoo(params, **COMMON, weight_decay=0.1, process_group=group) for params in (whole, sharded)]
    for _ in range(5):
        for p, q in zip(whole, sharded, strict=True):
            p.grad = torch.randn(p.shape, generator=draw)
            q.grad = distribute(p.grad, mesh, q.placements)
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach() for p in whole], full_weights(nn.ParameterList(sharded))
