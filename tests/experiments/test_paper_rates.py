"""The experiments on the paper: their problems, the fit of slopes, and how they resume."""

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.paper import decay, horizons, problems, sums
from experiments.paper.horizons import Cell, expected_norms, noise_gradients, nuclear_norm, run
from experiments.paper.problems import (
    PROBLEMS,
    SEEDS,
    Problem,
    draw_data,
    fit_slope,
    gaussian,
    gradient,
    loss,
    measure,
    paper_shampoo,
    trajectory,
)


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


def test_copies_of_a_trajectory_have_their_own_step_sizes():
    problem, (A, B), scales = PROBLEMS["log, Gaussian noise"], draw_data(4, 3), torch.tensor([0.5, 3.0])
    chunks = trajectory(problem, A, B, 300, lambda X, _: paper_shampoo(X, 0.02, 300, exponents=0.25), scales)
    X, G = (torch.cat(parts) for parts in zip(*chunks))
    assert X.shape == G.shape == (300, 2, SEEDS, 4, 3)
    for i, lr in enumerate([0.01, 0.06]):
        chunks = trajectory(problem, A, B, 300, lambda params, _, lr=lr: paper_shampoo(params, lr, 300, exponents=0.25))
        alone = torch.cat([x for x, _ in chunks])
        torch.testing.assert_close(X[:, i], alone, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(G[:, i], gradient(problem, A, B, X[:, i]))
    assert X[0].abs().max() == 0


def test_expected_noise_is_that_of_sgd_on_a_quadratic():
    quadratic = Problem(lambda e: e**2, lambda e: 2 * e, 2.0, gaussian)
    A, B = draw_data(4, 3)
    A += 0.3 * torch.eye(4)  # slow directions take too long
    chunks = trajectory(quadratic, A, torch.zeros_like(B), 20_000, lambda X, _: torch.optim.SGD(X, 0.02))
    measured = nuclear_norm(torch.cat([G for _, G in chunks])[5000:]).mean(dim=0)
    expected = nuclear_norm(noise_gradients(A, 3, 2.0, 0.02, 5000)).mean(dim=0)
    torch.testing.assert_close(measured, expected, rtol=0.06, atol=0)


def test_expected_norms_are_close_to_measured_ones():
    expected = expected_norms(["SGD", "1/4, 1/4"], [256])
    for method, rows in expected.groupby("method"):
        measured = run("log, Gaussian noise", 8, 8, method, 256)["nuclear"]
        assert rows["nuclear"].mean() == pytest.approx(measured.mean(), rel=0.08)
        assert (rows["nuclear"] > rows[["way", "noise"]].max(axis=1)).all()


@pytest.mark.parametrize("sigma", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("exponents", [(0.25, 0.25), (0.5, 0.0), (0.0, 0.75), (0.5, 0.5), (0.0, 0.0)])
@pytest.mark.parametrize(("m", "n"), [(6, 6), (3, 9)])
def test_guessed_steps_move_as_far_as_those_of_sgd_in_white_noise(exponents, m, n, sigma):
    problem, K = sums.scale_noise(PROBLEMS["log, Gaussian noise"], sigma), 400
    flat = problem._replace(slope=torch.zeros_like)  # no gradient but noise
    lengths = []
    for pair in (exponents, (0.0, 0.0)):
        lr = sums.guess_step(problem, pair, m, n, K, sigma)
        chunks = trajectory(flat, *draw_data(m, n), K, lambda X, _, pair=pair, lr=lr: paper_shampoo(X, lr, K, exponents=pair))
        X = torch.cat([X for X, _ in chunks])[K // 2 :]
        lengths.append((X[1:] - X[:-1]).square().sum(dim=(-2, -1)).mean().sqrt().item())
    assert lengths[0] == pytest.approx(lengths[1], rel=0.25)
    assert lengths[1] == pytest.approx(lr * sigma * K**-0.25 / 2**0.5, rel=0.1)  # an average of about 2 sqrt(K) steps


def test_best_step_is_the_vertex_of_a_ladder_that_contains_it():
    calls, best = [], {0: 0.7, 1: 90.0}  # per seed; the guess is 1

    def norms(steps):
        calls.extend(steps)
        rows = [(step, seed, 2 * np.exp(np.log(step / b) ** 2)) for step in steps for seed, b in best.items()]
        return pd.DataFrame(rows, columns=["step", "seed", "nuclear"])

    ladder = sums.climb(norms, 1.0)
    assert sorted(calls) == sorted(set(calls)) == [2.0**i for i in range(-2, 9)]
    ladder = ladder.assign(**sums.Cell("a problem", 0.5, 0.5, 8, 8, 64, 1.0)._asdict())
    found = sums.best_steps(ladder).set_index("seed")
    assert found["step"].to_dict() == pytest.approx(best)
    assert found["nuclear"].to_dict() == pytest.approx({0: 2, 1: 2})


def test_gap_and_residual_at_known_points():
    m, n, c = 5, 3, 4.0
    none = torch.zeros(m, m), torch.zeros(n, n)
    G, X = torch.randn(20, m, n), torch.randn(20, m, n)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    at_optimum = decay.stationarity(-U @ Vh / c, G, c, none)  # of min <G, X> subject to ||X||_op <= 1 / c
    torch.testing.assert_close(at_optimum["nuclear"], torch.linalg.matrix_norm(G, "nuc"))
    for name in ("gap", "residual"):
        assert (at_optimum[name] <= 1e-4 * at_optimum["nuclear"]).all()
    X /= c * torch.linalg.matrix_norm(X, 2, keepdim=True)
    assert (decay.stationarity(X, G, c, none)["gap"] > 0).all()  # no other point of the ball has 0
    without = decay.stationarity(X, G, 0.0, none)
    assert all((without[name] == at_optimum["nuclear"]).all() for name in decay.MEASURES)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("size", [0.1, 3.0])
def test_residual_is_zero_where_decay_and_noisy_gradients_hold_weights(name, size):
    # With the same mean gradient everywhere, X tends to the point where lambda X balances the direction, with or without noise.
    m, n, K, c = 5, 4, 3000, 2.0
    problem, G = PROBLEMS[name], torch.randn(m, n)
    G *= size / torch.linalg.matrix_norm(G)
    same = problem._replace(noise=lambda m, n, generator: G + problem.noise(m, n, generator), slope=torch.zeros_like)
    chunks = trajectory(same, *draw_data(m, n), K, lambda X, _: paper_shampoo(X, 0.005, K, exponents=0.25, weight_decay=c))
    X = torch.cat([X for X, _ in chunks])[K // 2 :].mean(dim=(0, 1))
    found = decay.stationarity(X, G, c, decay.noise_moments(problem, m, n))
    assert found["residual"] < 0.15 * found["nuclear"]
    assert found["gap"] > 0.5 * found["nuclear"] if size < 1 else found["gap"] < 0.3 * found["nuclear"]


def test_step_sizes_of_the_theory_make_all_exponents_the_same_method_under_white_noise():
    """For m = n, directions are `gain` times M, so that gain times the step size is the same for all exponents."""
    m, K, L, gap = 6, 256, 2.0, 0.5
    steps = {name: problems.theory_rate(name, m, m, K, L, gap) for name in problems.METHODS}
    assert steps["1/4, 1/4"] == pytest.approx((gap / (L * K * 2 * m)) ** 0.5)
    pairs = {name: pair for name, pair in problems.METHODS.items() if pair}
    products = [problems.gain(pair, m, m) * steps[name] for name, pair in pairs.items()]
    assert products == pytest.approx([products[0]] * len(products))


def power_laws(slopes):
    """Return made norms of the first shape: one seed's norms are K^slope, times a constant of the seed's own."""
    draw = np.random.default_rng(0)
    scales = draw.lognormal(0, 1, SEEDS)
    wiggles = draw.lognormal(0, 0.1, (SEEDS, 4))
    return pd.DataFrame(
        {
            "problem": problem,
            "m": 8,
            "n": 8,
            "method": method,
            "K": K,
            "seed": seed,
            "nuclear": scales[seed] * wiggles[seed, i] * K**slope,
        }
        for problem in PROBLEMS
        for method, slope in slopes.items()
        for i, K in enumerate((64, 128, 256, 512))
        for seed in range(SEEDS)
    )


def test_slopes_minus_those_of_sgd_are_paired_by_seed():
    """What the seeds have in common cancels, and the interval has no width."""
    table = horizons.paired_table(power_laws({"SGD": -0.25, "1/4, 1/4": -0.3}))
    assert list(table["1/4, 1/4"]) == ["-0.050 (-0.050 to -0.050)"] * len(PROBLEMS)


def test_a_table_that_cannot_be_read_is_named_and_stays(tmp_path):
    path = tmp_path / "norms.csv"
    path.write_text("a,b\n1,2\n1,2,3\n")
    with pytest.raises(ValueError, match=r"norms.csv is no table: .*move it away"):
        measure([Cell("log, Gaussian noise", 3, 2, "SGD", 8)], path, run)
    assert path.read_text() == "a,b\n1,2\n1,2,3\n"


def test_the_order_of_measured_cells_does_not_matter():
    rows = [
        {"problem": "log", "sigma": 1.0, "decay": 0.0, "power": 0.0, "K": K, "seed": seed, "nuclear": K**-0.25}
        | {"gap": K**-0.25, "residual": K**-0.25, "largest": 1.0, "last": 1.0}
        for K in decay.HORIZONS
        for seed in range(SEEDS)
    ]
    expected = decay.decay_table(pd.DataFrame(rows))
    assert expected["slope of nuclear"].iloc[0].startswith("-0.250")
    pd.testing.assert_frame_equal(decay.decay_table(pd.DataFrame(rows[::-1])), expected)
