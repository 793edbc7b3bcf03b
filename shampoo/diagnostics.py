"""Compute metrics of the last step for each parameter, and log them to TensorBoard.

    before = weights(optimizer)
    optimizer.step()
    metrics = diagnostics(optimizer, before)  # before the next zero_grad()

Without calls, there is no cost. A call computes the singular values of each gradient and the eigendecomposition of each factor
in float64: it costs more than a refresh of all roots, and waits for the device.

The norm of an update needs the weights from before the step, since the optimizer does not keep its last direction. The update
includes decay, momentum, and rounding.
"""

from collections import defaultdict
from collections.abc import Sequence
from math import isfinite, log10, nan
from typing import Any

import torch
from torch import Tensor

from .copies import full_gradient, full_tensor
from .options import parameter_name
from .state import Bucket
from .update import bias_correction, factor_steps

Figures = dict[str, float]
Metrics = dict[str, Figures]  # by name of a parameter


def unwrap(optimizer: Any) -> Any:
    """Return the optimizer in wrappers that have it as `optimizer`, as those of accelerate and Lightning do."""
    return unwrap(optimizer.optimizer) if hasattr(optimizer, "optimizer") else optimizer


def weights(optimizer: Any) -> list[Tensor]:
    """Return a copy of each parameter, in the order of the optimizer's groups."""
    return [p.detach().clone() for p in unwrap(optimizer)._names()]


@torch.no_grad()
def diagnostics(optimizer: Any, before: Sequence[Tensor] | None = None) -> Metrics:
    """Return metrics of the last step for each parameter, by name, or by "parameter I of shape ..." with its index among all.

    These are `gradient_figures` if it has a gradient, `weight_figures`, and `factor_figures` if it has factors. The key
    "optimizer" has `steps`, the largest step count of the groups, which checkpoints restore, and `steps_skipped` and
    `roots_rescued` (see `health`), which count from the construction of the optimizer and are not in state_dicts.

    `before` is `weights(optimizer)` from before the step; without it, update metrics are left out. Raises ValueError if its
    shapes are not those of the parameters. On multiple ranks, each rank reports the parameters of which it owns a block, with
    factor metrics of its own blocks only. DTensors are gathered: with them, all ranks must call this.

    `optimizer` is an AdamWShampoo or a wrapper; see `unwrap`.
    """
    optimizer = unwrap(optimizer)
    params = list(optimizer._names())
    if before is not None and [W.shape for W in before] != [p.shape for p in params]:
        found, needed = [tuple(W.shape) for W in before], f"the optimizer's {len(params)} parameters from before the step"
        raise ValueError(f"before holds tensors of shapes {found}; it must be weights(optimizer), {needed}")
    earlier = dict(zip(params, before, strict=True)) if before is not None else {}
    figures: dict[Tensor, Figures] = {}
    for bucket in optimizer._buckets:
        of_factors = factor_figures(bucket)
        owned = {grid.param for grids in bucket.layout.grids for grid in grids}
        for i, (p, shape) in enumerate(zip(bucket.params, bucket.layout.shapes, strict=True)):
            G, W, W_before = full_gradient(p), full_tensor(p), full_tensor(earlier.get(p))
            if i in owned:
                figures[p] = gradient_figures(G, shape) | weight_figures(W, W_before) | of_factors.get(i, {})
    steps, skipped = max(group["step"] for group in optimizer.param_groups), optimizer.events["steps skipped"]
    rescued = sum(number for what, number in optimizer.events.items() if what.startswith("roots"))
    counts = {"steps": steps, "steps_skipped": skipped, "roots_rescued": rescued}
    given = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
    names = given or [parameter_name({"params": params}, i) for i in range(len(params))]
    return {"optimizer": counts} | {name: figures[p] for name, p in zip(names, params, strict=True) if p in figures}


def gradient_figures(G: Tensor | None, shape: tuple[int, ...]) -> Figures:
    """Return `||G||_F`, the nuclear norm `||G||_*`, and `nuclear_ratio`, or {} if G is None.

    nuclear_ratio is `||G||_* / (sqrt(min(m, n)) ||G||_F)`.

    G is viewed as an m x n matrix: m is the first dimension of its merged shape, and n is the product of the others. The ratio
    is 1 / sqrt(min(m, n)) for rank one and 1 for equal singular values; for a vector (m x 1) it is 1. According to arXiv
    2601.07326, Shampoo's rate is that of SGD if the ratio is Theta(1) and m and n are comparable.

    If G holds NaN, all three are NaN; if it holds Inf but no NaN, the norm is Inf and the others are NaN. If G is zero, the
    ratio is NaN.
    """
    if G is None:
        return {}
    matrix = G.double().reshape(shape[0], -1)
    norm = torch.linalg.vector_norm(matrix)
    nuclear = torch.linalg.svdvals(matrix).sum() if norm.isfinite() else norm * nan
    ratio = nuclear / (min(matrix.shape) ** 0.5 * norm)
    return {"gradient_norm": norm.item(), "gradient_nuclear_norm": nuclear.item(), "nuclear_ratio": ratio.item()}


def weight_figures(W: Tensor, before: Tensor | None) -> Figures:
    """Return weight_norm = ||W||_F and, given the weights before the step, two metrics of the update.

    They are update_norm = ||W - before||_F and update_ratio = ||W - before||_F / ||before||_F: Inf if all weights were zero
    before the step, NaN if they still are.
    """
    norm = torch.linalg.vector_norm
    found = {"weight_norm": norm(W.double()).item()}
    if before is not None:
        update = norm(W.double() - before.double())
        found |= {"update_norm": update.item(), "update_ratio": (update / norm(before.double())).item()}
    return found


