"""Models, gradients, and failures for the functions that `test_ranks` and `test_rank_state` run on every rank."""

import contextlib
from datetime import timedelta
from itertools import pairwise
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

NAMED = torch.__version__ >= "2.6"  # whether torch's optimizers take names
COMMON = {
    "max_factor_ratio": None,
    "relative_eps": False,
    "exponents": None,
    "lr": 1e-3,
    "eps": 1e-4,
    "block_size": 16,
    "precondition_frequency": 20,
    "start_preconditioning_step": 40,
}


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


def state_size(optimizer):
    """Return the number of state elements on this rank."""
    from shampoo.state import tensors

    return sum(x.numel() for bucket in optimizer._buckets for x in tensors(bucket))


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


def ones(params, t):
    """Set all gradients to one."""
    for p in params:
        p.grad = torch.ones_like(p)


def sharded_parameters(group):
    """Return two DTensors on the ranks of a group, of which the first is sent in three runs of blocks if gather_mb is 1."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = DeviceMesh.from_group(group, "cpu")
    return [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in parameters((700, 400), (4, 6))]
