"""What a step did, in plain numbers for each parameter, and the same for TensorBoard.

    before = weights(optimizer)
    optimizer.step()
    found = diagnostics(optimizer, before)  # before the next zero_grad()

Nothing is computed or kept unless these are called. A call takes the singular values of each gradient and the eigenvectors of
each factor, in float64: it is dearer than a refresh of all roots, and waits for the device.

The optimizer does not keep its last direction, and a scheduler may have changed the learning rate since. So whoever wants the
length of the update passes the weights from before the step, and gets what moved: decay, momentum and rounding included.
"""

from collections import defaultdict
from collections.abc import Sequence
from math import isfinite, log10, nan
from typing import Any

import torch
from torch import Tensor

from .layout import owner
from .optimizer import AdamWShampoo
from .options import parameter_name
from .ranks import whole
from .state import Bucket
from .step import factor_correction, gather

Figures = dict[str, float]


def weights(optimizer: AdamWShampoo) -> list[Tensor]:
    """A copy of each parameter, in the optimizer's order."""
    return [p.detach().clone() for p in optimizer._params()]


@torch.no_grad()
def diagnostics(optimizer: AdamWShampoo, before: Sequence[Tensor] | None = None) -> dict[str, Figures]:
    """The figures of the newest step for each parameter, by its name, or "parameter I of shape ..." where it has none:
    `gradient_figures` where it has a gradient, `weight_figures`, and `factor_figures` where it has factors. "optimizer" has the
    steps taken and skipped, and the roots rescued (see `health`), since it was made.

    `before` holds the weights before the step; without it no update is reported. Raises ValueError if it does not fit.
    Of several ranks each reports the parameters of which it owns a block, and the factors of its own blocks alone. DTensors are
    gathered: with them all ranks must call it.
    """
    params = optimizer._params()
    if before is not None and [W.shape for W in before] != [p.shape for p in params]:
        raise ValueError(
            f"before holds tensors of the shapes {[tuple(W.shape) for W in before]}; it must hold a copy of each of the "
            f"optimizer's {len(params)} parameters from before the step, as weights(optimizer) gives"
        )
    earlier = dict(zip(params, before, strict=True)) if before is not None else {}
    figures: dict[Tensor, Figures] = {}
    for group, bucket in optimizer._grouped():
        of_factors = factor_figures(bucket, group)
        owned = {piece.param for pieces in bucket.layout.pieces for piece in pieces}
        grads, _ = gather(bucket, decay=0)
        for i, (p, G, shape) in enumerate(zip(bucket.params, grads, bucket.layout.shapes, strict=True)):
            W, W_before = whole(p), whole(earlier.get(p))
            if i in owned:
                of_gradient = gradient_figures(G if p.grad is not None else None, shape)
                figures[p] = of_gradient | weight_figures(W, W_before) | of_factors.get(i, {})  # type: ignore[arg-type]
    steps, skipped = max(group["step"] for group in optimizer.param_groups), optimizer.events["steps skipped"]
    counts = {"steps": steps, "steps_skipped": skipped, "roots_rescued": optimizer.events.total() - skipped}
    return {"optimizer": counts} | {name: figures[p] for name, p in zip(names(optimizer), params, strict=True) if p in figures}


def names(optimizer: AdamWShampoo) -> list[str]:
    """The name of each parameter; where they have none, the place among all and the shape."""
    given = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
    everything = {"params": optimizer._params()}
    return given or [parameter_name(everything, i) for i in range(len(everything["params"]))]


def gradient_figures(G: Tensor | None, shape: tuple[int, ...]) -> Figures:
    """||G||_F, ||G||_*, and nuclear_ratio = ||G||_* / (sqrt(min(m, n)) ||G||_F), from 1 / sqrt(min(m, n)) for rank one to 1 for
    equal singular values. (arXiv 2601.07326: its rate is that of SGD where this is Theta(1), m and n being comparable.)

    G is the m x n matrix of its merged shape, m being the first dimension and n the product of the others; so a vector is
    m x 1, and its ratio 1. NaN for a gradient that is not finite, and as the ratio of one that is zero.
    """
    if G is None:
        return {}
    matrix = G.double().reshape(shape[0], -1)
    norm = torch.linalg.vector_norm(matrix)
    nuclear = torch.linalg.svdvals(matrix).sum() if norm.isfinite() else norm * nan
    ratio = nuclear / (min(matrix.shape) ** 0.5 * norm)
    return {"gradient_norm": norm.item(), "gradient_nuclear_norm": nuclear.item(), "nuclear_ratio": ratio.item()}


def weight_figures(W: Tensor, before: Tensor | None) -> Figures:
    """||W||_F after the step; given the weights before it, update_norm = ||W - before||_F, and update_ratio, that over
    ||before||_F: infinite where all were zero, NaN where they stayed so.
    """
    norm = torch.linalg.vector_norm
    found = {"weight_norm": norm(W.double()).item()}
    if before is not None:
        update = norm(W.double() - before.double())
        found |= {"update_norm": update.item(), "update_ratio": (update / norm(before.double())).item()}
    return found


def factor_figures(bucket: Bucket, group: dict[str, Any]) -> dict[int, Figures]:
    """For each parameter of which this rank has factors, by its place in the bucket: of its blocks' factors the largest
    condition, the smallest effective_rank and the largest root_residual, as `spectrum` has them; the share roots_missing of
    roots that are zero, not computed yet, or the identity, given up; and with solver "qr" the share bases_fit of those whose
    eigenvectors a refresh would skip now. Nothing before the first step.
    """
    if group["step"] == 0:
        return {}
    found = defaultdict(list)
    c, eps, relative = factor_correction(group, group["step"]), group["eps"], group["relative_eps"]
    for i, ((blocks, *_), exponents) in enumerate(zip(bucket.layout.stacks, bucket.exponents, strict=True)):
        for A, X, Q, p in zip(bucket.factors[i], bucket.inv_roots[i], bucket.eigvecs[i], exponents, strict=True):
            if A is not None and X is not None:
                for block in range(blocks):
                    of_block = spectrum(A[block].double() / c, X[block].double(), p, eps, relative)
                    fits = basis_fits(A[block].double(), Q[block].double(), group["qr_tolerance"]) if Q is not None else nan
                    found[owner(bucket.layout, i, block)].append((*of_block, fits))
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
    """Of a corrected factor A and the root X that the step used, both d x d in float64, with S = A + eps I:

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
    """Whether ||B - diag B||_F <= tolerance ||B||_F for B = Q^T A Q, the test of solver "qr"; not for a basis of zeros."""
    B = Q.T @ A @ Q
    norm = torch.linalg.matrix_norm
    return bool(Q.any() and norm(B - B.diag().diag()) <= tolerance * norm(B))


def log_diagnostics(
    optimizer: AdamWShampoo, writer: Any, global_step: int, before: Sequence[Tensor] | None = None
) -> dict[str, Figures]:
    """Write `diagnostics` with a `torch.utils.tensorboard.SummaryWriter`, and return them: a scalar FIGURE/PARAMETER for each
    that is finite, and for each figure a histogram, over parameters, of log10 of what is above zero. Of several ranks each
    needs a writer of its own.
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
