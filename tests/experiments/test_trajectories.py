"""The weights compared with trajectories that the competition's code produced."""

import numpy as np
import pytest

from experiments.competition.trajectories import CASES, CHAOTIC, DATA, differences, replay, split


@pytest.mark.parametrize("name", CASES)
def test_weights_equal_the_competitions(name, device):
    found = differences(name, device)
    assert len(found) == len(DATA[f"{name}/param"]) > 5
    # In the chaotic case a relative change of 1e-7 in gradients moves weights by tens of percent: it only has to stay finite.
    assert found.max() <= (np.finfo(np.float32).max if name == CHAOTIC else 1e-5)


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
