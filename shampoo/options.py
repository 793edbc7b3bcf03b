"""The options of a parameter group, their types, and their rules; checks of groups, and how error messages name parameters."""

from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Annotated, Any, Literal, TypedDict, get_args, get_type_hints

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .blocks import parameter_exponents
from .preconditioner import PRECONDITIONERS
from .rules import BOOL, NONE, Rule, check_value, either, integer, one_of, pair, real, scalar

STRUCTURAL = "determines which state there is, or which other options may: if it changes, groups are checked, and state rebuilt"
# Options that a state_dict of an earlier version may lack
ADDED = {"maximize", "cautious_decay", "factor_frequency", "preconditioner", "covariance", "max_factor_ratio",
         "unfactored_beta2", "qr_tolerance"}  # fmt: skip
NOT_NEEDED = {  # other optimizers' options, which groups may have if they are off, and why
    "amsgrad": "AdamWShampoo has no counterpart", "capturable": "step counts are on the host",
    "foreach": "updates are always batched", "fused": "updates are always batched", "differentiable": "updates are in place",
}  # fmt: skip

PreconditionerName = Literal["shampoo", "soap"]
CovarianceName = Literal["gram", "kl"]
GraftingName = Literal["none", "sgd", "adagrad", "rmsprop", "adam"]
SolverName = Literal["auto", "eigh", "qr", "newton"]
ExponentsOption = float | tuple[float, float] | Literal["auto"] | None


class Options(TypedDict):
    """The options of a parameter group; `AdamWShampoo` documents them. After its rule, an option may have the marks above."""

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
    block_size: Annotated[int, integer(1), STRUCTURAL]
    merge_dims: Annotated[bool, BOOL, STRUCTURAL]
    max_dim: Annotated[int, integer(1), STRUCTURAL]
    precondition_frequency: Annotated[int, integer(1)]
    factor_frequency: Annotated[int, integer(1)]
    start_preconditioning_step: Annotated[int | None, either(integer(1), NONE), STRUCTURAL]
    preconditioner: Annotated[PreconditionerName, one_of(*get_args(PreconditionerName)), STRUCTURAL]
    covariance: Annotated[CovarianceName, one_of(*get_args(CovarianceName)), STRUCTURAL]
    max_factor_ratio: Annotated[float | Literal["auto"] | None, either(real(0, above=True), one_of("auto", None)), STRUCTURAL]
    exponents: Annotated[ExponentsOption, either(real(0), pair(real(0), real(0)), one_of("auto", None)), STRUCTURAL]
    exponent_multiplier: Annotated[float, real(0), STRUCTURAL]
    grafting: Annotated[GraftingName, one_of(*get_args(GraftingName)), STRUCTURAL]
    grafting_beta2: Annotated[float | None, either(real(0, 1), NONE)]
    unfactored_beta2: Annotated[float | None, either(real(0, 1), NONE)]
    grafting_eps: Annotated[float, real(0)]
    normalized_grafting: Annotated[bool, BOOL, STRUCTURAL]
    relative_eps: Annotated[bool, BOOL]
    solver: Annotated[SolverName, one_of(*get_args(SolverName)), STRUCTURAL]
    qr_tolerance: Annotated[float, real(0, 1)]
    stagger: Annotated[bool, BOOL]
    precondition_vectors: Annotated[bool, BOOL, STRUCTURAL]
    bf16_roots: Annotated[bool, BOOL, STRUCTURAL]


