"""Every solver against float64 on matrices of every kind: `python -m experiments.inverse_roots --count=10000`.

Sizes are log-uniform from 1 to 512, eps from 1e-12 to 1e-2, powers 1/8 to 1. For each solver and kind: how many roots were
not finite, not symmetric or not positive (to 1e-5 of their norm), and how many needed rescue. Where the bound max(1e-5, 4e-7
p / ratio) is below 0.1, with ratio = (eps + smallest) / largest eigenvalue: the largest Frobenius error relative to float64
over that bound, and how many are beyond it. Elsewhere, where no float32 root need be near: how many there are, and median and
90th percentile of the backward error ||X^(-1/p) - (A + eps I)||_F / ||A + eps I||_F.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from absl import app, flags
from tqdm import tqdm

from shampoo.roots import SOLVERS, inverse_root

FLAGS = flags.FLAGS

Array = np.ndarray[Any, Any]
Draw = np.random.Generator
LARGEST = 512
POWERS = (1 / 8, 1 / 6, 1 / 4, 1 / 2, 1.0)


def gram(draw: Draw, d: int, rank: int) -> Array:
    """An average of `rank` outer products."""
    G = draw.standard_normal((d, rank))
    return G @ G.T / rank


def turned(draw: Draw, eigenvalues: Array) -> Array:
    """A matrix of these eigenvalues in a random basis."""
    Q = np.linalg.qr(draw.standard_normal((len(eigenvalues),) * 2)).Q
    return (Q * eigenvalues) @ Q.T


def blocks(draw: Draw, d: int) -> Array:
    """Two blocks on the diagonal, of other scales."""
    A, half = np.zeros((d, d)), (d + 1) // 2
    A[:half, :half] = gram(draw, half, 2 * half)
    A[half:, half:] = 1e-4 * gram(draw, d - half, d) if d > half else 0
    return A


def graded(draw: Draw, d: int) -> Array:
    """Rows and columns from 1e-15 to 1e15, entries from 1e-30 to 1e30."""
    scale = 10.0 ** np.linspace(-15, 15, d)
    return scale[:, None] * (gram(draw, d, 4 * d) + np.eye(d)) * scale


def huge(draw: Draw, d: int) -> Array:
    """One entry, and its mirror image, of 1e20."""
    A, (i, j) = gram(draw, d, 2 * d), draw.integers(d, size=2)
    A[i, j] = A[j, i] = 1e20
    return A


KINDS: dict[str, Callable[[Draw, int], Array]] = {
    "random": lambda draw, d: gram(draw, d, 2 * d),
    "rank-deficient": lambda draw, d: gram(draw, d, max(1, d // 3)),
    "zero": lambda draw, d: np.zeros((d, d)),
    "repeated eigenvalues": lambda draw, d: turned(draw, draw.choice([1.0, 1e-2, 1e-5], d)),
    "diagonal": lambda draw, d: np.diag(10 ** draw.uniform(-8, 4, d)),
    "block-diagonal": blocks,
    "graded": graded,
    "condition 1e16": lambda draw, d: turned(draw, np.logspace(0, -16, d)),
    "asymmetric by rounding": lambda draw, d: gram(draw, d, 2 * d) + 1e-7 * draw.standard_normal((d, d)),
    "negative by rounding": lambda draw, d: gram(draw, d, max(1, d // 3)) - 1e-7 * np.eye(d),
    "one huge entry": huge,
    "large or small": lambda draw, d: 10 ** draw.uniform(-30, 30) * gram(draw, d, 2 * d),
}


def judge(A: Array, p: float, eps: float, solver: str, multiple: float = 1.0) -> dict[str, Any]:
    """One root against float64."""
    single = torch.tensor(A, dtype=torch.float32)[None]
    roots, rescued = inverse_root(single, 1.0, p, eps, torch.zeros_like(single), torch.zeros_like(single), solver=solver)
    X = roots[0].double().numpy()
    lam, Q = np.linalg.eigh(single[0].double().numpy())
    lam = lam - min(lam[0], 0) + eps
    exact, bound = (Q * lam**-p) @ Q.T, multiple * max(1e-5, 4e-7 * p * lam[-1] / lam[0])
    found: dict[str, Any] = {"rescued": bool(rescued), "bound": bound, "broken": True, "error": np.inf, "backward": np.nan}
    if not np.isfinite(X).all():
        return found
    norm, own = np.linalg.norm(X), np.linalg.eigvalsh((X + X.T) / 2)
    found["broken"] = bool(np.linalg.norm(X - X.T) > 1e-5 * norm or own[0] < -1e-5 * norm)
    found["error"] = float(np.linalg.norm(X - exact) / np.linalg.norm(exact))
    if bound > 0.1:
        with np.errstate(over="ignore"):
            mu, U = np.linalg.eigh((X + X.T) / 2)
            back = (U * np.maximum(mu, 1e-38) ** (-1 / p)) @ U.T
            found["backward"] = float(np.linalg.norm((back - (Q * lam) @ Q.T) / np.linalg.norm(lam)))
    return found


def survey(count: int, seed: int, solvers: list[str], largest: int = LARGEST) -> pd.DataFrame:
    """A row for each matrix and solver; kinds take turns."""
    draw, rows, kinds = np.random.default_rng(seed), [], list(KINDS)
    for i in tqdm(range(count), unit="matrix", disable=None):
        kind, d = kinds[i % len(kinds)], int(np.exp(draw.uniform(0, np.log(largest + 1))))
        A, p, eps = KINDS[kind](draw, d), float(draw.choice(POWERS)), float(10 ** draw.uniform(-12, -2))
        rows += [{"solver": name, "kind": kind, "size": d, "p": p, **judge(A, p, eps, name)} for name in solvers]
    return pd.DataFrame(rows)


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """The table for each solver and kind."""
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
    flags.DEFINE_integer("count", 10_000, "of matrices", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of the matrices")
    flags.DEFINE_multi_enum("solver", list(SOLVERS), list(SOLVERS), "which")
    flags.DEFINE_integer("threads", 2, "of the CPU", lower_bound=1)
    app.run(main)
