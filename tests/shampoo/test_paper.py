"""Assumptions and claims of the analysis of AdamW-style Shampoo (arXiv 2601.07326), with the paper's settings."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shampoo import AdamWShampoo
from shampoo.preconditioner import contract
from shampoo.roots import inverse_root

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
    """Return the direction of one step from gradient G: minus the new W, at lr 1 and from W = 0."""
    W.data.zero_()
    W.grad = G.clone()
    optimizer.step()
    return -W.detach().clone()


def nuclear_norm(X):
    return torch.linalg.matrix_norm(X, "nuc")


@settings(max_examples=60)
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
    product = (G * contract(G, roots)).sum()
    trace_L, trace_R = (torch.linalg.eigvalsh(A).sqrt().sum() for A in (L, R))
    assert nuclear_norm(G[0]) ** 2 <= product * trace_L ** (2 * inverse_p) * trace_R ** (2 * inverse_q) * (1 + 1e-9)


@settings(max_examples=40)
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
    G = torch.randn(4, 6, dtype=torch.float64)  # a constant gradient is the worst case
    norms = [torch.linalg.matrix_norm(direction(optimizer, W, G), 2).item() for _ in range(400)]
    assert max(norms) <= 1 + 1e-6
    assert norms[-1] == pytest.approx(1, abs=0.02)  # the bound is attained


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


@pytest.mark.slow
@pytest.mark.parametrize("exponents", [(0.25, 0.25), (0.5, 0.0), (0.5, 0.5)])
def test_mean_nuclear_norm_decreases_with_the_horizon(exponents):
    """Minimize the sum of log(1 + (A X - B)^2) with Gaussian noise, 1 - theta = 1 - beta = K^(-1/2), eta = 1 / sqrt(K (m + n)).

    In theory log(mean nuclear norm) has slope -1/4 over log K as K grows; for K from 64 to 1024 it is less steep.
    """
    m, n, seeds = 8, 6, 10
    A, B = torch.randn(seeds, m, m), torch.randn(seeds, m, n)
    horizons, means = [64, 256, 1024], []
    for K in horizons:
        generator = torch.Generator().manual_seed(K)
        X = [torch.nn.Parameter(torch.zeros(m, n)) for _ in range(seeds)]  # all seeds form one stack of blocks
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