MARKS = {name: hint.__metadata__ for name, hint in get_type_hints(Options, include_extras=True).items()}  # rules first
OPTIONS: dict[str, Rule] = {name: marks[0] for name, marks in MARKS.items()}
SETTINGS = {  # options of the optimizer as a whole, and their rules
    "exchange_dtype": one_of(None, torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "gather_mb": integer(1),
    "max_skipped_steps": integer(1),
    "shard": BOOL,
}


class Group(Options):
    """A parameter group."""

    params: list[Tensor]
    step: int  # number of steps in which any parameter of the group had a gradient


def plain(x: Any) -> Any:
    """Convert NumPy numbers to Python's, also in tuples and lists, as torch.load(weights_only=True) needs."""
    if type(x) in (tuple, list):
        return type(x)(map(plain, x))
    is_numpy = type(x).__module__ == "numpy" and isinstance(x, Real)
    return x.item() if is_numpy else x


def check_groups(groups: Sequence[Any]) -> None:
    """Raise ValueError for an invalid option or parameter of a group, or exponents that its solver cannot take.

    A key that is one edit away from an option is an error, and so is one of NOT_NEEDED that is on. Other keys are allowed,
    since schedulers and libraries add their own to groups.
    """
    params = Counter(p for group in groups for p in group["params"])
    rules = {**OPTIONS, "step": integer(0)}
    for k, group in enumerate(groups):
        if missing := rules.keys() - group.keys():
            raise ValueError(f"group {k} lacks {', '.join(sorted(missing))}; add_param_group() fills in defaults")
        for name, value in group.items():
            if name not in OPTIONS and len(name) > 2 and (near := [option for option in OPTIONS if is_one_edit(name, option)]):
                raise ValueError(f"a parameter group has the unknown option {name}; did you mean {near[0]}?")
            if name in NOT_NEEDED and value:
                raise ValueError(f"{name} is {value!r}; it must be False or None: {NOT_NEEDED[name]}")
        for name, rule in rules.items():
            check_value(name, group[name], rule)
        for i, p in enumerate(group["params"]):
            if not isinstance(p, Tensor):
                raise ValueError(f"params of a parameter group holds {p!r}; it must hold tensors")
            name = parameter_name(group, i)
            check_parameter(p, name)
            if params[p] > 1:
                raise ValueError(f"{name} of group {k} appears {params[p]} times in param_groups; keep it once")
        exponents = {each for p in group["params"] if not is_lazy(p) for each in parameter_exponents(tuple(p.shape), group)}
        PRECONDITIONERS[group["preconditioner"]].check(group, exponents)


def is_one_edit(a: str, b: str) -> bool:
    """Return whether a becomes b by inserting, deleting, or replacing one character, or by swapping two adjacent ones."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rest, other = a[same:], b[same:]
    swapped = rest[:2] == other[:2][::-1] and rest[2:] == other[2:]
    return swapped or rest[1:] in (other, other[1:]) or rest == other[1:]


def parameter_name(group: Mapping[str, Any], i: int) -> str:
    """Return "parameter NAME of shape (...)" for error messages, with the index in the group if there is no name."""
    names, p = group.get("param_names"), group["params"][i]
    shape = "unknown shape" if is_lazy(p) else f"shape {tuple(p.shape)}"
    name = names[i] if names and len(names) == len(group["params"]) else i  # they differ if a user changed the group
    return f"parameter {name} of {shape}"


def parameter_names(groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, str]:
    """Return the `parameter_name` of each parameter."""
    return {p: parameter_name(group, i) for group in groups for i, p in enumerate(group["params"])}


def describe(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return lines that must be equal on all ranks: one per group, option, and parameter."""
    lines = []
    for k, group in enumerate(groups):
        lines += [f"group {k}", *(f"option {name} = {group[name]!r}" for name in [*OPTIONS, "step"])]
        lines += [f"{parameter_name(group, i)} of {p.dtype}" for i, p in enumerate(group["params"])]
    return lines


def overlaps(p: Tensor) -> bool:
    """Return whether elements of a tensor may share memory, as after `expand`.

    They may if a stride is at most the sum of (size - 1) * stride over the dimensions with smaller strides.
    """
    dims = sorted((stride, size) for stride, size in zip(p.stride(), p.shape, strict=True) if size > 1)
    return any(dims[i][0] <= sum(stride * (size - 1) for stride, size in dims[:i]) for i in range(len(dims)))


def check_parameter(p: Tensor, name: str) -> None:
    """Raise ValueError unless p is dense, floating-point, without elements that share memory, and no FSDP1 FlatParameter."""
    if getattr(p, "_is_flat_param", False):
        raise ValueError(f"{name} is an FSDP1 FlatParameter, which holds pieces of several parameters; use FSDP2 (fully_shard)")
    if not p.is_floating_point() or p.layout != torch.strided:
        raise ValueError(f"{name} is {p.layout} of {p.dtype}; it must be a dense floating-point tensor")
    if not is_lazy(p) and p.numel() and overlaps(p):
        raise ValueError(f"{name} has strides {p.stride()}: its elements may share memory; pass a clone() of it")
