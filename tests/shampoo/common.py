"""Parameters, gradients and comparisons that several tests share."""

from functools import partial

import numpy as np
import torch

from shampoo import AdamWShampoo
from shampoo.copies import copy, flat_views, grid_views

ADAMW = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
LIKE_ADAMW = partial(AdamWShampoo, start_preconditioning_step=10**9, block_size=8, **ADAMW)  # equal to AdamW within rounding
# The competition's values of options whose defaults differ
COMPETITION = {"eps": 1e-8, "relative_eps": False, "exponents": None, "max_factor_ratio": None, "block_size": 1024}
SHAPES = [(6, 5), (20, 9), (7,)]  # one block, several, a vector
# For steps on accelerators, where all stacks are grafted at once
MORE_SHAPES = [(40, 24), (24,), (6, 5, 4), (1, 8), (24, 24), (24, 24)]
VARIANTS = {
    "defaults": {},
    "competition": {"exponents": None, "max_factor_ratio": None, "relative_eps": False, "nadam": True, "weight_decay": 0.1},
    "momentum": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "cautious_decay": True},
    "no grafting": {"grafting": "none"},
    "SGD's length": {"grafting": "sgd"},
    "soap": {"preconditioner": "soap"},
    "bf16 roots": {"bf16_roots": True, "block_size": 16},
}


def make_params(*shapes, dtype=torch.float32, device="cpu", seed=0):
    """Return a parameter per shape with standard normal elements."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def set_gradients(params, seed, scale=1.0):
    """Set the gradients to `scale` times standard normal elements."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.device, p.dtype)


def train(optimizer, params, steps, first=0):
    """Take steps first, ..., first + steps - 1, each with its own random gradients."""
    for t in range(first, first + steps):
        set_gradients(params, 1000 + t)
        optimizer.step()


def trained(steps=3, **options):
    """Return parameters and an optimizer with factors and roots after some steps."""
    params = make_params((6, 5), (20, 9), (7,))
    optimizer = AdamWShampoo(params, **{"block_size": 8, "precondition_frequency": 2, **options})
    train(optimizer, params, steps)
    return params, optimizer


def identical(a, b):
    """Return True if nested containers have the same structure, dtypes and values."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(identical, a, b))
    return a == b


def largest_difference(a, b):
    """Return the largest absolute difference between elements of two nested lists of tensors or arrays; NaN if there is one."""
    if isinstance(a, list):
        return np.max([largest_difference(x, y) for x, y in zip(a, b, strict=True)], initial=0.0)
    difference = abs(a - b)
    return float(difference.max()) if 0 not in difference.shape else 0.0


def assemble(layouts, flats):
    """Return each parameter's tensor in its merged shape, given all ranks' flat vectors: the inverse of `load`."""
    found = [torch.full(shape, torch.nan) for shape in layouts[0].shapes]
    for layout, flat in zip(layouts, flats):
        copy(grid_views(layout, found), flat_views(layout, flat, found))
    return found


def compare_with_adamw(act):
    """Assert that act(make, params) returns the same tensors for torch's AdamW as for `LIKE_ADAMW`, within 1e-6.

    `make` takes parameters or groups, and options; params have shapes SHAPES and dtype float64. None stands for params.
    """
    found = []
    for make in (partial(torch.optim.AdamW, **ADAMW), LIKE_ADAMW):
        params = make_params(*SHAPES, dtype=torch.float64)
        returned = act(make, params)
        found.append([x.detach().clone() for x in (params if returned is None else returned)])
    for expected, x in zip(*found, strict=True):
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)


def compare_change_with_adamw(change):
    """Assert that three steps, change(optimizer, params), and three steps of params act as with torch's AdamW."""

    def act(make, params):
        optimizer = make(params)
        train(optimizer, params, 3)
        change(optimizer, params)
        train(optimizer, params, 3, first=3)

    compare_with_adamw(act)
