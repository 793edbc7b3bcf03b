"""What the paper's analysis of AdamW-style Shampoo (arXiv 2601.07326) rests on and claims, with the paper's settings."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.convergence import CELL, PROBLEMS, SEEDS, draw_data, fit_slope, gradient, loss, measure
from shampoo import AdamWShampoo
from shampoo.roots import inverse_root
from shampoo.update import precondition

EXPONENTS = {"two-sided": (0.25, 0.25), "left": (0.5, 0.0), "right": (0.0, 0.5), "uneven": (0.125, 0.375)}


def paper_optimizer(params, theta, beta, exponents, lr=1.0, **options):
    settings = {
        "grafting": "none",
        "bias_correction": False,
        "precondition_frequency": 1,
        "merge_dims": False,
        "eps": 1e-30,
    } | options
    return AdamWShampoo(params, lr, betas=(theta, beta), exponents=exponents, **settings)


def direction(optimizer, W, G):
    """The direction of one step from gradient G: what is subtracted from W at lr 1, W being set to zero first."""
    W.data.zero_()
    W.grad = G.clone()
    optimizer.step()
    return -W.detach().clone()


def nuclear_norm(X):
    return torch.linalg.matrix_norm(X, "nuc")


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 8),
    n=st.integers(1, 8),
    inverse_p=st.floats(0.0, 0.5),
    seed=st.integers(0, 2**31),
)
def test_nuclear_norm_is_bounded_by_the_preconditioned_product(m, n, inverse_p, seed):
    # ||G||_*^2 <= <G, L^(-1/p) G R^(-1/q)> (tr L^(1/2))^(2/p) (tr R^(1/2))^(2/q), L and R positive definite, 1/p + 1/q = 1/2.
    generator = torch.Generator().manual_seed(seed)
    G, X, Y = (torch.randn(1, a, b, generator=generator, dtype=torch.float64) for a, b in ((m, n), (m, m), (n, n)))
    L, R = X @ X.mT + 1e-3 * torch.eye(m), Y @ Y.mT + 1e-3 * torch.eye(n)
    inverse_q = 0.5 - inverse_p
    roots = [inverse_root(A, 1.0, e, 1e-30, A)[0] if e else None for A, e in ((L, inverse_p), (R, inverse_q))]
    product = (G * precondition(G, roots)).sum()
    trace_L, trace_R = (torch.linalg.eigvalsh(A).sqrt().sum() for A in (L, R))
    assert nuclear_norm(G[0]) ** 2 <= product * trace_L ** (2 * inverse_p) * trace_R ** (2 * inverse_q) * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 7),
    n=st.integers(1, 7),
    theta=st.floats(0.0, 0.95),
    excess=st.floats(0.05, 1.0),
    exponents=st.sampled_from(list(EXPONENTS.values())),
    seed=st.integers(0, 2**31),
)
def test_operator_norm_of_the_direction_is_bounded(m, n, theta, excess, exponents, seed):
    # At most c_k, c_k^2 = ((1 - theta)^2 / (1 - beta)) sum_{j < k} (theta^2 / beta)^j, for theta^2 < beta and fresh roots.
    beta = theta**2 + excess * (0.99 - theta**2)
    rng = np.random.default_rng(seed)
    W = torch.nn.Parameter(torch.zeros(m, n, dtype=torch.float64))
    optimizer = paper_optimizer([W], theta, beta, exponents, eps=1e-12)
    for k in range(1, 9):
        P = direction(optimizer, W, torch.tensor(rng.standard_normal((m, n)) * 10 ** rng.uniform(-2, 2)))
        c2 = (1 - theta) ** 2 / (1 - beta) * sum((theta**2 / beta) ** j for j in range(k))
        assert torch.linalg.matrix_norm(P, 2) <= math.sqrt(c2) * (1 + 1e-6)


@pytest.mark.parametrize("theta", [0.5, 0.9, 0.99])
def test_operator_norm_is_at_most_one_where_both_decays_are_equal(theta):
    W = torch.nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    optimizer = paper_optimizer([W], theta, theta, (0.25, 0.25), eps=1e-12)
    G = torch.randn(4, 6, dtype=torch.float64)  # the same gradient always is the worst case
    norms = [torch.linalg.matrix_norm(direction(optimizer, W, G), 2).item() for _ in range(400)]
    assert max(norms) <= 1 + 1e-6
    assert norms[-1] == pytest.approx(1, abs=0.02)  # and it is reached


@pytest.mark.parametrize("exponents", [*EXPONENTS.values(), (0.5, 0.5), (0.1, 0.1), (0.0, 0.0)])
@pytest.mark.parametrize("scale", [1e-3, 10.0])
def test_scaling_gradients_scales_the_direction(exponents, scale):
    # By scale^(1 - 2 (1/p + 1/q)): only exponents that sum to 1/2 are scale-free.
    gradients = torch.randn(5, 4, 4, dtype=torch.float64)

    def last_direction(factor):
        W = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
        optimizer = paper_optimizer([W], 0.9, 0.95, exponents)
        return [direction(optimizer, W, factor * G) for G in gradients][-1]

    torch.testing.assert_close(
        last_direction(scale), scale ** (1 - 2 * sum(exponents)) * last_direction(1.0), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("exponents", [(0.25, 0.25), (0.5, 0.0), (0.5, 0.5)])
def test_mean_nuclear_norm_falls_with_the_horizon(exponents):
    """Sum of log(1 + (A X - B)^2) with Gaussian noise, 1 - theta = 1 - beta = K^(-1/2), eta = 1 / sqrt(K (m + n)).

    The theory's slope of log(mean nuclear norm) over log K is -1/4 as K grows; over K = 64 ... 1024 it is less steep.
    """
    m, n, seeds = 8, 6, 10
    A, B = torch.randn(seeds, m, m), torch.randn(seeds, m, n)
    horizons, means = [64, 256, 1024], []
    for K in horizons:
        generator = torch.Generator().manual_seed(K)
        X = [torch.nn.Parameter(torch.zeros(m, n)) for _ in range(seeds)]  # all seeds are blocks of one stack
        decay = 1 - K**-0.5
        optimizer = paper_optimizer(X, decay, decay, exponents, lr=(K * (m + n)) ** -0.5, eps=1e-8)
        total = 0.0
        for _ in range(K):
            stacked = torch.stack([x.detach() for x in X])
            E = A @ stacked - B
            gradient = A.mT @ (2 * E / (1 + E**2))
            total += nuclear_norm(gradient).mean().item()
            noisy = gradient + torch.randn(seeds, m, n, generator=generator)
            for x, g in zip(X, noisy):
                x.grad = g
            optimizer.step()
        means.append(total / K)
    assert np.polyfit(np.log(horizons), np.log(means), 1)[0] < -0.1


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=list(PROBLEMS))
@pytest.mark.parametrize(("m", "n"), [(5, 3), (2, 6)])
def test_problems_have_the_gradients_and_the_smoothness_that_they_state(problem, m, n):
    A, B = (x.double() for x in draw_data(m, n))
    d = (m * n) ** -0.5
    # Pairs of points near and far; the nearest are where phi is most curved, A X = B.
    X = torch.linalg.solve(A, B) + torch.tensor([0, 0.01, 0.1, 1, 10]).repeat(2).view(-1, 1, 1) * d * torch.randn(SEEDS, m, n)
    Y = X + 10.0 ** torch.randint(-3, 2, (SEEDS, 1, 1)) * d * torch.randn(SEEDS, m, n)
    X.requires_grad_()
    (expected,) = torch.autograd.grad(loss(problem, A, B, X).sum(), X)
    torch.testing.assert_close(gradient(problem, A, B, X), expected, rtol=1e-10, atol=1e-12)
    difference = torch.linalg.matrix_norm(expected - gradient(problem, A, B, Y))
    assert (difference <= problem.smoothness * torch.linalg.matrix_norm(X - Y) * (1 + 1e-9)).all()
    e = torch.linspace(-9, 9, 1801, dtype=torch.float64, requires_grad=True)  # L is the largest curvature, not just a bound
    (slope,) = torch.autograd.grad(problem.phi(e).sum(), e, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), e)
    assert curvature.abs().max().item() == pytest.approx(problem.smoothness, rel=1e-6)
    assert curvature.min() < 0  # not convex
    assert problem.phi(torch.zeros(1)) == 0
    assert (problem.phi(e) >= 0).all()


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=list(PROBLEMS))
def test_noise_has_mean_zero_and_the_variance_that_is_stated(problem):
    generator = torch.Generator().manual_seed(0)
    noise = torch.cat([problem.noise(5, 3, generator) for _ in range(1000)])
    assert torch.linalg.vector_norm(noise.mean(dim=0)).item() < 0.03  # 0.01 is expected
    assert noise.square().sum(dim=(1, 2)).mean().item() == pytest.approx(1, rel=0.06)


def test_slope_and_interval_of_a_known_power_law():
    rng, x, covered = np.random.default_rng(0), 2.0 ** np.arange(6, 13), 0
    for _ in range(100):
        seeds = rng.lognormal(0, 0.3, (10, 1))  # a seed's constant: moves no slope much
        values = seeds * x**-0.25 * rng.lognormal(0, 0.05, (10, 7))
        slope, low, high = fit_slope(values, x)
        assert slope == pytest.approx(-0.25, abs=0.03)
        covered += low <= -0.25 <= high
    assert 84 <= covered < 100  # an interval of ten seeds is a little short; one that always covers says nothing
    assert fit_slope(3 * np.tile(x**-0.25, (4, 1)), x) == pytest.approx((-0.25, -0.25, -0.25))


def test_measuring_goes_on_where_it_stopped(tmp_path):
    path, runs = tmp_path / "norms.csv", []

    def run(*cell):
        runs.append(cell)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return pd.DataFrame({"seed": range(SEEDS), "nuclear": len(runs) + np.arange(SEEDS) / 7})

    wanted = [("log", 8, 8, "1/4, 1/4", 64), ("log", 8, 8, "SGD", 64), ("cos", 8, 4, "SGD", 128)]
    with pytest.raises(KeyboardInterrupt):
        measure(wanted[:2], path, run)
    table = measure(wanted, path, run)
    assert runs == [wanted[0], wanted[1], wanted[1], wanted[2]]
    assert list(table[CELL].drop_duplicates().itertuples(index=False, name=None)) == wanted
    assert len(table) == 3 * SEEDS
    pd.testing.assert_frame_equal(measure(wanted, path, run), table, rtol=1e-6)
    assert len(runs) == 4
