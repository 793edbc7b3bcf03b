"""The weights compared with trajectories that the competition's code produced."""

import numpy as np
import pytest
import torch
from reference import trajectory

from experiments.competition.trajectories import CASES, CHAOTIC, DATA, OWN_COUNTS, differences, options, replay, split
from shampoo import AdamWShampoo


@pytest.mark.parametrize("name", [name for name in CASES if name != OWN_COUNTS])
def test_weights_equal_the_competitions(name, device):
    found = differences(name, device)
    assert len(found) == len(DATA[f"{name}/param"]) > 5
    # In the chaotic case a relative change of 1e-7 in gradients moves weights by tens of percent: it only has to stay finite.
    assert found.max() <= (np.finfo(np.float32).max if name == CHAOTIC else 1e-5)


def test_where_gradients_are_missing_bias_corrections_count_a_parameters_own(device):
    """The competition's code counts the steps of all parameters, so the float64 reference takes its place."""
    case = CASES[OWN_COUNTS]
    start = [w.numpy() for w in split(DATA[f"{OWN_COUNTS}/init"], case["shapes"])]
    flat = [split(grads, case["shapes"]) for grads in DATA[f"{OWN_COUNTS}/grad"]]
    gradients = [[None if g.isnan().all() else g.numpy() for g in grads] for grads in flat]
    assert sum(g is None for grads in gradients for g in grads) > 10
    defaults = AdamWShampoo([torch.zeros(1)]).defaults
    expected = trajectory(start, gradients, case["lrs"], {**defaults, **options(case)})
    for ours, theirs in zip(replay(OWN_COUNTS, device), expected, strict=True):
        assert max(np.abs(W.numpy() - V).max() for W, V in zip(ours, theirs)) <= 1e-5
    assert differences(OWN_COUNTS, device).max() > 1e-3  # a case that counts alike could not tell


@pytest.mark.parametrize(("changed", "low", "high"), [({}, 1e-2, 1.0), ({"relative_eps": True, "eps": 1e-4}, 0.0, 1e-4)])
def test_a_relative_eps_makes_rank_deficient_factors_robust_to_rounding(changed, low, high):
    """Change each gradient element by one rounding error, and measure how far weights diverge relative to how far they moved.

    Two rounding errors of the weights themselves are subtracted: the scalar of 0.04 moves by 5.7e-5 of itself, and one rounding
    error is 6e-5 of that distance.
    """
    draw = np.random.default_rng(0)
    start = split(DATA[f"{CHAOTIC}/init"], CASES[CHAOTIC]["shapes"])
    *_, weights = replay(CHAOTIC, **changed)
    *_, others = replay(CHAOTIC, perturb=lambda g: np.float32(g * (1 + draw.choice([-1.2e-7, 1.2e-7], g.shape))), **changed)
    rounding = np.finfo(np.float32).eps
    divergence = [
        (((W - V).abs().max() - 2 * rounding * W.abs().max()).clamp(min=0) / (W - S).abs().max()).item()
        for W, V, S in zip(weights, others, start)
    ]
    assert low < max(divergence) <= high