def factor_figures(bucket: Bucket) -> dict[int, Figures]:
    """Return metrics of the factors that this rank owns, by index of the parameter in the bucket; {} before the first step.

    condition, effective_rank, and root_residual are the largest, smallest, and largest values of `spectrum` over the factors of
    the parameter's blocks. roots_missing is the fraction of roots that are zero (not computed yet) or the identity (the solver
    failed). With solver "qr", bases_fit is the fraction of factors whose basis a refresh would keep now. With preconditioner
    "soap", which has bases instead of roots, roots_missing counts bases, bases_fit is always there, and there is no
    root_residual.
    """
    group = bucket.group
    if group["step"] == 0:
        return {}
    found: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    eps, relative, every = group["eps"], group["relative_eps"], group["factor_frequency"]
    counted = [factor_steps(max(1, steps), every) for steps in bucket.steps]
    corrections = [bias_correction(group["betas"][1], t) if group["bias_correction"] else 1.0 for t in counted]
    for params, kept in zip(bucket.layout.params, bucket.preconditioners, strict=True):
        for p, *stacks in zip(kept.exponents, kept.factors, kept.inv_roots, kept.eigvecs, strict=True):
            blocks = ([None] * len(params) if S is None else S.double() for S in stacks)
            for param, A, X, Q in zip(params, *blocks, strict=True) if p else ():
                of_block = spectrum(A / corrections[param], X, p, eps, relative)
                figures = dict(zip(("condition", "effective_rank", "root_residual"), of_block, strict=True))
                own = Q if X is None else X  # zeros: not computed yet; the identity: the solver failed
                figures["roots_missing"] = not own.any() or torch.equal(own, torch.eye(len(own)).to(own))
                if X is None:
                    del figures["root_residual"]
                if Q is not None:
                    figures["bases_fit"] = basis_fits(A, Q, group["qr_tolerance"])
                for name, x in figures.items():
                    found[param][name].append(x)
    return {param: {name: summary(name, values) for name, values in rows.items()} for param, rows in found.items()}


def summary(name: str, values: Sequence[float]) -> float:
    """Return the smallest, the mean, or the largest value, as `factor_figures` says for this metric; NaN if there is one."""
    how = {"effective_rank": "min", "roots_missing": "mean", "bases_fit": "mean"}.get(name, "max")
    return float(getattr(torch.tensor(values, dtype=torch.float64), how)())


def spectrum(A: Tensor, X: Tensor | None, p: float, eps: float, relative_eps: bool) -> tuple[float, float, float]:
    """Return three metrics of a bias-corrected factor A and the root X that the step used, both d x d in float64.

    Let S = A + eps I (A + eps tr(A) I with relative_eps), with A's eigenvalues shifted as in `roots.eigen_power`:

    - the condition number of S;
    - the effective rank exp(-sum_i a_i log a_i), where a = A's eigenvalues over their sum: 1 for rank one, d if all are equal;
    - the residual ||S^(p/2) X S^(p/2) - I||_F / sqrt(d), which has no upper bound: 0 for X = S^(-p), 1 for X = 0 or
      X = 2 S^(-p). It grows with the staleness of X and the solver's error. NaN without X.

    All are NaN if A is not finite; the effective rank is also NaN if A is zero.
    """
    if not A.isfinite().all():
        return nan, nan, nan
    lam, Q = torch.linalg.eigh(A)
    lam = lam - lam[0].clamp(max=0)  # as the solvers do
    shifted = lam + (eps * lam.sum() if relative_eps and lam.any() else eps)
    half, eye = (Q * shifted ** (p / 2)) @ Q.T, torch.eye(len(A), dtype=A.dtype, device=A.device)
    residual = nan if X is None else (torch.linalg.matrix_norm(half @ X @ half - eye) / len(A) ** 0.5).item()
    rank = torch.special.entr(lam / lam.sum()).sum().exp()
    return (shifted[-1] / shifted[0]).item(), rank.item(), residual


def basis_fits(A: Tensor, Q: Tensor, tolerance: float) -> bool:
    """Return whether ||B - diag B||_F <= tolerance ||B||_F for B = Q^T A Q, as solver "qr" tests; False if Q is zero."""
    B = Q.T @ A @ Q
    norm = torch.linalg.matrix_norm
    return bool(Q.any() and norm(B - B.diag().diag()) <= tolerance * norm(B))


def log_diagnostics(optimizer: Any, writer: Any, global_step: int, before: Sequence[Tensor] | None = None) -> Metrics:
    """Write `diagnostics` to a `torch.utils.tensorboard.SummaryWriter`, and return them.

    Each finite value is a scalar METRIC/PARAMETER. The log10 of a metric's positive finite values over all parameters is a
    histogram log10_over_parameters/METRIC. On multiple ranks, each rank needs its own writer.
    """
    found = diagnostics(optimizer, before)
    logs = defaultdict(list)
    for name, figures in found.items():
        for figure, x in figures.items():
            if isfinite(x):
                writer.add_scalar(f"{figure}/{name}", x, global_step)
                if name != "optimizer" and x > 0:
                    logs[figure].append(log10(x))
    for figure, values in logs.items():
        writer.add_histogram(f"log10_over_parameters/{figure}", torch.tensor(values), global_step)
    return found
