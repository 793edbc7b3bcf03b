"""The experiments on the paper: their problems, the fit of slopes, and how they resume."""

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.paper.horizons import Cell, run
from experiments.paper.problems import PROBLEMS, SEEDS, draw_data, fit_slope, gradient, loss, measure


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=list(PROBLEMS))
@pytest.mark.parametrize(("m", "n"), [(5, 3), (2, 6)])
def test_problems_have_the_gradients_and_smoothness_they_state(problem, m, n):
    A, B = (x.double() for x in draw_data(m, n))
    d = (m * n) ** -0.5
    # Pairs of points at many distances from each other and from A X = B, where the curvature of phi is largest.
    X = torch.linalg.solve(A, B) + torch.tensor([0, 0.01, 0.1, 1, 10]).repeat(2).view(-1, 1, 1) * d * torch.randn(SEEDS, m, n)
    Y = X + 10.0 ** torch.randint(-3, 2, (SEEDS, 1, 1)) * d * torch.randn(SEEDS, m, n)
    X.requires_grad_()
    (expected,) = torch.autograd.grad(loss(problem, A, B, X).sum(), X)
    torch.testing.assert_close(gradient(problem, A, B, X), expected, rtol=1e-10, atol=1e-12)
    difference = torch.linalg.matrix_norm(expected - gradient(problem, A, B, Y))
    assert (difference <= problem.smoothness * torch.linalg.matrix_norm(X - Y) * (1 + 1e-9)).all()
    e = torch.linspace(-9, 9, 1801, dtype=torch.float64, requires_grad=True)  # the bound is attained
    (slope,) = torch.autograd.grad(problem.phi(e).sum(), e, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), e)
    assert curvature.abs().max().item() == pytest.approx(problem.smoothness, rel=1e-6)
    assert curvature.min() < 0  # not convex
    assert problem.phi(torch.zeros(1)) == 0
    assert (problem.phi(e) >= 0).all()


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=list(PROBLEMS))
def test_noise_has_mean_zero_and_variance_one(problem):
    generator = torch.Generator().manual_seed(0)
    noise = torch.cat([problem.noise(5, 3, generator) for _ in range(1000)])
    assert torch.linalg.vector_norm(noise.mean(dim=0)).item() < 0.03  # 0.01 is expected
    assert noise.square().sum(dim=(1, 2)).mean().item() == pytest.approx(1, rel=0.06)


def test_slope_and_interval_of_a_known_power_law():
    rng, x, covered = np.random.default_rng(0), 2.0 ** np.arange(6, 13), 0
    for _ in range(100):
        seeds = rng.lognormal(0, 0.3, (10, 1))  # one constant per seed, which hardly affects the slope
        values = seeds * x**-0.25 * rng.lognormal(0, 0.05, (10, 7))
        slope, low, high = fit_slope(values, x)
        assert slope == pytest.approx(-0.25, abs=0.03)
        covered += low <= -0.25 <= high
    assert 88 <= covered <= 99  # 95, three standard deviations below and two above
    assert fit_slope(3 * np.tile(x**-0.25, (4, 1)), x) == pytest.approx((-0.25, -0.25, -0.25))


def test_measuring_resumes_where_it_stopped(tmp_path):
    path = tmp_path / "norms.csv"
    first, second = Cell("log, Gaussian noise", 3, 2, "1/4, 1/4", 8), Cell("cos, rank-one noise", 3, 2, "SGD", 8)
    broken = Cell("no such problem", 3, 2, "SGD", 8)
    with pytest.raises(KeyError):
        measure([first, broken], path, run, max_workers=1)
    assert len(pd.read_csv(path)) == SEEDS
    kept = pd.read_csv(path)
    kept["nuclear"] = 7.0  # measured again, it would be another number
    kept.to_csv(path, index=False)
    table = measure([first, second, first], path, run)
    assert (table["nuclear"][:SEEDS] == 7).all()
    assert list(table[list(Cell._fields)].drop_duplicates().itertuples(index=False, name=None)) == [first, second]
    assert len(table) == 2 * SEEDS
    pd.testing.assert_frame_equal(measure([first, second], path, run), table, rtol=1e-6)
