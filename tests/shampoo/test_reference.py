"""The optimizer compared with the dense float64 reference: shapes, blocks, exponents, grafting, momentum, missing gradients."""

import numpy as np
import pytest
import torch
from common import COMPETITION, largest_difference
from reference import trajectory

from shampoo import AdamWShampoo

SHAPES = [(), (1,), (7,), (5, 6), (1, 8, 1), (9, 4), (4, 3, 5), (3, 2, 4, 3), (9, 4), (0, 3)]
BASE = (
    dict(AdamWShampoo([torch.zeros(1)]).defaults)
    | COMPETITION
    | {
        "betas": (0.9, 0.97),
        "eps": 1e-2,  # large enough that rounding errors of rank-deficient factors stay small
        "precondition_frequency": 3,
        "start_preconditioning_step": 2,
        "block_size": 1024,
    }
)
# At the first step, a matrix is diagonal in its own eigenbases up to rounding, which an eps of 1e-8 would let through.
SOAP = {"preconditioner": "soap", "solver": "eigh", "start_preconditioning_step": 1, "grafting_eps": 1e-5}
CASES = {
    "base": {},
    "blocks of 4": {"block_size": 4},
    "blocks of 3": {"block_size": 3, "merge_dims": False},
    "blocks of 1": {"block_size": 1},
    "unmerged dimensions": {"merge_dims": False},
    "default start": {"start_preconditioning_step": None},
    "roots every step": {"precondition_frequency": 1, "start_preconditioning_step": None},
    "one power": {"exponents": 0.5},
    "one integer power": {"exponents": 1},
    "left": {"exponents": (0.5, 0.0)},
    "right": {"exponents": (0.0, 0.5), "block_size": 4},
    "left and right": {"exponents": (0.3, 0.4), "merge_dims": False},
    "no powers": {"exponents": 0.0},
    "multiplier": {"exponent_multiplier": 0.7, "block_size": 5},
    "multiplier of a power": {"exponent_multiplier": 0.7, "exponents": 0.5},
    "multiplier of left and right": {"exponent_multiplier": 0.7, "exponents": (0.3, 0.4), "merge_dims": False},
    "no grafting": {"grafting": "none"},
    "no grafting, left": {"grafting": "none", "exponents": (0.5, 0.0)},
    "sgd": {"grafting": "sgd", "momentum": 0.9, "nesterov": True},
    "rmsprop": {"grafting": "rmsprop", "block_size": 4},
    "adagrad": {"grafting": "adagrad", "betas": (0.9, 1.0)},
    "adagrad, factors averaged": {"grafting": "adagrad"},
    "grafting's own beta2": {"grafting_beta2": 0.8, "block_size": 4},
    "grafting's sum": {"grafting_beta2": 1.0},
    "grafting's eps": {"grafting_eps": 0.1},
    "normalized": {"normalized_grafting": True, "block_size": 4},
    "normalized sgd": {"normalized_grafting": True, "grafting": "sgd"},
    "nadam": {"nadam": True, "weight_decay": 0.1},
    "nadam, momentum": {"nadam": True, "momentum": 0.5, "nesterov": True, "weight_decay": 0.1},
    "heavy ball": {"momentum": 0.9, "weight_decay": 0.1, "betas": (0.0, 0.97)},
    "coupled decay": {"weight_decay": 0.1, "decoupled_weight_decay": False, "betas": (0.9, 1.0)},
    "no bias correction": {"bias_correction": False},
    "max_dim": {"max_dim": 6},
    "max_dim, sgd": {"max_dim": 6, "grafting": "sgd", "block_size": 4},
    "max_dim, none": {"max_dim": 6, "grafting": "none"},
    "max_dim, adagrad": {"max_dim": 6, "grafting": "adagrad"},
    "nesterov without momentum": {"nesterov": True},
    "factors of every third step": {"factor_frequency": 3, "block_size": 4},
    "sums of every second step": {"factor_frequency": 2, "betas": (0.9, 1.0)},
    "newton": {"solver": "newton", "block_size": 4},
    "staggered at every step": {"stagger": True, "precondition_frequency": 1},
    "vectors without factors": {"precondition_vectors": False},
    "vectors without factors, sgd": {"precondition_vectors": False, "grafting": "sgd", "block_size": 7},
    "relative eps": {"relative_eps": True},
    "ratio 1": {"max_factor_ratio": 1},
    "ratio 2, one power": {"max_factor_ratio": 2.0, "exponents": 0.5},
    "ratio 1/2, blocks": {"max_factor_ratio": 0.5, "block_size": 4},
    "ratio 2/3, sgd": {"max_factor_ratio": 0.67, "grafting": "sgd", "block_size": 4, "merge_dims": False},
    "ratio 2/3, none": {"max_factor_ratio": 0.67, "grafting": "none", "block_size": 4, "merge_dims": False},
    "ratio 1, unmerged, left and right": {"max_factor_ratio": 1.0, "exponents": (0.3, 0.4), "merge_dims": False},
    "beta2 of unfactored blocks": {"max_factor_ratio": 0.67, "unfactored_beta2": 0.8, "block_size": 4},
    "beta2 of vectors": {"precondition_vectors": False, "unfactored_beta2": 0.8, "grafting_beta2": 0.9},
    "beta2 of vectors, adagrad": {"precondition_vectors": False, "unfactored_beta2": 0.8, "grafting": "adagrad"},
    "kl": {"covariance": "kl", "exponents": 0.5},
    "kl, blocks, unmerged": {"covariance": "kl", "exponents": 0.5, "block_size": 4, "merge_dims": False, "nadam": True},
    "kl, ratio 1": {"covariance": "kl", "exponents": 0.5, "max_factor_ratio": 1.0, "relative_eps": True},
    "kl, vectors left out": {"covariance": "kl", "exponents": 0.5, "precondition_vectors": False, "unfactored_beta2": 0.8},
    "kl, one-sided": {"covariance": "kl", "exponents": (0.5, 0.0)},
    "kl, no grafting, late start": {"covariance": "kl", "exponents": 0.5, "grafting": "none", "start_preconditioning_step": 6},
    "kl, sums": {"covariance": "kl", "exponents": 0.5, "betas": (0.9, 1.0), "factor_frequency": 2},
    "kl, roots every step": {"covariance": "kl", "exponents": 0.5, "precondition_frequency": 1},
    "cautious decay": {"cautious_decay": True, "weight_decay": 0.5, "momentum": 0.5},
    "cautious decay, soap": {"cautious_decay": True, "weight_decay": 0.5, **SOAP},
    "soap": SOAP,
    "soap, default start": {**SOAP, "start_preconditioning_step": None},
    "soap, qr": {**SOAP, "solver": "qr", "qr_tolerance": 0.0},
    "soap, ratio 1, blocks, unmerged": {**SOAP, "max_factor_ratio": 1, "block_size": 4, "merge_dims": False},
    "soap, nadam": {**SOAP, "nadam": True},
    "soap, ratio 1": {**SOAP, "max_factor_ratio": 1.0, "unfactored_beta2": 0.8},
    "soap, ratio 1/2, blocks": {**SOAP, "max_factor_ratio": 0.5, "block_size": 4},
    "soap, one-sided": {**SOAP, "exponents": (0.5, 0.0)},
    "soap, every other factor": {**SOAP, "factor_frequency": 2, "grafting_beta2": 0.9},
    "soap, sums": {**SOAP, "grafting": "adagrad", "betas": (0.9, 1.0), "momentum": 0.5, "nesterov": True},
    "soap, rmsprop, coupled decay": {**SOAP, "grafting": "rmsprop", "weight_decay": 0.1, "decoupled_weight_decay": False},
    "soap, max_dim": {**SOAP, "max_dim": 6},
}


