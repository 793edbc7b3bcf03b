"""The competition's own weights: the trajectories that its code produced."""

import numpy as np
import pytest

from experiments.competition.trajectories import CASES, CHAOTIC, DATA, differences, replay, split


@pytest.mark.parametrize("name", CASES)
def test_weights_equal_the_competitions(name, device):
    found = differences(name, device)
    assert len(found) == len(DATA[f"{name}/param"]) > 5
    # A relative 1e-7 in the gradients of the chaotic case moves its weights by tens of percent: it has to stay finite.
    assert found.max() <= (np.finfo(np.float32).max if name == CHAOTIC else 1e-5)


@pytest.mark.parametrize(("changed", "low", "high"), [({}, 1e-2, 1.0), ({"relative_eps": True, "eps": 1e-4}, 0.0, 1e-4)])
def test_a_relative_eps_makes_rank_deficient_factors_forget_rounding(changed, low, high):
    """How far weights part, in parts of the way that they went, when each number of the gradients is off by one rounding.

    Two roundings of the weights themselves do not count: the scalar goes 5.7e-5 of its 0.04, and one is 6e-5 of that way.
    """
    draw = np.random.default_rng(0)
    start = split(DATA[f"{CHAOTIC}/init"], CASES[CHAOTIC]["shapes"])
    *_, weights = replay(CHAOTIC, **changed)
    *_, others = replay(CHAOTIC, perturb=lambda g: np.float32(g * (1 + draw.choice([-1.2e-7, 1.2e-7], g.shape))), **changed)
    rounding = np.finfo(np.float32).eps
    parted = [
        (((W - V).abs().max() - 2 * rounding * W.abs().max()).clamp(min=0) / (W - S).abs().max()).item()
        for W, V, S in zip(weights, others, start)
    ]
    assert low < max(parted) <= high
