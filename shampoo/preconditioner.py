"""Preconditioners. Each holds the matrices of one stack of blocks (B, d1, ..., dk), updates them, and applies them."""

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .roots import SOLVERS, inverse_root
from .update import accumulate

if TYPE_CHECKING:  # `group` needs PRECONDITIONERS
    from .group import Options

SOLVER_CHUNK = 2**22  # elements of factors per solver call: bounds the solver's workspace


class Kronecker:
    """Shampoo's preconditioner: a factor A_d and its inverse root X_d, both (B, d_d, d_d), for each dimension d of the blocks.

    For matrix blocks, A_1 and A_2 are the paper's L and R, and X_1 and X_2 are (L + eps I)^(-1/p) and (R + eps I)^(-1/q). A
    dimension with exponent 0 has neither (None), and its X_d is the identity. `eigvecs` holds the bases of a solver that keeps
    them. All matrices start at zero.
    """

    NAMES = ("factors", "inv_roots", "eigvecs")

    def __init__(
        self, stack: Sequence[int], exponents: tuple[float, ...], options: "Options", dtype: torch.dtype, device: torch.device
    ):
        def matrices(dtype: torch.dtype, needed: bool = True) -> list[Tensor | None]:
            """Return zeros (B, d, d) for each dimension with a factor if `needed`, None for the others."""
            return [
                torch.zeros(blocks, d, d, dtype=dtype, device=device) if p and needed else None
                for d, p in zip(block, exponents, strict=True)
            ]

        blocks, *block = stack
        self.exponents = exponents
        self.factors = matrices(dtype)
        self.inv_roots = matrices(torch.bfloat16 if options["bf16_roots"] else dtype)
        self.eigvecs = matrices(dtype, needed=SOLVERS[options["solver"]].keeps_basis)
        self.rootless = set(range(blocks)) if any(exponents) else set()  # blocks without roots yet

    def update(self, G: Tensor, beta2: float, present: Tensor | None) -> None:
        """A_d <- beta2 A_d + (1 - beta2) U^T U in place, where U = unfold(G, d); for beta2 = 1, A_d <- A_d + U^T U.

        For matrices: L <- beta2 L + (1 - beta2) G G^T, R <- beta2 R + (1 - beta2) G^T G. `present` (B, 1, 1) is 1 for blocks to
        update and 0 for others; None updates all.
        """
        for d, A in enumerate(self.factors, start=1):
            if A is None:
                continue
            U = unfold(G, d)
            if present is None and beta2 < 1:
                A.baddbmm_(U.mT, U, beta=beta2, alpha=1 - beta2)
            else:
                accumulate(A, U.mT @ U, beta2, present)

    def refresh(self, blocks: Sequence[int], bc2: float | Tensor, options: "Options") -> list[tuple[int, str]]:
        """X_d <- (A_d / bc2 + eps I)^(-p_d) for these blocks; with relative_eps, eps times the trace of A_d / bc2 replaces eps.

        bc2 is a number or (B, 1), and 1 in the paper. Return (block, what became of its root) for each root that the state's
        dtype could not give; see `roots.inverse_root`. Factors with NaN or Inf are reset to zero.
        """
        rescued, solver = [], options["solver"]
        own = {name: value for name, value in options.items() if name in SOLVERS[solver].options}
        for X, A, Q, p in zip(self.inv_roots, self.factors, self.eigvecs, self.exponents, strict=True):
            if A is None or X is None:
                continue
            few, limit = max(1, SOLVER_CHUNK // A[0].numel()), torch.finfo(X.dtype).max
            for some in (blocks[i : i + few] for i in range(0, len(blocks), few)):
                rows = slice(some[0], some[-1] + 1) if isinstance(some, range) else list(some)  # a slice copies nothing
                basis = Q[rows] if Q is not None else None
                c = bc2[rows] if isinstance(bc2, Tensor) else bc2
                roots, causes = inverse_root(
                    A[rows], c, p, options["eps"], X[rows], basis, relative_eps=options["relative_eps"], solver=solver, **own
                )
                X[rows] = roots.clamp(-limit, limit).to(X.dtype)
                if Q is not None and basis is not None:
                    Q[rows] = basis
                rescued += [(some[i], cause) for i, cause in causes.items()]
                for b in {some[i] for i in causes if not A[some[i]].isfinite().all()}:
                    A[b] = 0
        self.rootless.difference_update(blocks)
        return rescued

    def find_rootless(self) -> None:
        """Set `rootless` to the blocks whose roots are all zero. Call it after loading."""
        roots = [X.flatten(1).any(dim=1) for X in self.inv_roots if X is not None]
        self.rootless = set((~torch.stack(roots).any(dim=0)).nonzero().flatten().tolist()) if roots else set()

    def apply(self, N: Tensor) -> Tensor:
        """Return N (B, d1, ..., dk) contracted with X_d along each dimension d; for matrices, X_1 N X_2.

        In the paper, this is (L + eps I)^(-1/p) M (R + eps I)^(-1/q). In its one-sided case 1/p or 1/q is 0, and that X_d is
        the identity.
        """
        return contract(N, self.inv_roots)

    def tensors(self) -> Iterator[tuple[str, int, Tensor]]:
        """Yield (name, dimension from 0, tensor (B, d, d)) for all state, as checkpoints and `state.tensors` need it."""
        for name in self.NAMES:
            yield from ((name, d, X) for d, X in enumerate(getattr(self, name)) if X is not None)

    @staticmethod
    def cost(block: Sequence[int], exponents: tuple[float, ...], options: "Options") -> float:
        """Return the floating-point operations per step for a block (d1, ..., dk) of n elements.

        For each factor of size d: 2 n d to apply its root, 2 n d / factor_frequency to update it, and about
        25 d^3 / precondition_frequency to refresh its root.
        """
        n, updates, refreshes = prod(block), 1 / options["factor_frequency"], 1 / options["precondition_frequency"]
        return sum(2 * n * d * (1 + updates) + 25 * d**3 * refreshes for d, p in zip(block, exponents, strict=True) if p)


PRECONDITIONERS = {"shampoo": Kronecker}


def block_exponents(order: int, options: "Options") -> tuple[float, ...]:
    """Return the exponent of each factor's inverse root for a block of order k; in the paper, 1/p and 1/q.

    If `exponents` is None, each is 1/(2k); if it is a number, each is that number. For a pair (left, right), the first
    dimension gets left and each other one right/(k-1); a block of order 1 gets left + right. All are times
    `exponent_multiplier`.
    """
    exponents = options["exponents"]
    if exponents is None:
        each = [1 / (2 * order)] * order
    elif isinstance(exponents, (tuple, list)):
        left, right = exponents
        each = [left] + [right / (order - 1)] * (order - 1) if order > 1 else [left + right]
    else:
        each = [exponents] * order
    return tuple(options["exponent_multiplier"] * e for e in each)


def unfold(G: Tensor, d: int) -> Tensor:
    """Return G (B, d1, ..., dk) as matrices (B, n, d_d) with rows along dimension d >= 1; n is the product of the other sizes.

    The result is a view for the first and the last dimension; otherwise it is a copy.
    """
    return G.movedim(d, -1).flatten(1, -2) if G.dim() > 2 else G.unsqueeze(1)


def contract(N: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """Contract N (B, d1, ..., dk) with a symmetric matrix (B, d_d, d_d) along each dimension d; None is the identity.

    The matrices must be symmetric: the first multiplies from the left, the others from the right. The order 1, k, k-1, ..., 2
    copies N only for dimensions other than the first and the last.
    """
    for d in (1, *range(len(matrices), 1, -1)):
        X = matrices[d - 1]
        if X is None:
            continue
        X = X.to(N.dtype)
        if d == 1:
            N = (X @ N.reshape(*N.shape[:2], -1)).view(N.shape)
        else:
            moved = N.movedim(d, -1)
            N = (moved.flatten(1, -2) @ X).view(moved.shape).movedim(-1, d)
    return N
