"""What a step did, in plain numbers for each parameter, and the same for TensorBoard.

    before = weights(optimizer)
    optimizer.step()
    figures = diagnostics(optimizer, before)  # before the next zero_grad()

Nothing is computed or kept unless these are called. A call computes the singular values of each gradient and the eigenvectors
of each factor in float64: it costs more than a refresh of all roots, and waits for the device.

The optimizer does not keep its last direction, and a scheduler may have changed the learning rate since. For the length of the
update, pass the weights from before the step: it then includes decay, momentum, and rounding.
"""

from collections import defaultdict
from collections.abc import Sequence
from math import isfinite, log10, nan
from typing import Any

import torch
from torch import Tensor

from .copies import full_gradient, full_tensor
from .optimizer import AdamWShampoo
from .options import parameter_name
from .state import Bucket
from .update import bias_correction, factor_steps

Figures = dict[str, float]


def weights(optimizer: AdamWShampoo) -> list[Tensor]:
    """Return a copy of each parameter, in the optimizer's order."""
    return [p.detach().clone() for p in optimizer._params()]


@torch.no_grad()
def diagnostics(optimizer: AdamWShampoo, before: Sequence[Tensor] | None = None) -> dict[str, Figures]:
    """Return the figures of the newest step for each parameter, by its name, or "parameter I of shape ..." if it has none.

    `gradient_figures` if it has a gradient, `weight_figures`, and `factor_figures` if it has factors. "optimizer" has the steps
    taken and skipped, and the roots rescued (see `health`), since it was made.

    `before` holds the weights before the step; without it no update is reported. Raises ValueError if it does not fit.
    On multiple ranks, each reports the parameters of which it owns a block, and the factors of its own blocks alone. DTensors
    are gathered: with them, all ranks must call it.
    """
    params = optimizer._params()
    if before is not None and [W.shape for W in before] != [p.shape for p in params]:
        raise ValueError(
            f"before holds tensors of the shapes {[tuple(W.shape) for W in before]}; it must hold a copy of each of the "
            f"optimizer's {len(params)} parameters from before the step, as weights(optimizer) gives"
        )
    earlier = dict(zip(params, before, strict=True)) if before is not None else {}
    figures: dict[Tensor, Figures] = {}
    for bucket in optimizer._buckets:
        of_factors = factor_figures(bucket)
        owned = {grid.param for grids in bucket.layout.grids for grid in grids}
        for i, (p, shape) in enumerate(zip(bucket.params, bucket.layout.shapes, strict=True)):
            G, W = full_gradient(p), full_tensor(p)
            W_before = full_tensor(earlier[p]) if p in earlier else None
            if i in owned:
                figures[p] = gradient_figures(G, shape) | weight_figures(W, W_before) | of_factors.get(i, {})
    steps, skipped = max(group["step"] for group in optimizer.param_groups), optimizer.events["steps skipped"]
    rescued = sum(number for what, number in optimizer.events.items() if what.startswith("roots"))
    counts = {"steps": steps, "steps_skipped": skipped, "roots_rescued": rescued}
    return {"optimizer": counts} | {name: figures[p] for name, p in zip(names(optimizer), params, strict=True) if p in figures}


def names(optimizer: AdamWShampoo) -> list[str]:
    """Return the name of each parameter; without names, its index among all and its shape."""
    given = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
    everything = {"params": optimizer._params()}
    return given or [parameter_name(everything, i) for i in range(len(everything["params"]))]


def gradient_figures(G: Tensor | None, shape: tuple[int, ...]) -> Figures:
    """Return ||G||_F, ||G||_*, and nuclear_ratio = ||G||_* / (sqrt(min(m, n)) ||G||_F).

    The ratio is 1 / sqrt(min(m, n)) for rank one and 1 for equal singular values. (arXiv 2601.07326: its rate is that of SGD
    where the ratio is Theta(1) and m and n are comparable.) G is taken as the m x n matrix of its merged shape, m being the
    first dimension and n the product of the others; so a vector is m x 1, and its ratio 1. NaN for a gradient that is not
    finite, and as the ratio of one that is zero.
    """
    if G is None:
        return {}
    matrix = G.double().reshape(shape[0], -1)
    norm = torch.linalg.vector_norm(matrix)
    nuclear = torch.linalg.svdvals(matrix).sum() if norm.isfinite() else norm * nan
    ratio = nuclear / (min(matrix.shape) ** 0.5 * norm)
    return {"gradient_norm": norm.item(), "gradient_nuclear_norm": nuclear.item(), "nuclear_ratio": ratio.item()}


