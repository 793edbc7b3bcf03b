"""Measure roots that follow their factors from one refresh to the next: `python -m experiments.following`; three minutes.

Train a workload with `submission.py` at the first point of `tuning_search_space_2026.json`, with a refresh every 5 steps. Let
A be a factor at one refresh, plus eps tr(A) I, Q its eigenvectors, and X = A^(-1/2), all exact, and A' the factor at the next.
Approximate A'^(-1/2) in these ways, the first three in float64, the solver in float32:

    stale            X itself
    Newton           X + E, where E solves E X^(-1) + X^(-1) E = I - X A' X, one Newton step for X A' X = I
    first order      Q (diag f(b) + D o (B - diag b)) Q^T for B = Q^T A' Q, b = diag B, f(x) = x^(-1/2), and the divided
                     differences D of f; see `roots.root_in_basis`
    qr, TOLERANCE    the optimizer's solver "qr", from its own last basis

Columns are quantiles of the relative Frobenius error over all factors of order at least 16 and all refreshes from the second
on, the number of roots that are not finite, the share of errors of at most 0.1, and the share of bases that the solver took
from `eigh` in the first ten refreshes and later. The last table is the price: seconds of decompositions over those of a
product, in float32.

--drifting=N takes N made sequences of 20 factors instead: A <- 0.9 A + 0.1 C, where C is drawn anew from a kind of
`experiments.inverse_roots`, another one halfway. Of these, errors are of roots whose bound there is at most 0.1.
"""

import collections
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from absl import app, flags
from torch import Tensor

from runner.loop import Settings, run_trial
from runner.workloads import WORKLOADS, load_workload
from shampoo import roots

from .inverse_roots import KINDS

import submission  # isort: skip  # after the runner, which makes its import of algoperf work

FLAGS = flags.FLAGS

POINT = json.loads((Path(submission.__file__).parent / "tuning_search_space_2026.json").read_text())[0]
SMALLEST = 16  # order of factors
EARLY = 10  # refreshes
TOLERANCES = (0.0, 0.1, 0.3)
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
                found[i].append(A.clone())
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


