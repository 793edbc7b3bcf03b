"""The options of a parameter group, each with its type and its rule: a misspelled option is a type error."""

from typing import Annotated, TypedDict, get_type_hints

from torch import Tensor

from .grafting import GRAFTING
from .preconditioner import COVARIANCES, PRECONDITIONERS
from .roots import SOLVERS
from .rules import BOOL, EXPONENT, NONE, Rule, either, integer, one_of, pair, real, scalar

STRUCTURAL = "determines which state there is: if it changes, state is rebuilt from what fits"
ADDED = "may be missing in a state_dict"


class Options(TypedDict):
    """The options of a parameter group; `AdamWShampoo` documents them. After its rule, an option may have the marks above."""

    lr: Annotated[float | Tensor, either(real(0), scalar(real(0)))]
    maximize: Annotated[bool, BOOL, ADDED]
    betas: Annotated[tuple[float, float], pair(real(0, 1, below=True), real(0, 1))]
    eps: Annotated[float, real(0, above=True)]
    weight_decay: Annotated[float, real(0)]
    decoupled_weight_decay: Annotated[bool, BOOL]
    cautious_decay: Annotated[bool, BOOL, ADDED]
    momentum: Annotated[float, real(0, 1, below=True)]
    nesterov: Annotated[bool, BOOL]
    nadam: Annotated[bool, BOOL]
    bias_correction: Annotated[bool, BOOL]
    block_size: Annotated[int, integer(1), STRUCTURAL]
    merge_dims: Annotated[bool, BOOL, STRUCTURAL]
    max_dim: Annotated[int, integer(1), STRUCTURAL]
    precondition_frequency: Annotated[int, integer(1)]
    factor_frequency: Annotated[int, integer(1), ADDED]
    start_preconditioning_step: Annotated[int | None, either(integer(1), NONE)]
    preconditioner: Annotated[str, one_of(*PRECONDITIONERS), STRUCTURAL, ADDED]
    covariance: Annotated[str, one_of(*COVARIANCES), STRUCTURAL, ADDED]
    max_factor_ratio: Annotated[float | None, either(real(0, above=True), NONE), STRUCTURAL, ADDED]
    exponents: Annotated[float | tuple[float, float] | None, either(EXPONENT, pair(EXPONENT, EXPONENT), NONE), STRUCTURAL]
    exponent_multiplier: Annotated[float, real(0), STRUCTURAL]
    grafting: Annotated[str, one_of(*GRAFTING), STRUCTURAL]
    grafting_beta2: Annotated[float | None, either(real(0, 1), NONE)]
    unfactored_beta2: Annotated[float | None, either(real(0, 1), NONE), ADDED]
    grafting_eps: Annotated[float, real(0)]
    normalized_grafting: Annotated[bool, BOOL]
    relative_eps: Annotated[bool, BOOL]
    solver: Annotated[str, one_of(*SOLVERS), STRUCTURAL]
    qr_tolerance: Annotated[float, real(0, 1), ADDED]
    stagger: Annotated[bool, BOOL]
    precondition_vectors: Annotated[bool, BOOL, STRUCTURAL]
    bf16_roots: Annotated[bool, BOOL, STRUCTURAL]


MARKS = {name: hint.__metadata__ for name, hint in get_type_hints(Options, include_extras=True).items()}  # rules first
OPTIONS: dict[str, Rule] = {name: marks[0] for name, marks in MARKS.items()}


def marked(mark: str) -> list[str]:
    """Return the names of the options with this mark."""
    return [name for name, marks in MARKS.items() if mark in marks]


class Group(Options):
    """A parameter group."""

    params: list[Tensor]
    step: int  # number of steps in which any parameter of the group had a gradient