def problem(seed, steps, missing):
    """Return weights, and gradients per step; if `missing`, all are None at index 4 and 40% elsewhere."""
    rng = np.random.default_rng(seed)
    weights = [rng.standard_normal(shape) for shape in SHAPES]
    gradients = [[rng.standard_normal(shape) * 10 ** rng.uniform(-1, 0) for shape in SHAPES] for _ in range(steps)]
    if missing:
        gradients = [[None if t == 4 or rng.random() < 0.4 else g for g in row] for t, row in enumerate(gradients)]
    return weights, gradients


def run(groups, gradients, lrs, params):
    """Take a step per row of gradients. Return the weights after each step."""
    optimizer, out = AdamWShampoo(groups), []
    for row, lr in zip(gradients, lrs):
        for p, g in zip(params, row):
            p.grad = None if g is None else torch.tensor(g, dtype=p.dtype, device=p.device)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        out.append([p.detach().double().cpu().numpy().copy() for p in params])
    return out


def parameters(weights, dtype, device="cpu"):
    return [torch.nn.Parameter(torch.tensor(w, dtype=dtype, device=device)) for w in weights]


@pytest.mark.parametrize("missing", [False, True], ids=["all gradients", "some missing"])
@pytest.mark.parametrize("case", CASES)
def test_equals_reference_in_float64(case, missing, device):
    options = BASE | CASES[case]
    weights, gradients = problem(seed=len(case), steps=12, missing=missing)
    lrs = np.linspace(0.1, 0.01, 12)
    params = parameters(weights, torch.float64, device)
    ours = run([{"params": params, **options}], gradients, lrs, params)
    assert largest_difference(ours, trajectory(weights, gradients, lrs, options)) < 1e-9


