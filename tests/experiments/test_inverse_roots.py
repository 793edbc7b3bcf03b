"""The errors of all solvers on matrices of every kind, relative to the bound of a backward stable solver."""

import numpy as np
import pytest

from experiments.inverse_roots import KINDS, judge, survey
from shampoo.roots import SOLVERS

MULTIPLE = {"auto": 1, "eigh": 1, "qr": 1, "newton": 10}  # of the bound


def test_newton_keeps_iterating_while_small_eigenvalues_grow():
    """They stay far from 1 until the largest ones have converged, and some entries grow in the meantime."""
    draw = np.random.default_rng(0)
    for d in range(2, 30):
        found = judge(KINDS["repeated eigenvalues"](draw, d), p=1 / 8, eps=1e-10, solver="newton")
        assert found["error"] <= MULTIPLE["newton"] * found["bound"]


@pytest.mark.slow
def test_roots_of_matrices_of_every_kind_are_within_their_bounds():
    """Check 300 of the 10,000 matrices of `experiments/inverse_roots.py`, up to dimension 128."""
    found = survey(300, seed=1, solvers=list(SOLVERS), largest=128)
    assert not found["broken"].any()
    assert not found["rescued"].any()
    bounded = found[found["bound"] <= 0.1]
    assert len(bounded) > 300
    assert (bounded["error"] <= bounded["solver"].map(MULTIPLE) * bounded["bound"]).all()
