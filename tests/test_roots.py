"""Every solver of the table against float64, and what happens when one fails."""

import numpy as np
import pytest
import torch

from shampoo import roots
from shampoo.roots import SOLVERS, inverse_root


def exact(A, p, eps):
    lam, Q = np.linalg.eigh(A)
    return (Q * (np.maximum(lam, 0) + eps) ** -p) @ Q.T


@pytest.mark.parametrize("p", [0.125, 0.25, 0.5, 1.0])
@pytest.mark.parametrize(("rank", "dim"), [(1, 1), (5, 5), (3, 8), (40, 40), (0, 6)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_solver_agrees_with_float64(solver, rank, dim, p, device):
    rng, eps = np.random.default_rng(dim), 1e-3
    G = rng.standard_normal((7, dim, rank)).astype(np.float32)
    A = torch.tensor(G @ G.swapaxes(1, 2), device=device)
    X = SOLVERS[solver](A, p, eps)
    assert X.shape == A.shape
    assert X.dtype == A.dtype
    for ours, matrix in zip(X.cpu().numpy(), A.cpu().double().numpy()):
        expected = exact(matrix, p, eps)
        ratio = eps / max(np.linalg.eigvalsh(matrix)[-1], eps)
        assert np.linalg.norm(ours - expected) <= max(1e-5, 4e-7 * p / ratio) * np.linalg.norm(expected)
        assert np.linalg.norm(ours - ours.T) <= 1e-5 * np.linalg.norm(ours)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_diagonal_is_taken_elementwise(solver):
    diagonal = torch.tensor([0.0, 1e-12, 1e-6, 1.0, 1e6])
    X = SOLVERS[solver](torch.diag(diagonal)[None], 0.25, 1e-8)
    torch.testing.assert_close(X[0], torch.diag((diagonal + 1e-8) ** -0.25), rtol=1e-5, atol=0)


def test_negative_eigenvalues_are_shifted_to_zero():
    A = torch.diag(torch.tensor([-0.5, 0.0, 2.0]))[None]
    torch.testing.assert_close(roots.eigh(A, 0.5, 1e-2)[0].diagonal(), (torch.tensor([0.0, 0.5, 2.5]) + 1e-2) ** -0.5)


@pytest.mark.parametrize("silent", [False, True], ids=["raises", "returns NaN"])
def test_a_matrix_that_fails_alone_falls_back_alone(monkeypatch, silent):
    """The solver fails on matrix 1 in float32 and on matrix 2 in any precision; matrix 0 and 3 do not notice."""

    def fails(A, p, eps):
        failing = (A[:, 0, 0] == 3) | ((A[:, 0, 0] == 2) & (A.dtype == torch.float32))
        if failing.any() and not silent:
            raise torch.linalg.LinAlgError("did not converge")
        return torch.where(failing[:, None, None], torch.nan, roots.eigh(A, p, eps))

    monkeypatch.setitem(SOLVERS, "fails", fails)
    A = torch.stack([d * torch.eye(3) for d in (1.0, 2.0, 3.0, 4.0)])
    previous = torch.full_like(A, 7.0)
    X = inverse_root(A, 0.5, 1e-8, "fails", previous)
    for i, expected in enumerate([torch.eye(3), 2**-0.5 * torch.eye(3), previous[2], 0.5 * torch.eye(3)]):
        torch.testing.assert_close(X[i], expected)
