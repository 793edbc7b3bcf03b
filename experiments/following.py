"""Measure roots that follow their factors from one refresh to the next: `python -m experiments.following`; three minutes.

Train a workload with `submission.py` at the first point of `tuning_search_space_2026.json`, with a refresh every 5 steps. Let
A be a factor at one refresh, plus eps tr(A) I, Q its eigenvectors, and X = A^(-1/2), all exact, and A' the factor at the next.
Approximate A'^(-1/2) in float64 in these ways, which take this many products (p) and QR decompositions (q):

    stale          X itself
    Newton         X + E, where E solves E X^(-1) + X^(-1) E = I - X A' X, one Newton step for X A' X = I; 6 p
    warm start     the symmetric part of (X A' X)^(-1/2) X, the first factor by the iteration of solver "newton"
    first order    Q (diag f(b) + D o (B - diag b)) Q^T for B = Q^T A' Q, b = diag B, f(x) = x^(-1/2), and the divided
                   differences D_ij = (f(b_i) - f(b_j)) / (b_i - b_j); 4 p
    turned         the same, after one step of orthogonal iteration, Q <- qr(A' Q), from its own last basis; 5 p + q. Where
                   the correction is more than half of the root in some direction, basis and root come from `eigh`
    qr             the optimizer's solver "qr", from its own last basis
    anew           the optimizer's solver "newton", which starts anew, in float32
    eigh           the optimizer's solver "eigh", in float32

Columns are quantiles of the relative Frobenius error over all factors of order at least 16 and all refreshes from the second
on, the share of errors of at most 0.1, the mean and the largest number of products of the ways that iterate, and the share of
bases from `eigh` in the first ten refreshes and later. The last table is the price: seconds of an eigendecomposition, a QR and
a Cholesky decomposition, and of "newton", over those of a product, in float32.
"""

import collections
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from absl import app, flags
from torch import Tensor

from runner.loop import Settings, run_trial
from runner.workloads import WORKLOADS, load_workload
from shampoo.roots import SOLVERS, newton_schulz

from .step_time import Watch

import submission  # isort: skip  # after the runner, which makes its import of algoperf work

FLAGS = flags.FLAGS

POINT = json.loads((Path(submission.__file__).parent / "tuning_search_space_2026.json").read_text())[0]
SMALLEST = 16  # order of factors
EARLY = 10  # refreshes
ORDERS = (64, 128, 256, 512, 1024)


def record(name: str, steps: int) -> list[list[Tensor]]:
    """Train, and return the factors of each stack, (N, d, d), at each refresh."""
    found: dict[int, list[Tensor]] = collections.defaultdict(list)

    def update_params(**arguments: Any) -> Any:
        """Take the submission's step, and keep the factors if it refreshed the roots."""
        result = submission.update_params(**arguments)
        if (arguments["global_step"] + 1) % POINT["precondition_frequency"] == 0:
            buckets = arguments["optimizer_state"]["optimizer"]._buckets
            kept = [A for bucket in buckets for each in bucket.preconditioners for A in each.factors if A is not None]
            for i, A in enumerate(kept):
                found[i].append(A.double())
        return result

    watched: Any = SimpleNamespace(**{**vars(submission), "update_params": update_params})
    workload = load_workload(name)
    workload.max_allowed_runtime_sec = float("inf")
    with tempfile.TemporaryDirectory() as folder:
        run_trial(
            workload,
            watched,
            collections.namedtuple("Hyperparameters", POINT)(**POINT),
            rng_seed=1,
            folder=Path(folder),
            settings=Settings(batch_size=workload.default_batch_size, max_global_steps=steps, eval_every_steps=steps),
            progress=lambda *_: None,
        )
    return [stacks for stacks in found.values() if stacks[0].shape[-1] >= SMALLEST]


def shift(A: Tensor) -> Tensor:
    """Return A / tr(A) + eps I: the scale of a factor does not matter here."""
    trace, eps = A.diagonal(dim1=1, dim2=2).sum(dim=1).view(-1, 1, 1), float(POINT["epsilon"])
    return A / trace + eps * torch.eye(A.shape[-1], dtype=A.dtype)


