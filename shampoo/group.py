"""The options of a parameter group, each with its type and its rule: a misspelled option is a type error."""

from typing import Annotated, TypedDict, get_type_hints

from torch import Tensor

from .grafting import GRAFTING
from .preconditioner import COVARIANCES, PRECONDITIONERS
from .roots import SOLVERS
from .rules import BOOL, EXPONENT, NONE, Rule, either, integer, one_of, pair, real, scalar


class Options(TypedDict):
    """The options of a parameter group; `AdamWShampoo` documents them."""

    lr: Annotated[float | Tensor, either(real(0), scalar(real(0)))]
    maximize: Annotated[bool, BOOL]
    betas: Annotated[tuple[float, float], pair(real(0, 1, below=True), real(0, 1))]
    eps: Annotated[float, real(0, above=True)]
    weight_decay: Annotated[float, real(0)]
    decoupled_weight_decay: Annotated[bool, BOOL]
    cautious_decay: Annotated[bool, BOOL]
    momentum: Annotated[float, real(0, 1, below=True)]
    nesterov: Annotated[bool, BOOL]
    nadam: Annotated[bool, BOOL]
    bias_correction: Annotated[bool, BOOL]
    block_size: Annotated[int, integer(1)]
    merge_dims: Annotated[bool, BOOL]
    max_dim: Annotated[int, integer(1)]
    precondition_frequency: Annotated[int, integer(1)]
    factor_frequency: Annotated[int, integer(1)]
    start_preconditioning_step: Annotated[int | None, either(integer(1), NONE)]
    preconditioner: Annotated[str, one_of(*PRECONDITIONERS)]
    covariance: Annotated[str, one_of(*COVARIANCES)]
    max_factor_ratio: Annotated[float | None, either(real(0, above=True), NONE)]
    exponents: Annotated[float | tuple[float, float] | None, either(EXPONENT, pair(EXPONENT, EXPONENT), NONE)]
    exponent_multiplier: Annotated[float, real(0)]
    grafting: Annotated[str, one_of(*GRAFTING)]
    grafting_beta2: Annotated[float | None, either(real(0, 1), NONE)]
    unfactored_beta2: Annotated[float | None, either(real(0, 1), NONE)]
    grafting_eps: Annotated[float, real(0)]
    normalized_grafting: Annotated[bool, BOOL]
    relative_eps: Annotated[bool, BOOL]
    solver: Annotated[str, one_of(*SOLVERS)]
    qr_tolerance: Annotated[float, real(0, 1)]
    stagger: Annotated[bool, BOOL]
    precondition_vectors: Annotated[bool, BOOL]
    bf16_roots: Annotated[bool, BOOL]


OPTIONS: dict[str, Rule] = {name: hint.__metadata__[0] for name, hint in get_type_hints(Options, include_extras=True).items()}


class Group(Options):
    """A parameter group."""

    params: list[Tensor]
    step: int  # number of steps in which any parameter of the group had a gradient
