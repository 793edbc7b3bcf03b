"""Compare every solver with float64 on many kinds of matrices: `python -m experiments.inverse_roots --count=10000`.

Sizes are log-uniform from 1 to 512, eps is log-uniform from 1e-12 to 1e-2, powers p range from 1/8 to 1. The error bound of a
root X is max(1e-5, 4e-7 p / r), where r is the ratio of the smallest to the largest eigenvalue of A + eps I. If it exceeds 0.1,
no float32 root can be expected to be accurate, and the table has the backward error ||X^(-1/p) - (A + eps I)||_F /
||A + eps I||_F instead. Columns, for each solver and kind of matrix:

    broken                  number of roots that are not finite, not symmetric, or not positive (to 1e-5 of their norm)
    rescued                 number of roots that needed a fallback
    error over bound        largest relative Frobenius error of a root over its bound, where the bound is at most 0.1
    beyond bound            number of these roots whose error exceeds the bound
    unbounded               number of matrices whose bound exceeds 0.1
    backward median         median of their backward errors
    backward nine tenths    90th percentile of their backward errors
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from absl import app, flags
from numpy.typing import NDArray
from tqdm import tqdm

from shampoo.roots import SOLVERS, inverse_root

FLAGS = flags.FLAGS

Array = NDArray[np.float64]
Rng = np.random.Generator
LARGEST = 512
POWERS = (1 / 8, 1 / 6, 1 / 4, 1 / 2, 1.0)


def gram(rng: Rng, d: int, rank: int) -> Array:
    """Return the average of `rank` outer products of Gaussian vectors, shape (d, d)."""
    G = rng.standard_normal((d, rank))
    return G @ G.T / rank


def in_random_basis(rng: Rng, eigenvalues: Array) -> Array:
    """Return a symmetric matrix with these eigenvalues in a random basis."""
    Q: Array = np.linalg.qr(rng.standard_normal((len(eigenvalues),) * 2)).Q
    return (Q * eigenvalues) @ Q.T


def blocks(rng: Rng, d: int) -> Array:
    """Return a block-diagonal matrix of two blocks, the second one 1e-4 times smaller."""
    A, half = np.zeros((d, d)), (d + 1) // 2
    A[:half, :half] = gram(rng, half, 2 * half)
    A[half:, half:] = 1e-4 * gram(rng, d - half, d) if d > half else 0
    return A


def graded(rng: Rng, d: int) -> Array:
    """Return a matrix with rows and columns scaled by 1e-15 to 1e15, so that entries range from 1e-30 to 1e30."""
    scale = 10.0 ** np.linspace(-15, 15, d)
    return scale[:, None] * (gram(rng, d, 4 * d) + np.eye(d)) * scale


def huge(rng: Rng, d: int) -> Array:
    """Return a matrix with one entry and its transpose set to 1e20."""
    A, (i, j) = gram(rng, d, 2 * d), rng.integers(d, size=2)
    A[i, j] = A[j, i] = 1e20
    return A


KINDS: dict[str, Callable[[Rng, int], Array]] = {
    "random": lambda rng, d: gram(rng, d, 2 * d),
    "rank-deficient": lambda rng, d: gram(rng, d, max(1, d // 3)),
    "zero": lambda rng, d: np.zeros((d, d)),
    "repeated eigenvalues": lambda rng, d: in_random_basis(rng, rng.choice([1.0, 1e-2, 1e-5], d)),
    "diagonal": lambda rng, d: np.diag(10 ** rng.uniform(-8, 4, d)),
    "block-diagonal": blocks,
    "graded": graded,
    "condition 1e16": lambda rng, d: in_random_basis(rng, np.logspace(0, -16, d)),
    "asymmetric by rounding": lambda rng, d: gram(rng, d, 2 * d) + 1e-7 * rng.standard_normal((d, d)),
    "negative by rounding": lambda rng, d: gram(rng, d, max(1, d // 3)) - 1e-7 * np.eye(d),
    "one huge entry": huge,
    "large or small": lambda rng, d: 10 ** rng.uniform(-30, 30) * gram(rng, d, 2 * d),
}


def judge(A: Array, p: float, eps: float, solver: str, multiple: float = 1.0) -> dict[str, Any]:
    """Compare one root with float64. Return whether it was rescued, whether it is broken, its relative error, its error bound
    times `multiple`, and, if that exceeds 0.1, its backward error.
    """
    single = torch.tensor(A, dtype=torch.float32)[None]
    roots, rescued = inverse_root(single, 1.0, p, eps, torch.zeros_like(single), torch.zeros_like(single), solver=solver)
    X = roots[0].double().numpy()
    lam, Q = np.linalg.eigh(single[0].double().numpy())
    lam = lam - min(lam[0], 0) + eps
    exact, bound = (Q * lam**-p) @ Q.T, multiple * max(1e-5, 4e-7 * p * lam[-1] / lam[0])
    found: dict[str, Any] = {"rescued": bool(rescued), "bound": bound, "broken": True, "error": np.inf, "backward": np.nan}
    if not np.isfinite(X).all():
        return found
    norm, smallest = np.linalg.norm(X), np.linalg.eigvalsh((X + X.T) / 2)[0]
    found["broken"] = bool(np.linalg.norm(X - X.T) > 1e-5 * norm or smallest < -1e-5 * norm)
    found["error"] = float(np.linalg.norm(X - exact) / np.linalg.norm(exact))
    if bound > 0.1:
        with np.errstate(over="ignore"):
            mu, U = np.linalg.eigh((X + X.T) / 2)
            recovered = (U * np.maximum(mu, 1e-38) ** (-1 / p)) @ U.T
            found["backward"] = float(np.linalg.norm((recovered - (Q * lam) @ Q.T) / np.linalg.norm(lam)))
    return found


def survey(count: int, seed: int, solvers: list[str], largest: int = LARGEST) -> pd.DataFrame:
    """Return one row per matrix and solver, cycling through the kinds of matrices."""
    rng, rows, kinds = np.random.default_rng(seed), [], list(KINDS)
    for i in tqdm(range(count), unit="matrix", disable=None):
        kind, d = kinds[i % len(kinds)], int(np.exp(rng.uniform(0, np.log(largest + 1))))
        A, p, eps = KINDS[kind](rng, d), float(rng.choice(POWERS)), float(10 ** rng.uniform(-12, -2))
        rows += [{"solver": name, "kind": kind, "size": d, "p": p, **judge(A, p, eps, name)} for name in solvers]
    return pd.DataFrame(rows)


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Return the table, one row per solver and kind of matrix."""
    bounded = found["bound"] <= 0.1
    found = found.assign(over=(found["error"] / found["bound"]).where(bounded), unbounded=~bounded)
    table = found.groupby(["solver", "kind"], sort=False).agg(
        count=("kind", "size"),
        broken=("broken", "sum"),
        rescued=("rescued", "sum"),
        error_over_bound=("over", "max"),
        beyond_bound=("over", lambda x: (x > 1).sum()),
        unbounded=("unbounded", "sum"),
        backward_median=("backward", "median"),
        backward_nine_tenths=("backward", lambda x: x.quantile(0.9)),
    )
    return table.rename(columns=lambda name: name.replace("_", " "))


def main(_: Any) -> None:
    """Print the table."""
    torch.set_num_threads(FLAGS.threads)
    print(summary(survey(FLAGS.count, FLAGS.seed, FLAGS.solver)).to_string(float_format="{:.2g}".format))


if __name__ == "__main__":
    flags.DEFINE_integer("count", 10_000, "number of matrices", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "seed of the matrices")
    flags.DEFINE_multi_enum("solver", list(SOLVERS), list(SOLVERS), "solvers to test")
    flags.DEFINE_integer("threads", 2, "number of CPU threads", lower_bound=1)
    app.run(main)
