"""The competition's own weights: a part of the trajectories that its code produced (float32, CPU, torch 2.5.1)."""

import json
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from shampoo import AdamWShampoo

DATA = np.load(Path(__file__).with_name("competition_trajectories.npz"))
CASES = json.loads(str(DATA["cases"]))


def options(case):
    """Our names for the settings of a case."""
    return {
        "betas": (case["beta1"], case["beta2"]),
        "eps": case["eps"],
        "weight_decay": case["weight_decay"],
        "decoupled_weight_decay": case["decoupled"],
        "momentum": case["momentum"],
        "nesterov": case["nesterov"],
        "nadam": case["nadam"],
        "bias_correction": case["bias_correction"],
        "block_size": case["block"],
        "merge_dims": case["merge_dims"],
        "precondition_frequency": case["frequency"],
        "start_preconditioning_step": case["start"] if case["start"] > 0 else None,
        "exponents": 1 / case["inv_root_override"] if case["inv_root_override"] else None,
        "exponent_multiplier": case["exponent_multiplier"],
        "grafting": case["graft"],
        "grafting_beta2": case["graft_beta2"],
        "grafting_eps": case["graft_eps"],
        "normalized_grafting": case["normalized_grafting"],
    }


def split(flat, shapes):
    """A flat array as tensors of the shapes."""
    parts = np.split(flat, np.cumsum([prod(shape) for shape in shapes])[:-1])
    return [torch.tensor(part.reshape(shape)) for part, shape in zip(parts, shapes)]


@pytest.mark.parametrize("name", CASES)
def test_weights_equal_the_competitions(name, device):
    case = CASES[name]
    params = [torch.nn.Parameter(w.to(device)) for w in split(DATA[f"{name}/init"], case["shapes"])]
    optimizer = AdamWShampoo(params, **options(case))
    expected = dict(zip(case["param_steps"], DATA[f"{name}/param"]))
    for t, (lr, grads) in enumerate(zip(case["lrs"], DATA[f"{name}/grad"])):
        for p, g in zip(params, split(grads, case["shapes"])):
            p.grad = None if g.isnan().all() else g.to(device)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        if t in expected:
            weights = torch.cat([p.detach().flatten().cpu() for p in params])
            assert weights.isfinite().all()
            # A relative 1e-7 in the gradients of ill_conditioned moves its weights by tens of percent: it has to stay finite.
            if name != "ill_conditioned":
                assert (weights - torch.tensor(expected[t])).abs().max() <= 1e-5


def ill_conditioned(off, **changed):
    """The weights at the end and at the start of that case, each number of its gradients off by one rounding, or as it is."""
    case, draw = CASES["ill_conditioned"], np.random.default_rng(0)
    start = split(DATA["ill_conditioned/init"], case["shapes"])
    params = [torch.nn.Parameter(w.clone()) for w in start]
    optimizer = AdamWShampoo(params, **{**options(case), **changed})
    for lr, grads in zip(case["lrs"], DATA["ill_conditioned/grad"]):
        grads = np.float32(grads * (1 + off * draw.choice([-1.2e-7, 1.2e-7], grads.shape)))
        for p, g in zip(params, split(grads, case["shapes"])):
            p.grad = g
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    return [p.detach() for p in params], start


@pytest.mark.parametrize(("changed", "low", "high"), [({}, 1e-2, 1.0), ({"relative_eps": True, "eps": 1e-4}, 0.0, 1e-4)])
def test_a_relative_eps_makes_rank_deficient_factors_forget_rounding(changed, low, high):
    """How far weights part, in parts of the way that they went."""
    (weights, start), (others, _) = ill_conditioned(0, **changed), ill_conditioned(1, **changed)
    parted = [((W - V).abs().max() / (W - S).abs().max()).item() for W, V, S in zip(weights, others, start)]
    assert low < max(parted) <= high
