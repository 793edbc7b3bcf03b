"""Every solver compared with float64, and what happens when a solver fails."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from experiments.step_time import Watch
from shampoo import AdamWShampoo, roots
from shampoo.roots import SOLVERS, Solver, inverse_root, minimax, polar_express


def root(A, p, eps, Q=None, **options):
    """Return the roots of matrices on which no solver fails."""
    X, rescued = inverse_root(A, 1.0, p, eps, torch.zeros_like(A), Q, **options)
    assert not rescued
    return X


def exact(A, p, eps):
    lam, Q = np.linalg.eigh(A)
    return (Q * (np.maximum(lam, 0) + eps) ** -p) @ Q.T


def relative(ours, expected):
    return np.linalg.norm(ours - expected) / np.linalg.norm(expected)


# The multiple of ||A||_F that `newton` adds to eps moves a root by at most 40 times the bound of a backward stable solver.
MULTIPLE = {"auto": 1, "eigh": 1, "qr": 1, "newton": 40}


@pytest.mark.parametrize("p", [0.125, 0.25, 0.5, 1.0])
@pytest.mark.parametrize(("rank", "dim"), [(1, 1), (5, 5), (3, 8), (40, 40), (0, 6)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_solver_agrees_with_float64(solver, rank, dim, p, device):
    rng, eps = np.random.default_rng(dim), 1e-3
    G = rng.standard_normal((7, dim, rank)).astype(np.float32)
    A = torch.tensor(G @ G.swapaxes(1, 2), device=device)
    X = root(A, p, eps, torch.zeros_like(A), solver=solver)
    assert X.shape == A.shape
    assert X.dtype == A.dtype
    for ours, matrix in zip(X.cpu().numpy(), A.cpu().double().numpy()):
        expected = exact(matrix, p, eps)
        ratio = eps / max(np.linalg.eigvalsh(matrix)[-1], eps)
        assert relative(ours, expected) <= MULTIPLE[solver] * max(1e-5, 4e-7 * p / ratio)
        assert np.linalg.norm(ours - ours.T) <= 1e-5 * np.linalg.norm(ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_root_of_a_zero_matrix_with_relative_eps_is_that_of_eps(solver, dtype):
    """It is the identity times eps^(-p), also beside a matrix that is not zero."""
    A = torch.stack([torch.zeros(3, 3), torch.eye(3)]).to(dtype)
    X = root(A, 0.5, 1e-4, torch.zeros_like(A), solver=solver, relative_eps=True)
    expected = torch.stack([100 * torch.eye(3), (1 + 3e-4) ** -0.5 * torch.eye(3)]).to(dtype)
    truncated = 25 * torch.finfo(dtype).eps if solver == "newton" else 0.0  # the error of its polynomials
    torch.testing.assert_close(X, expected, rtol=1e-6 + truncated, atol=0)


@pytest.mark.parametrize("solver", ["eigh", "qr"])
def test_a_diagonal_matrix_is_solved_elementwise(solver):
    diagonal = torch.tensor([0.0, 1e-12, 1e-6, 1.0, 1e6])
    A = torch.diag(diagonal)[None]
    X = root(A, 0.25, 1e-8, torch.zeros_like(A), solver=solver)
    torch.testing.assert_close(X[0], torch.diag((diagonal + 1e-8) ** -0.25), rtol=1e-5, atol=0)


def test_a_failed_basis_is_reset():
    A = 2 * torch.eye(3)[None]
    Q = torch.full_like(A, torch.nan)
    torch.testing.assert_close(root(A, 0.5, 1e-8, Q, solver="qr"), 2**-0.5 * torch.eye(3)[None])
    assert not Q.any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("tolerance", "error"), [(0.1, 0.1), (0.3, 0.4)])
def test_a_basis_follows_a_changing_factor(tolerance, error, seed):
    """Average with decay 0.9 gradients whose covariance rotates slowly, and take a root every 10 steps."""
    draw = torch.Generator().manual_seed(seed)
    scales, turn = torch.logspace(0, -2, 24), torch.randn(24, 24, generator=draw)
    A, Q, errors = torch.zeros(2, 24, 24), torch.zeros(2, 24, 24), []
    for t in range(1, 201):
        G = torch.linalg.matrix_exp(0.002 * t * (turn - turn.mT)) @ (scales[:, None] * torch.randn(2, 24, 24, generator=draw))
        A = 0.9 * A + 0.1 * G @ G.mT
        if t % 10 == 0:
            X = root(A, 0.25, 1e-8, Q, solver="qr", qr_tolerance=tolerance)
            errors += [relative(x, exact(a, 0.25, 1e-8)) for x, a in zip(X.numpy(), A.double().numpy())]
            torch.testing.assert_close(Q.mT @ Q, torch.eye(24).expand(2, 24, 24), rtol=0, atol=1e-5)
    assert max(errors) < error


def test_only_a_basis_that_does_not_fit_is_updated():
    lam = torch.logspace(0, -3, 16)
    bases = torch.linalg.qr(torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))).Q
    A = (bases * lam) @ bases.mT
    Q = bases.clone()
    Q[1] = torch.eye(16)
    root(A, 0.25, 1e-8, Q, solver="qr")
    assert torch.equal(Q[0], bases[0])
    assert not torch.equal(Q[1], torch.eye(16))


@pytest.mark.parametrize("solver", SOLVERS)
def test_roots_have_full_precision_whatever_the_matmul_setting(solver, device):
    G = torch.randn(3, 64, 64, device=device, generator=torch.Generator(device).manual_seed(0))
    A = G @ G.mT / 64
    full = root(A, 0.25, 1e-3, torch.zeros_like(A), solver=solver)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(root(A, 0.25, 1e-3, torch.zeros_like(A), solver=solver), full)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="needs torch 2.9")
def test_roots_have_full_precision_whatever_is_set_per_backend(device):
    """Then, torch refuses to tell the setting of all backends."""
    G = torch.randn(3, 64, 64, device=device, generator=torch.Generator(device).manual_seed(0))
    A, matmuls = G @ G.mT / 64, (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    full = root(A, 0.25, 1e-3, solver="newton")
    matmuls[0].fp32_precision, matmuls[1].fp32_precision = "tf32", "bf16"
    try:
        assert torch.equal(root(A, 0.25, 1e-3, solver="newton"), full)
        assert [each.fp32_precision for each in matmuls] == ["tf32", "bf16"]
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("p", [0.25, 0.5])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_root_of_a_matrix_near_the_largest_number_is_not_zero(solver, p):
    A = 1e38 * torch.eye(16)[None]
    torch.testing.assert_close(root(A, p, 1e-8, torch.zeros_like(A), solver=solver) * 1e38**p, torch.eye(16)[None])


def test_newton_needs_exponents_that_are_inverse_integers():
    with pytest.raises(ValueError, match=r"solver 'newton' needs exponents 0, 1, 1/2, ..., 1/64; here they are \(0.3, 0.3\)"):
        AdamWShampoo([torch.zeros(3, 4)], solver="newton", exponents=0.3, block_size=3)


def test_negative_eigenvalues_are_shifted_to_zero():
    A = torch.diag(torch.tensor([-0.5, 0.0, 2.0]))[None]
    torch.testing.assert_close(root(A, 0.5, 1e-2)[0].diagonal(), (torch.tensor([0.0, 0.5, 2.5]) + 1e-2) ** -0.5)


@pytest.mark.parametrize("silent", [False, True], ids=["raises", "returns NaN"])
def test_only_a_matrix_that_fails_falls_back(monkeypatch, silent):
    """The solver fails on matrix 1 in float32 and on matrix 2 in any precision; matrices 0 and 3 are unaffected."""

    def fails(A, s, p, eps, Q=None):
        entry = (s * A[:, 0])[:, 0]
        failing = (entry == 3) | ((entry == 2) & (A.dtype == torch.float32))
        if failing.any() and not silent:
            raise torch.linalg.LinAlgError("did not converge")
        return torch.where(failing[:, None, None], torch.nan, eigh(A, s, p, eps))

    eigh = roots.eigh
    monkeypatch.setattr(roots, "eigh", fails)
    monkeypatch.setitem(SOLVERS, "fails", Solver(fails))
    A = torch.stack([d * torch.eye(3) for d in (1.0, 2.0, 3.0, 4.0)])
    previous = torch.full_like(A, 7.0)
    X, rescued = inverse_root(A, 1.0, 0.5, 1e-8, previous, solver="fails")
    assert rescued == {1: "computed in float64", 2: "kept as they were"}
    for i, expected in enumerate([torch.eye(3), 2**-0.5 * torch.eye(3), previous[2], 0.5 * torch.eye(3)]):
        torch.testing.assert_close(X[i], expected)


@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
@pytest.mark.parametrize("fails", [False, True], ids=["solver", "solver after a failure"])
def test_a_solver_runs_with_full_precision_and_the_setting_is_restored(monkeypatch, fails, allowed):
    seen = []

    def solve(A, s, p, eps, Q=None):
        seen.append(torch.get_float32_matmul_precision())
        if fails and len(seen) == 1:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(A, s, p, eps)

    eigh = roots.eigh
    monkeypatch.setattr(roots, "eigh", solve)  # what rescues a matrix
    monkeypatch.setitem(SOLVERS, "recorded", Solver(solve))
    A = 2 * torch.eye(3)[None]
    torch.set_float32_matmul_precision(allowed)
    try:
        root(A, 0.5, 1e-8, solver="recorded")
        assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["highest"] * (1 + fails)


@pytest.mark.parametrize("exponents", [(1e-30,), (0.5, 1e-320), (1 / 65,), (0.3,)])
def test_newton_has_only_roots_whose_inverse_is_an_integer_up_to_64(exponents):
    with pytest.raises(ValueError, match=r"solver 'newton' needs exponents 0, 1, 1/2, ..., 1/64; here they are"):
        SOLVERS["newton"].check(exponents)
    SOLVERS["newton"].check((0.0, 1.0, 0.5, 1 / 3, 1 / 64))


def test_newton_of_the_smallest_exponent_agrees_with_float64():
    A = torch.diag(torch.tensor([1e-3, 1.0, 50.0]))[None]
    X = root(A, 1 / 64, 1e-3, solver="newton")
    assert relative(X[0].numpy(), exact(A[0].double().numpy(), 1 / 64, 1e-3)) < 1e-4


@pytest.mark.parametrize("p", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("eps", [1e-12, 1e-30, 1e-37])
def test_a_root_is_finite_however_small_eps_is(eps, p):
    for A in (torch.zeros(2, 3, 3), torch.eye(3).repeat(2, 1, 1) * 1e-30, torch.ones(2, 3, 3)):
        X, causes = inverse_root(A, 1.0, p, eps, torch.zeros_like(A))
        assert X.isfinite().all()
        assert set(causes.values()) <= {"replaced by the identity", "computed in float64"}


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_newton_converges_although_rounding_makes_eigenvalues_negative(p):
    """Without a shift by the rounding error of A, the iteration diverges where eps is smaller."""
    G = torch.randn(4, 24, 3, generator=torch.Generator().manual_seed(0))
    A = G @ G.mT
    A /= A.abs().amax(dim=(1, 2), keepdim=True)
    assert torch.linalg.eigvalsh(A).min() < 0
    X = SOLVERS["newton"].solve(A, torch.ones(4, 1), p, torch.full((4, 1), 1e-30))
    assert X.isfinite().all()
    for x, matrix in zip(X.double().numpy(), A.double().numpy()):
        shift = 2 * torch.finfo(torch.float32).eps * np.linalg.norm(matrix)
        assert relative(x, exact(matrix, p, shift)) < 0.2


@pytest.mark.parametrize(("low", "high"), [(0.002, 1.0), (0.02, 1.5), (0.3, 1.7), (0.8, 1.2), (0.9, 1.1)])
def test_a_polynomial_of_polar_express_has_the_smallest_error(low, high):
    """Linear programming finds no smaller error on a grid."""
    x = np.linspace(low, high, 2001)
    powers, ones = np.stack([x, x**3, x**5], axis=1), np.ones((len(x), 1))
    above, below = np.hstack([powers, -ones]), np.hstack([-powers, -ones])  # |p(x) - 1| <= E
    bounds = [(None, None)] * 3 + [(0, None)]
    best = linprog([0, 0, 0, 1], np.vstack([above, below]), np.concatenate([ones, -ones]), bounds=bounds)
    coefficients, error = minimax(low, high)
    assert np.abs(powers @ coefficients - 1).max() <= error * (1 + 1e-9)
    assert error <= best.fun * 1.001


@pytest.mark.parametrize(("low", "high"), [(0.9801, 1.0), (0.99, 1.0099), (0.9999, 1.0), (1.0, 1.0)])
def test_near_1_a_polynomial_of_polar_express_has_at_most_the_error_that_it_promises(low, high):
    x = np.linspace(low, high, 2001)
    (a, b, c), error = minimax(low, high)
    assert np.abs(a * x + b * x**3 + c * x**5 - 1).max() <= error + 1e-15


@pytest.mark.parametrize("low", [1.0, 0.5, 2.0**-6, 2.0**-8, 2.0**-12])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-5, 1e-13])
def test_polynomials_of_polar_express_map_their_interval_close_to_1(low, tolerance):
    y = np.geomspace(low, 1, 5000)
    for a, b, c in polar_express(low, tolerance):
        y = a * y + b * y**3 + c * y**5
    assert np.abs(y - 1).max() <= tolerance + 1e-15


@pytest.mark.parametrize(("eps", "products"), [(1e-4, 17), (1e-5, 21)])
def test_a_square_root_takes_few_products(eps, products):
    """Five and six polynomials: one product in the first, and four in each other one."""
    lam = torch.logspace(0, -6, 64)
    Q = torch.linalg.qr(torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))).Q
    A = (Q * lam) @ Q.mT
    with Watch() as watched:
        X = root(A, 0.5, eps, solver="newton", relative_eps=True)
    assert len(watched.products) == products
    for ours, matrix in zip(X.numpy(), A.double().numpy()):
        assert relative(ours, exact(matrix, 0.5, eps * np.trace(matrix))) < 2e-4


def nearly_of_rank_one(d):
    """Return factors whose small eigenvalues are those that rounding leaves."""
    draw = torch.Generator().manual_seed(d)
    random = torch.randn(4, d, generator=draw)
    vectors = [torch.ones(1, d), 0.8 * torch.ones(1, d), random, random.sign()]
    G = torch.cat(vectors).unsqueeze(1)
    averaged = torch.zeros(len(G), d, d)
    for _ in range(100):
        averaged.baddbmm_(G.mT, G, beta=0.98, alpha=0.02)
    return torch.cat([G.mT @ G, averaged])


@pytest.mark.parametrize("d", [2, 16, 128])
@pytest.mark.parametrize("eps", [1e-4, 1e-5])
def test_newton_takes_products_only_where_auto_chooses_it(d, eps, monkeypatch):
    """Also if all small eigenvalues are rounding errors: no root comes from eigenvectors, and errors are of their size."""
    A = nearly_of_rank_one(d)
    monkeypatch.delattr(roots, "eigh")
    X = root(A, 0.5, eps, solver="newton", relative_eps=True)
    for ours, matrix in zip(X.numpy(), A.double().numpy()):
        assert relative(ours, exact(matrix, 0.5, eps * np.trace(matrix))) < 2e-7 * d**0.5 / eps


def indefinite():
    """Return a matrix with one eigenvalue of -8 machine epsilons."""
    lam = torch.logspace(0, -12, 16).double()
    lam[-1] = -8 * 2**-23
    Q = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).double()).Q
    A = (Q * lam) @ Q.mT
    return ((A + A.mT) / 2).float()[None]


@pytest.mark.parametrize("eps", [1e-6, 3e-7, 1e-7])
def test_newton_takes_eigenvectors_where_rounding_exceeds_eps(eps):
    """The polynomials make negative eigenvalues grow without bound; a root of positive ones is at most (eps trace)^(-1/2)."""
    equal = torch.linspace(0.5, 1, 12)[:, None, None] * torch.ones(256, 256)
    for A, most in ((equal, 1.5), (indefinite(), 3)):
        X = root(A, 0.5, eps, solver="newton", relative_eps=True)
        limit = (eps * A.diagonal(dim1=1, dim2=2).sum(dim=1)).rsqrt()
        assert (torch.linalg.matrix_norm(X, 2) <= most * limit).all()


def test_newton_raises_a_tiny_eps_alike_for_products_and_eigenvectors():
    """Of equal matrices but for their scale, some roots take eigenvectors; all of them are about as large."""
    scales = torch.linspace(1, 1.2, 40)
    A = scales[:, None, None] * torch.ones(64, 64)
    largest = torch.linalg.matrix_norm(root(A, 0.5, 1e-10, solver="newton"), 2) * scales.sqrt()
    assert largest.max() < 2 * largest.min()


def test_newton_is_as_accurate_as_its_polynomials():
    """For the smallest eigenvalue that a relative eps allows, too."""
    A = torch.zeros(2, 16, 16)
    A[0, 3, 3] = 1
    for eps in (1e-3, 1e-4, 1e-5):
        X = root(A, 0.5, eps, solver="newton", relative_eps=True)[0]
        expected = torch.full((16,), eps).index_fill(0, torch.tensor(3), 1 + eps) ** -0.5
        torch.testing.assert_close(X, expected.diag(), rtol=5e-6, atol=0)


def test_newton_needs_no_positive_trace():
    """Where denormal numbers are zero, so are the scales of a zero matrix."""
    torch.set_flush_denormal(True)
    try:
        X, _ = inverse_root(torch.zeros(1, 4, 4), 1e-8, 0.5, 1e-4, torch.zeros(1, 4, 4), relative_eps=True, solver="newton")
    finally:
        torch.set_flush_denormal(False)
    assert X.isfinite().all()
