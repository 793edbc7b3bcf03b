"""The type of a parameter group: a misspelled option is a type error."""

from typing import TypedDict

from torch import Tensor


class Options(TypedDict):
    """The options of a parameter group; `AdamWShampoo` documents them."""

    lr: float | Tensor
    maximize: bool
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled_weight_decay: bool
    momentum: float
    nesterov: bool
    nadam: bool
    bias_correction: bool
    block_size: int
    merge_dims: bool
    max_dim: int
    precondition_frequency: int
    factor_frequency: int
    start_preconditioning_step: int | None
    preconditioner: str
    exponents: float | tuple[float, float] | None
    exponent_multiplier: float
    grafting: str
    grafting_beta2: float | None
    grafting_eps: float
    normalized_grafting: bool
    relative_eps: bool
    solver: str
    qr_tolerance: float
    stagger: bool
    precondition_vectors: bool
    bf16_roots: bool


class Group(Options):
    """A parameter group."""

    params: list[Tensor]
    step: int  # number of steps in which any parameter of the group had a gradient
