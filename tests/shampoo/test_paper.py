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


def gradient_sequences(m, n, steps):
    """Return sequences (steps, m, n) that try to move weights far: heavy tails, rank one, one direction, reversals, bursts."""
    noise = torch.randn(steps, m, n, dtype=torch.float64)
    scales = 10.0 ** torch.randint(-3, 4, (steps, 1, 1), dtype=torch.float64)
    u, v = torch.randn(steps, m, 1, dtype=torch.float64), torch.randn(steps, 1, n, dtype=torch.float64)
    constant = noise[:1].expand(steps, m, n)
    return {
        "heavy tails": noise / torch.rand(steps, 1, 1, dtype=torch.float64) * scales,
        "rank one": u * v * scales,
        "constant": constant,
        "constant, rank one": (u * v)[:1].expand(steps, m, n),
        "growing": constant * 1.02 ** torch.arange(steps).view(-1, 1, 1),
        "reversals": constant * torch.arange(steps).div(40).floor().mul(torch.pi).cos().view(-1, 1, 1),
        "bursts": torch.where(torch.arange(steps).view(-1, 1, 1) % 30 == 0, 1e3 * constant, 1e-3 * noise),
    }


def run_from_zero(make_optimizer, gradients):
    """Return the weights after each step from zero, of the shape of the gradients."""
    W = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer, weights = make_optimizer([W]), []
    for G in gradients:
        W.grad = G.clone()
        optimizer.step()
        weights.append(W.detach().clone())
    return torch.stack(weights)


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("exponents", EXPONENTS.values(), ids=list(EXPONENTS))
@pytest.mark.parametrize(("lr", "weight_decay"), [(0.1, 0.5), (0.01, 100.0)])
def test_decay_keeps_the_operator_norm_of_weights_below_its_inverse(exponents, lr, weight_decay, bias_correction):
    # X <- (1 - lr lambda) X - lr D with ||D||_op <= 1 for 1/p + 1/q = 1/2, theta = beta: from X = 0 on, ||X||_op <= 1 / lambda.
    options = {"weight_decay": weight_decay, "bias_correction": bias_correction, "eps": 1e-9, "relative_eps": False}
    for name, gradients in gradient_sequences(4, 6, 150).items():
        weights = run_from_zero(lambda params: paper_optimizer(params, 0.9, 0.9, exponents, lr=lr, **options), gradients)
        norms = weight_decay * torch.linalg.matrix_norm(weights, 2)
        assert norms.max() <= 1 + 1e-6, name
        if name == "constant":  # the bound is attained
            assert norms[-1].item() == pytest.approx(1 - (1 - lr * weight_decay) ** 150, rel=0.02)


@pytest.mark.parametrize(("exponents", "scale"), [((0.5, 0.5), 0.1), ((1.0, 0.0), 0.1), ((0.125, 0.125), 10.0)])
def test_decay_does_not_bound_weights_for_other_sums(exponents, scale):
    # The direction of a constant gradient of operator norm a tends to one of operator norm a^(1 - 2 (1/p + 1/q)) at least.
    G = torch.randn(4, 4, dtype=torch.float64)
    G *= scale / torch.linalg.matrix_norm(G, 2)
    options = {"weight_decay": 1.0, "eps": 1e-12, "relative_eps": False}
    weights = run_from_zero(lambda params: paper_optimizer(params, 0.9, 0.9, exponents, lr=0.1, **options), G.expand(150, 4, 4))
    assert torch.linalg.matrix_norm(weights[-1], 2) >= 0.99 * scale ** (1 - 2 * sum(exponents)) > 3


def test_decay_of_adamw_bounds_entries_and_not_the_operator_norm():
    for gradients in gradient_sequences(4, 6, 150).values():
        weights = run_from_zero(lambda params: torch.optim.AdamW(params, 0.1, (0.9, 0.9), 1e-12, weight_decay=2.0), gradients)
        assert 2 * weights.abs().max() <= 1 + 1e-6
    rank_one = torch.ones(
        150, 4, 6, dtype=torch.float64
    )  # every entry reaches 1 / lambda, so that the norm is sqrt(m n) / lambda
    weights = run_from_zero(lambda params: torch.optim.AdamW(params, 0.1, (0.9, 0.9), 1e-12, weight_decay=2.0), rank_one)
    assert 2 * torch.linalg.matrix_norm(weights[-1], 2).item() == pytest.approx(math.sqrt(24), rel=0.01)


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