@pytest.mark.parametrize("case", ["base", "blocks of 4", "no grafting", "nadam, momentum"])
def test_equals_reference_in_float32(case, device):
    options = BASE | CASES[case]
    weights, gradients = problem(seed=1, steps=12, missing=True)
    lrs = np.full(12, 1e-2)
    params = parameters(weights, torch.float32, device)
    ours = run([{"params": params, **options}], gradients, lrs, params)
    assert largest_difference(ours, trajectory(weights, gradients, lrs, options)) < 1e-5


def test_each_group_has_its_own_options_and_step_count():
    cases = ["blocks of 4", "no grafting", "left and right", "heavy ball", "max_dim"]
    weights, gradients = problem(seed=2, steps=12, missing=True)
    gradients[6][2:4] = gradients[7][2:4] = [None, None]  # no gradients in the second group: its count stops
    lrs = np.full(12, 1e-2)
    params = parameters(weights, torch.float64)
    places = [slice(2 * i, 2 * i + 2) for i in range(len(cases))]
    ours = run([{"params": params[s], **BASE, **CASES[c]} for s, c in zip(places, cases)], gradients, lrs, params)
    for s, c in zip(places, cases):
        expected = trajectory(weights[s], [row[s] for row in gradients], lrs, BASE | CASES[c])
        assert largest_difference([row[s] for row in ours], expected) < 1e-9


def test_bfloat16_weights_follow_the_reference_up_to_rounding():
    weights, gradients = problem(seed=3, steps=12, missing=False)
    params = parameters(weights, torch.bfloat16)
    rounded = [p.detach().double().numpy() for p in params]
    gradients = [[torch.tensor(g).bfloat16().double().numpy() for g in row] for row in gradients]
    lrs = np.full(12, 1e-2)
    ours = run([{"params": params, **BASE}], gradients, lrs, params)
    expected = trajectory(rounded, gradients, lrs, BASE)
    # Each of 12 steps rounds weights below 4 to the 8 bits of bfloat16.
    assert largest_difference(ours, expected) < 12 * 4 * 2**-8


def test_channels_last_weights_equal_the_reference(device):
    weights = [np.random.default_rng(0).standard_normal(shape) for shape in [(6, 3, 2, 2), (9, 3, 2, 2), (5, 7, 1, 1)]]
    gradients = [[np.random.default_rng(t).standard_normal(w.shape) for w in weights] for t in range(6)]
    options = BASE | {"block_size": 6, "weight_decay": 0.1}
    params = parameters(weights, torch.float64, device)
    for p in params:
        p.data = p.data.to(memory_format=torch.channels_last)
    ours = run([{"params": params, **options}], gradients, [1e-2] * 6, params)
    assert largest_difference(ours, trajectory(weights, gradients, [1e-2] * 6, options)) < 1e-9
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in params)