def drift(seed: int, length: int = 20) -> list[Tensor]:
    """Return a made sequence of factors (1, d, d), d from 16 to 128."""
    rng = np.random.default_rng(seed)
    d, kinds = int(rng.integers(SMALLEST, 129)), [KINDS[name] for name in rng.choice(list(KINDS), 2)]
    A, found = kinds[0](rng, d), []
    for k in range(length):
        A = 0.9 * A + 0.1 * kinds[2 * k // length](rng, d)
        found.append(torch.tensor(A, dtype=torch.float32).unsqueeze(0))
    return found


def trace(A: Tensor) -> Tensor:
    """Return the trace of each matrix, (N, 1, 1), or 1 where it is 0."""
    found = A.diagonal(dim1=1, dim2=2).sum(dim=1).view(-1, 1, 1)
    return found.where(found != 0, 1.0)


def shift(A: Tensor) -> Tensor:
    """Return A / tr(A) + eps I, the scale of a factor does not matter here, with negative eigenvalues shifted to 0 first."""
    A, eps = A / trace(A), float(POINT["epsilon"])
    least = torch.linalg.eigvalsh(A)[:, :1].clamp(max=0).unsqueeze(2)
    shifted: Tensor = A + (eps - least) * torch.eye(A.shape[-1], dtype=A.dtype)
    return shifted


def solve(A: Tensor, basis: Tensor, tolerance: float) -> tuple[Tensor, float]:
    """Return the roots of `shift` of float32 matrices from solver "qr", and the share of bases that came from `eigh`."""
    options: dict[str, Any] = {"relative_eps": True, "solver": "qr", "qr_tolerance": tolerance}
    with patch.object(roots, "descending_eigh", wraps=roots.descending_eigh) as eigh:
        X, _ = roots.inverse_root(A, 1.0, 0.5, POINT["epsilon"], torch.zeros_like(A), basis, **options)
    return X.double() * trace(A.double()).sqrt(), sum(len(call.args[0]) for call in eigh.call_args_list) / len(A)


def decompose(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the eigenvalues of A, in descending order, its eigenvectors, and A^(-1/2)."""
    lam, Q = (x.flip(-1) for x in torch.linalg.eigh(A))
    return lam, Q, (Q * lam.rsqrt().unsqueeze(1)) @ Q.mT


def newton_step(A: Tensor, lam: Tensor, Q: Tensor, X: Tensor) -> Tensor:
    """Return X + E for the X with eigenvalues lam^(-1/2) and eigenvectors Q."""
    residual = Q.mT @ (torch.eye(A.shape[-1], dtype=A.dtype) - X @ A @ X) @ Q
    y = lam.sqrt()
    return X + Q @ (residual / (y.unsqueeze(2) + y.unsqueeze(1))) @ Q.mT


def errors(stacks: list[Tensor]) -> pd.DataFrame:
    """Return one row per way, factor, and refresh, given the factors in float32."""
    rows, norm = [], torch.linalg.matrix_norm
    lam, Q, X = decompose(shift(stacks[0].double()))
    bases, one = {tolerance: torch.zeros_like(stacks[0]) for tolerance in TOLERANCES}, torch.ones_like(lam[:, :1])
    for k, factor in enumerate(stacks):
        solved = {f"qr, {tolerance}": solve(factor, basis, tolerance) for tolerance, basis in bases.items()}
        if k == 0:  # all from `eigh`
            continue
        A = shift(factor.double())
        first_order, _ = roots.root_in_basis(Q, A @ Q, one, 0.5, 0 * one)
        found = {"stale": X, "Newton": newton_step(A, lam, Q, X), "first order": first_order}
        lam, Q, X = decompose(A)
        bounded = 4e-7 * 0.5 * lam[:, 0] <= 0.1 * lam[:, -1]
        for way, Y in (found | {way: Y for way, (Y, _) in solved.items()}).items():
            share = solved[way][1] if way in solved else float("nan")
            finite = Y.flatten(1).isfinite().all(dim=1)
            columns = {"error": norm(Y - X) / norm(X), "finite": finite, "bounded": bounded, "eigh": share}
            rows.append(pd.DataFrame({"way": way, "early": k < EARLY, **columns}))
    return pd.concat(rows)


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Return one row per way."""
    by_way = found[found["bounded"]].groupby("way", sort=False)["error"]
    table = pd.DataFrame({"median": by_way.median(), "nine tenths": by_way.quantile(0.9), "most": by_way.max()})
    table["not finite"] = found.groupby("way")["finite"].agg(lambda x: (~x).sum())
    table["at most 0.1"] = by_way.agg(lambda x: (x <= 0.1).mean())
    shares = found.groupby(["way", "early"])["eigh"].mean().unstack()
    return table.assign(**{"from eigh, early": shares[True], "late": shares[False]})


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
        A = G @ G.mT / (2 * d)
        product = seconds(lambda A=A: A @ A)  # type: ignore[misc]  # mypy infers no type for the default
        ways = {"eigh": torch.linalg.eigh, "QR": torch.linalg.qr, "Cholesky": torch.linalg.cholesky}
        rows[d] = {name: seconds(lambda A=A, way=way: way(A)) / product for name, way in ways.items()}  # type: ignore[misc]
    return pd.DataFrame(rows).T.rename_axis("order")


def main(_: Any) -> None:
    """Print the tables."""
    torch.set_num_threads(FLAGS.threads)
    if FLAGS.drifting:
        found = summary(pd.concat([errors(drift(seed)) for seed in range(FLAGS.drifting)]))
        print(f"{FLAGS.drifting} made sequences\n\n{found.to_markdown(floatfmt='.2g')}")
        return
    for name in FLAGS.workload:
        found = summary(pd.concat(map(errors, record(name, FLAGS.steps))))
        print(f"\n{name}, {FLAGS.steps} steps\n\n{found.to_markdown(floatfmt='.2g')}", flush=True)
    print(f"\nover a product, {FLAGS.threads} threads\n\n{prices().to_markdown(floatfmt='.1f')}")


if __name__ == "__main__":
    flags.DEFINE_multi_enum("workload", ["mnist_vit", "pydoc_lm"], list(WORKLOADS), "workloads to train")
    flags.DEFINE_integer("steps", 300, "training steps", lower_bound=20)
    flags.DEFINE_integer("drifting", 0, "number of made sequences to use instead", lower_bound=0)
    flags.DEFINE_integer("threads", 2, "number of CPU threads", lower_bound=1)
    app.run(main)