def decompose(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the eigenvalues of A, in descending order, its eigenvectors, and A^(-1/2)."""
    lam, Q = (x.flip(-1) for x in torch.linalg.eigh(A))
    return lam, Q, (Q * lam.rsqrt().unsqueeze(1)) @ Q.mT


def first_order(A: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """Return A^(-1/2) to first order in the off-diagonal part of Q^T A Q, and whether it can be relied on (B,).

    With s = sqrt(b), D_ij = -1 / (s_i s_j (s_i + s_j)). The root is Z (I + K) Z^T for Z = Q diag(b^(-1/4)); it can be relied on
    if no eigenvalue of K is below -1/2.
    """
    B = Q.mT @ A @ Q
    s = B.diagonal(dim1=1, dim2=2).sqrt()
    K = -B / ((s.unsqueeze(2) * s.unsqueeze(1)).sqrt() * (s.unsqueeze(2) + s.unsqueeze(1)))
    K.diagonal(dim1=1, dim2=2).zero_()
    Z, eye = Q * s.rsqrt().unsqueeze(1), torch.eye(A.shape[-1], dtype=A.dtype)
    return Z @ (eye + K) @ Z.mT, torch.linalg.cholesky_ex(eye + 2 * K).info == 0


def newton_step(A: Tensor, lam: Tensor, Q: Tensor, X: Tensor) -> Tensor:
    """Return X + E for the X with eigenvalues lam^(-1/2) and eigenvectors Q."""
    residual = Q.mT @ (torch.eye(A.shape[-1], dtype=A.dtype) - X @ A @ X) @ Q
    y = lam.sqrt()
    return X + Q @ (residual / (y.unsqueeze(2) + y.unsqueeze(1))) @ Q.mT


def warm_start(A: Tensor, X: Tensor) -> Tensor:
    """Return the symmetric part of (X A X)^(-1/2) X, in float32.

    The extreme eigenvalues of X A X, which the iteration needs, are taken as known.
    """
    M = X @ A @ X
    lam = torch.linalg.eigvalsh(M)
    low, high = lam[:, :1, None], lam[:, -1:, None]
    root, _ = newton_schulz((M / high).float(), max(1e-6, float((low / high).amin())))
    Y: Tensor = root @ (X / high.sqrt()).float()
    return (Y + Y.mT) / 2


def solve(name: str, A: Tensor) -> Tensor:
    """Return A^(-1/2) of a shifted A by one of the optimizer's solvers, in float32."""
    one, B = torch.ones(len(A), 1), A.float()
    eps = float(POINT["epsilon"]) * one
    B.diagonal(dim1=1, dim2=2).sub_(eps)
    return SOLVERS[name].solve(B, one, 0.5, eps)


def errors(stacks: list[Tensor]) -> pd.DataFrame:
    """Return one row per way, factor, and refresh."""
    rows, norm = [], torch.linalg.matrix_norm
    factors = [shift(A) for A in stacks]
    lam, Q, X = decompose(factors[0])
    turned, solver = Q.clone(), Q.clone()
    for k, A in enumerate(factors[1:], start=1):
        new_lam, new_Q, root = decompose(A)
        found = {"stale": X, "Newton": newton_step(A, lam, Q, X), "first order": first_order(A, Q)[0]}
        turned = torch.linalg.qr(A @ turned).Q
        found["turned"], reliable = first_order(A, turned)
        turned[~reliable], found["turned"][~reliable] = new_Q[~reliable], root[~reliable]
        one = torch.ones_like(lam[:, :1])
        found["qr"] = SOLVERS["qr"].solve(A, one, 0.5, 0 * one, solver)
        counts = {}
        with Watch() as counts["warm start"]:
            found["warm start"] = warm_start(A, X)
        with Watch() as counts["anew"]:
            found["anew"] = solve("newton", A)
        found["eigh"] = solve("eigh", A)
        rows += [
            pd.DataFrame(
                {
                    "way": way,
                    "early": k < EARLY,
                    "error": norm(Y - root) / norm(root),
                    "eigh": ~reliable,
                    "products": len(counts[way].products) if way in counts else None,
                }
            )
            for way, Y in found.items()
        ]
        lam, Q, X = new_lam, new_Q, root
    return pd.concat(rows)


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Return one row per way."""
    by_way = found.groupby("way", sort=False)["error"]
    table = pd.DataFrame({"median": by_way.median(), "nine tenths": by_way.quantile(0.9), "most": by_way.max()})
    table["at most 0.1"] = by_way.agg(lambda x: (x <= 0.1).mean())
    table[["products", "most products"]] = found.groupby("way", sort=False)["products"].agg(["mean", "max"])
    own = found[found["way"] == "turned"].groupby("early")["eigh"].mean()
    table.loc["turned", ["from eigh, early", "late"]] = own.get(True), own.get(False)
    return table


def seconds(function: Callable[[], Any], repeats: int = 7) -> float:
    """Return the median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def prices() -> pd.DataFrame:
    """Return one row per order, of stacks with at least 2^20 elements."""
    rows = {}
    for d in ORDERS:
        G = torch.randn(max(1, 2**20 // d**2), d, 2 * d)
        A = shift(G @ G.mT)
        product = seconds(lambda A=A: A @ A)  # type: ignore[misc]  # mypy infers no type for the default
        ways: dict[str, Callable[[Tensor], Any]] = {
            "eigh": torch.linalg.eigh,
            "QR": torch.linalg.qr,
            "Cholesky": torch.linalg.cholesky,
            "newton": partial(solve, "newton"),
        }
        rows[d] = {name: seconds(lambda A=A, way=way: way(A)) / product for name, way in ways.items()}  # type: ignore[misc]
    return pd.DataFrame(rows).T.rename_axis("order")


def main(_: Any) -> None:
    """Print the tables."""
    torch.set_num_threads(FLAGS.threads)
    for name in FLAGS.workload:
        found = summary(pd.concat(map(errors, record(name, FLAGS.steps))))
        print(f"\n{name}, {FLAGS.steps} steps\n\n{found.to_markdown(floatfmt='.2g')}", flush=True)
    print(f"\nover a product, {FLAGS.threads} threads\n\n{prices().to_markdown(floatfmt='.1f')}")


if __name__ == "__main__":
    flags.DEFINE_multi_enum("workload", ["mnist_vit", "pydoc_lm"], list(WORKLOADS), "workloads to train")
    flags.DEFINE_integer("steps", 300, "training steps", lower_bound=20)
    flags.DEFINE_integer("threads", 2, "number of CPU threads", lower_bound=1)
    app.run(main)
