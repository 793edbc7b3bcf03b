"""Roots that follow their factors."""

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.following import decompose, drift, errors, newton_step, summary


def drifting(size, seed=0):
    """Return a factor (1, 8, 8) with equal and close eigenvalues, its change, and the root of the changed one by numpy."""
    draw = np.random.default_rng(seed)
    lam = np.array([4, 1, 1, 1, 1.01, 0.3, 0.01, 0.01])
    Q, E = np.linalg.qr(draw.standard_normal((8, 8))).Q, draw.standard_normal((8, 8))
    A = (Q * lam) @ Q.T
    changed = A + size * (Q * lam**0.5) @ (E + E.T) @ (Q * lam**0.5).T
    mu, V = np.linalg.eigh(changed)
    return torch.tensor(A)[None], torch.tensor(changed)[None], torch.tensor((V * mu**-0.5) @ V.T)[None]


def test_a_newton_step_is_exact_to_first_order():
    """Its error falls with the square of the change, that of the stale root with the change."""
    found = []
    for size in (1e-3, 1e-4):
        A, changed, root = drifting(size)
        lam, Q, X = decompose(A)
        found.append([torch.linalg.norm(Y - root).item() for Y in (X, newton_step(changed, lam, Q, X))])
    falls = np.array(found[0]) / found[1]
    assert 9 < falls[0] < 11
    assert falls[1] > 80


def test_ways_are_exact_for_a_factor_that_stays():
    A, _, _ = drifting(0)
    found = errors([A.float()] * 3)
    assert set(found["way"]) == {"stale", "Newton", "first order", "qr, 0.0", "qr, 0.1", "qr, 0.3"}
    assert (found["error"] < 1e-5).all()


@pytest.mark.slow
def test_the_solver_follows_drifting_factors():
    """Check 30 of the 1,000 made sequences: roots are finite, also where another kind takes over, and nearly all accurate."""
    found = pd.concat([errors(drift(seed)) for seed in range(30)])
    table = summary(found)
    for tolerance in (0.0, 0.1, 0.3):
        row = table.loc[f"qr, {tolerance}"]
        assert row["not finite"] == 0
        assert row["at most 0.1"] > 0.95
        assert row["most"] < 0.5
    assert table.loc["stale", "at most 0.1"] < 0.8