def weight_figures(W: Tensor, before: Tensor | None) -> Figures:
    """Return ||W||_F after the step; given the weights before it, also update_norm = ||W - before||_F and update_ratio, that
    over ||before||_F: infinite if all were zero, NaN if they stayed zero.
    """
    norm = torch.linalg.vector_norm
    found = {"weight_norm": norm(W.double()).item()}
    if before is not None:
        update = norm(W.double() - before.double())
        found |= {"update_norm": update.item(), "update_ratio": (update / norm(before.double())).item()}
    return found


def factor_figures(bucket: Bucket) -> dict[int, Figures]:
    """Return figures of the factors that this rank has, for each parameter by its index in the bucket.

    Over its blocks' factors the largest condition, the smallest effective_rank, and the largest root_residual, see `spectrum`;
    roots_missing, the share of roots that are zero, not computed yet, or the identity, given up; and with solver "qr"
    bases_fit, the share of those whose eigenvectors a refresh would keep now. Empty before the first step.
    """
    group = bucket.group
    if group["step"] == 0:
        return {}
    found = defaultdict(list)
    eps, relative, every = group["eps"], group["relative_eps"], group["factor_frequency"]
    counted = [factor_steps(max(1, steps), every) for steps in bucket.steps]
    corrections = [bias_correction(group["betas"][1], t) if group["bias_correction"] else 1.0 for t in counted]
    for i, preconditioner in enumerate(bucket.preconditioners):
        state = {(name, d): X.double() for name, d, X in preconditioner.tensors()}
        for (name, d), factors in state.items():
            for block, A in enumerate(factors) if name == "factors" else ():
                X, Q = state["inv_roots", d][block], state["eigvecs", d][block] if ("eigvecs", d) in state else None
                param = bucket.layout.params[i][block]
                of_block = spectrum(A / corrections[param], X, preconditioner.exponents[d], eps, relative)
                fits = basis_fits(A, Q, group["qr_tolerance"]) if Q is not None else nan
                found[param].append((*of_block, fits))
    columns = {param: torch.tensor(rows, dtype=torch.float64).unbind(dim=1) for param, rows in found.items()}
    return {
        param: {
            "condition": condition.max().item(),
            "effective_rank": rank.min().item(),
            "root_residual": residual.max().item(),
            "roots_missing": missing.mean().item(),
        }
        | ({} if fits.isnan().all() else {"bases_fit": fits.mean().item()})
        for param, (condition, rank, residual, missing, fits) in columns.items()
    }


def spectrum(A: Tensor, X: Tensor, p: float, eps: float, relative_eps: bool) -> tuple[float, float, float, bool]:
    """Return four figures of a corrected factor A and the root X that the step used, d x d in float64, with S = A + eps I:

    - the condition number of S;
    - the effective rank exp(-sum_i s_i log s_i), s being A's eigenvalues over their sum: from 1, rank one, to d, all equal;
    - the residual ||S^(p/2) X S^(p/2) - I||_F / sqrt(d), by how much X differs from S^(-p): staleness, and the solver's error.
      An eigenvector of both, with eigenvalues s and x, adds (x s^p - 1)^2 to its square: nothing if the root is fresh, 1 if it
      is zero or twice too long. It has no upper bound;
    - whether X is zero or the identity.

    NaN for a factor that is not finite, and as the rank of one that is zero.
    """
    eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
    missing = not X.any() or torch.equal(X, eye)
    if not A.isfinite().all():
        return nan, nan, nan, missing
    lam, Q = torch.linalg.eigh(A)
    lam = lam - lam[0].clamp(max=0)  # as the solvers do
    shifted = lam + (eps * lam.sum() if relative_eps and lam.any() else eps)
    half = (Q * shifted ** (p / 2)) @ Q.T
    residual = torch.linalg.matrix_norm(half @ X @ half - eye) / len(A) ** 0.5
    rank = torch.special.entr(lam / lam.sum()).sum().exp()
    return (shifted[-1] / shifted[0]).item(), rank.item(), residual.item(), missing


def basis_fits(A: Tensor, Q: Tensor, tolerance: float) -> bool:
    """Return whether ||B - diag B||_F <= tolerance ||B||_F for B = Q^T A Q, the test of solver "qr"; False if Q is zero."""
    B = Q.T @ A @ Q
    norm = torch.linalg.matrix_norm
    return bool(Q.any() and norm(B - B.diag().diag()) <= tolerance * norm(B))


def log_diagnostics(
    optimizer: AdamWShampoo, writer: Any, global_step: int, before: Sequence[Tensor] | None = None
) -> dict[str, Figures]:
    """Write `diagnostics` with a `torch.utils.tensorboard.SummaryWriter`, and return them.

    A scalar FIGURE/PARAMETER for each figure that is finite, and for each figure a histogram, over parameters, of log10 of the
    positive values. On multiple ranks, each needs its own writer.
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
