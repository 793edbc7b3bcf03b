"""Preconditioners. Each holds the matrices of one stack of blocks (B, d1, ..., dk), updates them, and applies them."""

from collections.abc import Collection, Iterator, Sequence
from math import isclose, prod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .blocks import Exponents, Shape
from .roots import SOLVERS, inverse_root, update_basis
from .rules import check_value, one_of
from .update import accumulate

if TYPE_CHECKING:  # `options` needs PRECONDITIONERS
    from .options import Options

SOLVER_CHUNK = 2**22  # elements of factors per solver call: bounds the solver's workspace
DEVICE_SOLVER_CHUNK = 2**24  # the same on an accelerator, where each call takes many launches

Rows = slice | list[int]  # an index of some blocks of a stack
Notes = list[tuple[int, str]]  # blocks, and what became of a root


class Kronecker:
    """Shampoo's preconditioner: a factor A_d and its inverse root X_d, both (B, d_d, d_d), for each dimension d of the blocks.

    For matrix blocks, A_1 and A_2 are the paper's L and R, and X_1 and X_2 are (L + eps I)^(-1/p) and (R + eps I)^(-1/q). A
    dimension with exponent 0 has neither (None), and its X_d is the identity. `eigvecs` holds the bases of a solver that keeps
    them. All matrices start at zero.
    """

    NAMES: tuple[str, ...] = ("factors", "inv_roots", "eigvecs")
    APPLIED = "inv_roots"  # the matrices that `direction` needs
    PRODUCTS = 1  # of a block with each root or basis per step

    def __init__(self, stack: Shape, exponents: Exponents, options: "Options", dtype: torch.dtype, device: torch.device):
        def matrices(name: str, dtype: torch.dtype = dtype, needed: bool = True) -> list[Any]:
            """Return zeros (B, d, d) for each dimension with a factor if they are `needed`, None for the others."""
            needed = needed and name in self.NAMES
            return [torch.zeros(size, dtype=dtype, device=device) if size and needed else None for size in sizes]

        sizes = [(stack[0], d, d) if p else None for d, p in zip(stack[1:], exponents, strict=True)]
        self.exponents, self.is_kl = exponents, options["covariance"] == "kl"
        self.factors = matrices("factors")
        self.inv_roots = matrices("inv_roots", torch.bfloat16 if options["bf16_roots"] else dtype)
        self.eigvecs = matrices("eigvecs", needed=SOLVERS[options["solver"]].keeps_basis or self.APPLIED == "eigvecs")
        self.rootless = set(range(stack[0])) if any(exponents) else set()  # blocks without roots, or bases, yet

    def update(self, G: Tensor, beta2: float, present: Tensor | None) -> None:
        """A_d <- beta2 A_d + (1 - beta2) U^T U in place, where U = unfold(G, d); for beta2 = 1, A_d <- A_d + U^T U.

        For matrices: L <- beta2 L + (1 - beta2) G G^T, R <- beta2 R + (1 - beta2) G^T G. With covariance "kl", G is first
        contracted with the roots of all other dimensions (the identity until there are roots), and U^T U is times d_d / n for
        blocks of n elements (Lin et al., arXiv 2509.03378): L <- beta2 L + (1 - beta2) G X_2^2 G^T / d_2.

        `present` (B, 1, 1) is 1 for blocks to update and 0 for others; None updates all.
        """
        for d, A in enumerate(self.factors, start=1):
            if A is None:
                continue
            U = unfold(self.apply_others(G, d) if self.is_kl else G, d)
            scale = 1 / U.shape[1] if self.is_kl else 1.0
            if present is None and beta2 < 1:
                A.baddbmm_(U.mT, U, beta=beta2, alpha=(1 - beta2) * scale)
            else:
                accumulate(A, (U.mT @ U).mul_(scale), beta2, present)

    def refresh(self, blocks: Sequence[int], bc2: float | Tensor, options: "Options", V: Tensor | None) -> Notes:
        """X_d <- (A_d / bc2 + eps I)^(-p_d) for these blocks; with relative_eps, eps times the trace of A_d / bc2 replaces eps.

        bc2 is a number or (B, 1), and 1 in the paper. Return (block, what became of its root) for each root that the state's
        dtype could not give; see `roots.inverse_root`. Factors with NaN or Inf are reset to zero. V is the stack's second
        moment (B, d1, ..., dk), for subclasses, which replace `solve`.
        """
        rescued = []
        for d, A in enumerate(self.factors):
            if A is None:
                continue
            few = max(1, (SOLVER_CHUNK if A.device.type == "cpu" else DEVICE_SOLVER_CHUNK) // A[0].numel())
            for some in (blocks[i : i + few] for i in range(0, len(blocks), few)):
                rows = slice(some[0], some[-1] + 1) if isinstance(some, range) else list(some)  # a slice is a view
                causes = self.solve(d, A[rows], rows, bc2[rows] if isinstance(bc2, Tensor) else bc2, options, V)
                for b in {some[i] for i in causes if not A[some[i]].isfinite().all()}:
                    A[b] = 0
                rescued += [(some[i], cause) for i, cause in causes.items()]
        self.rootless.difference_update(blocks)
        return rescued

    def solve(self, d: int, A: Tensor, rows: Rows, bc2: float | Tensor, options: "Options", V: Tensor | None) -> dict[int, str]:
        """Set the roots of dimension d (from 0) of these rows from their factors A; return notes, as `roots.inverse_root`."""
        names = ("solver", "relative_eps", *SOLVERS[options["solver"]].options)
        own: dict[str, Any] = {name: value for name, value in options.items() if name in names}
        X, Q = self.inv_roots[d], self.eigvecs[d]
        basis = None if Q is None else Q[rows]
        roots, causes = inverse_root(A, bc2, self.exponents[d], options["eps"], X[rows], basis, **own)
        limit = torch.finfo(X.dtype).max
        X[rows] = roots.clamp(-limit, limit).to(X.dtype)
        if Q is not None and basis is not None:
            Q[rows] = basis
        return causes

    def apply_others(self, G: Tensor, d: int) -> Tensor:
        """Return G contracted with the roots of all dimensions but d >= 1; those of blocks without roots are the identity."""
        if len(self.rootless) == len(G):
            return G
        P = contract(G, [X if e != d else None for e, X in enumerate(self.inv_roots, start=1)])
        if self.rootless:
            P[sorted(self.rootless)] = G[sorted(self.rootless)]
        return P

    def find_rootless(self) -> None:
        """Set `rootless` to the blocks whose roots are all zero. Call it after loading."""
        roots = [X.flatten(1).any(dim=1) for X in getattr(self, self.APPLIED) if X is not None]
        self.rootless = set((~torch.stack(roots).any(dim=0)).nonzero().flatten().tolist()) if roots else set()

    def rotate(self, G: Tensor) -> Tensor:
        """Return G in the coordinates in which the grafting method acts: unchanged."""
        return G

    def direction(self, N: Tensor, A: Tensor) -> Tensor:
        """Return N (B, d1, ..., dk) contracted with X_d along each dimension d; for matrices, X_1 N X_2.

        In the paper, this is (L + eps I)^(-1/p) M (R + eps I)^(-1/q). In its one-sided case 1/p or 1/q is 0, and that X_d is
        the identity. The grafting method's step A is not used.
        """
        return contract(N, self.inv_roots)

    def tensors(self) -> Iterator[tuple[str, int, Tensor]]:
        """Yield (name, dimension from 0, tensor (B, d, d)) for all state, as checkpoints and `state.tensors` need it."""
        for name in self.NAMES:
            yield from ((name, d, X) for d, X in enumerate(getattr(self, name)) if X is not None)

    @classmethod
    def cost(cls, block: Sequence[int], exponents: Exponents, options: "Options") -> float:
        """Return the floating-point operations per step for a block (d1, ..., dk) of n elements.

        For each factor of size d: 2 n d for each of the PRODUCTS with its root or basis, 2 n d / factor_frequency to update it,
        and about 25 d^3 / precondition_frequency to refresh its root. With covariance "kl", each update of another factor
        applies it too.
        """
        sizes = [d for d, p in zip(block, exponents, strict=True) if p]
        products = len(sizes) if options["covariance"] == "kl" else 1  # per update
        updates, refreshes = products / options["factor_frequency"], 1 / options["precondition_frequency"]
        return sum(2 * prod(block) * d * (cls.PRODUCTS + updates) + 25 * d**3 * refreshes for d in sizes)

    @classmethod
    def check(cls, options: "Options", exponents: Collection[Exponents]) -> None:
        """Raise ValueError for options that do not go together, given the exponents of all blocks with factors."""
        for each in exponents:
            SOLVERS[options["solver"]].check(each)
            if options["covariance"] == "kl" and not all(p == 0 or isclose(p, 0.5) for p in each):
                raise ValueError(f"covariance 'kl' is defined for exponents 1/2; a block has {each}: set exponents=0.5")


class Eigenbasis(Kronecker):
    """SOAP (Vyas et al., arXiv 2409.11321): the grafting method's step, Adam's, taken in the eigenbases of the factors.

    `eigvecs` holds a basis Q_d, with columns in descending order of their eigenvalue, for each dimension d with a factor. The
    direction is A contracted with Q_d^T, where A is the step for N contracted with Q_d, and the second moment is that of the
    gradient contracted with Q_d. For matrices, P = Q_1 A Q_2^T, and A = N' / (sqrt(V / bc2) + grafting_eps) with
    N' = Q_1^T N Q_2. So the length is Adam's own: there is nothing to graft.
    """

    NAMES = ("factors", "eigvecs")
    APPLIED = "eigvecs"
    PRODUCTS = 3  # to rotate the gradient and its average, and the step back
    NEEDED: ClassVar = {
        "covariance": one_of("gram"),
        "solver": one_of("auto", "eigh", "qr"),
        "grafting": one_of("adam", "rmsprop", "adagrad"),
        "normalized_grafting": one_of(False),
        "start_preconditioning_step": one_of(1),
        "bf16_roots": one_of(False),
    }

    def solve(self, d: int, A: Tensor, rows: Rows, bc2: float | Tensor, options: "Options", V: Tensor | None) -> dict[int, str]:
        """Bring the bases of dimension d (from 0) of these rows up to date with their factors A; see `roots.update_basis`.

        Where columns of a basis change places, so do the elements of the second moment V (B, d1, ..., dk), in place.
        """
        Q = self.eigvecs[d]
        assert V is not None
        Q[rows], order, causes = update_basis(A, Q[rows], options["solver"], options["qr_tolerance"])
        if order is not None:
            places = order.view(-1, *(order.shape[1] if e == d else 1 for e in range(len(self.factors))))
            V[rows] = torch.take_along_dim(V[rows], places, dim=d + 1)
        return causes

    def rotate(self, G: Tensor) -> Tensor:
        """Return G (B, d1, ..., dk) contracted with Q_d along each dimension d; for matrices, Q_1^T G Q_2."""
        return contract(G, self.eigvecs)

    def direction(self, N: Tensor, A: Tensor) -> Tensor:
        """Return the step A in the eigenbases contracted with Q_d^T along each dimension d; for matrices, Q_1 A Q_2^T."""
        return contract(A, [Q if Q is None else Q.mT for Q in self.eigvecs])

    @classmethod
    def check(cls, options: "Options", exponents: Collection[Exponents]) -> None:
        """Raise ValueError for an option that preconditioner "soap" is not defined for."""
        for name, rule in cls.NEEDED.items():
            check_value(f"with preconditioner 'soap', {name}", options[name], rule)  # type: ignore[literal-required]


PRECONDITIONERS: dict[str, type[Kronecker]] = {"shampoo": Kronecker, "soap": Eigenbasis}


def unfold(G: Tensor, d: int) -> Tensor:
    """Return G (B, d1, ..., dk) as matrices (B, n, d_d) with rows along dimension d >= 1; n is the product of the other sizes.

    The result is a view for the first and the last dimension; otherwise it is a copy.
    """
    return G.movedim(d, -1).flatten(1, -2) if G.dim() > 2 else G.unsqueeze(1)


def contract(N: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """Contract N (B, d1, ..., dk) with the rows of a matrix (B, d_d, d_d) along each dimension d; None is the identity.

    For matrix blocks, this is X_1^T N X_2. The order 1, k, k-1, ..., 2 copies N only for inner dimensions.
    """
    for d in (1, *range(len(matrices), 1, -1)):
        if (of_dim := matrices[d - 1]) is None:
            continue
        X = of_dim.to(N.dtype)
        if d == 1:
            N = (X.mT @ N.reshape(*N.shape[:2], -1)).view(N.shape)
        else:
            moved = N.movedim(d, -1)
            N = (moved.flatten(1, -2) @ X).view(moved.shape).movedim(-1, d)
    return N
