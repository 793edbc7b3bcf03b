"""Roots that follow their factors."""

import numpy as np
import torch

from experiments.following import decompose, errors, first_order, newton_step, warm_start


def drifting(size, seed=0):
    """Return a factor (1, 8, 8) with equal and close eigenvalues, its change, and the root of the changed one by numpy."""
    draw = np.random.default_rng(seed)
    lam = np.array([4, 1, 1, 1, 1.01, 0.3, 0.01, 0.01])
    Q, E = np.linalg.qr(draw.standard_normal((8, 8))).Q, draw.standard_normal((8, 8))
    A = (Q * lam) @ Q.T
    changed = A + size * (Q * lam**0.5) @ (E + E.T) @ (Q * lam**0.5).T
    mu, V = np.linalg.eigh(changed)
    return torch.tensor(A)[None], torch.tensor(changed)[None], torch.tensor((V * mu**-0.5) @ V.T)[None]


def test_corrections_are_exact_to_first_order():
    """Their errors fall with the square of the change, that of the stale root with the change."""
    found = []
    for size in (1e-3, 1e-4):
        A, changed, root = drifting(size)
        lam, Q, X = decompose(A)
        ways = [X, newton_step(changed, lam, Q, X), first_order(changed, Q)[0]]
        found.append([torch.linalg.norm(Y - root).item() for Y in ways])
    falls = np.array(found[0]) / found[1]
    assert 9 < falls[0] < 11
    assert (falls[1:] > 80).all()


def test_a_correction_that_is_too_large_is_not_relied_on():
    A, _, _ = drifting(0)
    Q = torch.linalg.qr(torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0)).double()).Q
    assert not first_order(A, Q)[1].item()
    # For a diagonal of ones, K is -1/2 times the off-diagonal part: eigenvalues of 0.45 and 0.55 in magnitude
    for size, reliable in ((0.9, True), (1.1, False)):
        pair = torch.tensor([[[1.0, size], [size, 1.0]]], dtype=torch.float64)
        assert first_order(pair, torch.eye(2, dtype=torch.float64)[None])[1].item() is reliable
    assert first_order(A, decompose(A)[1])[1].item()


def test_ways_are_exact_for_a_factor_that_stays():
    A, _, _ = drifting(0)
    found = errors([A, A, A])
    single = found["way"].isin(["warm start", "anew", "eigh"])  # in float32
    assert set(found["way"]) == {"stale", "Newton", "first order", "turned", "qr", "warm start", "anew", "eigh"}
    assert (found["error"] < single.map({True: 1e-4, False: 1e-9})).all()
    assert set(found.loc[found["way"] == "warm start", "products"]) == {8}  # two for X A X, five for two polynomials, one for X
    assert set(found.loc[found["way"] == "anew", "products"]) == {21}


def test_a_warm_start_follows_its_formula():
    A, changed, _ = drifting(0.05)
    _, _, X = decompose(A)
    M = (X @ changed @ X)[0].numpy()
    mu, V = np.linalg.eigh((M + M.T) / 2)
    Y = (V * mu**-0.5) @ V.T @ X[0].numpy()
    assert np.abs(Y - Y.T).max() > 0.05
    np.testing.assert_allclose(warm_start(changed, X)[0].numpy(), (Y + Y.T) / 2, rtol=0, atol=1e-5 * np.abs(Y).max())
