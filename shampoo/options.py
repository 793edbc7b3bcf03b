"""What each option of the optimizer may be, and the checks that say so."""

from collections.abc import Callable, Mapping, Sequence
from math import inf
from numbers import Integral, Real
from typing import Any, TypedDict

import torch
from torch import Tensor

from .grafting import GRAFTING
from .preconditioner import PRECONDITIONERS
from .roots import SOLVERS

LARGEST = 1e38  # what float32 holds, with room to spare

Rule = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and the words for what is


class Options(TypedDict):
    """The options of a parameter group; `AdamWShampoo` documents them."""

    lr: float
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
    step: int  # how many steps had a gradient


def real(low: float, high: float = inf, *, above: bool = False, below: bool = False) -> Rule:
    """A number in [low, high] that float32 can hold; with `above` not low itself, with `below` not high itself."""

    def allowed(x: Any) -> bool:
        """Return whether x is such a number."""
        number = isinstance(x, Real) and not isinstance(x, bool) and abs(float(x)) <= LARGEST
        return number and low <= x <= high and not (above and x == low) and not (below and x == high)

    bounds = [f"{'>' if above else '>='} {low}"] + [f"{'<' if below else '<='} {min(high, LARGEST)}"]
    return allowed, f"a number {' and '.join(bounds)}"


def integer(low: int) -> Rule:
    """An int >= low."""
    return lambda x: isinstance(x, Integral) and not isinstance(x, bool) and int(x) >= low, f"an integer >= {low}"


def one_of(*values: Any) -> Rule:
    """One of the values, of the same type."""
    return lambda x: any(type(x) is type(v) and x == v for v in values), "one of " + ", ".join(map(repr, values))


def pair(first: Rule, second: Rule) -> Rule:
    """A tuple or list of two."""
    return (
        lambda x: isinstance(x, (tuple, list)) and len(x) == 2 and first[0](x[0]) and second[0](x[1]),
        f"a pair: {first[1]}, and {second[1]}",
    )


def either(*rules: Rule) -> Rule:
    """What any of the rules allows."""
    return lambda x: any(allowed(x) for allowed, _ in rules), ", or ".join(words for _, words in rules)


NONE: Rule = (lambda x: x is None, "None")
BOOL: Rule = one_of(True, False)
EXPONENT: Rule = real(0)

OPTIONS: dict[str, Rule] = {
    "lr": real(0),
    "betas": pair(real(0, 1, below=True), real(0, 1)),
    "eps": real(0, above=True),
    "weight_decay": real(0),
    "decoupled_weight_decay": BOOL,
    "momentum": real(0, 1, below=True),
    "nesterov": BOOL,
    "nadam": BOOL,
    "bias_correction": BOOL,
    "block_size": integer(1),
    "merge_dims": BOOL,
    "max_dim": integer(1),
    "precondition_frequency": integer(1),
    "factor_frequency": integer(1),
    "start_preconditioning_step": either(integer(1), NONE),
    "preconditioner": one_of(*PRECONDITIONERS),
    "exponents": either(EXPONENT, pair(EXPONENT, EXPONENT), NONE),
    "exponent_multiplier": real(0),
    "grafting": one_of(*GRAFTING),
    "grafting_beta2": either(real(0, 1), NONE),
    "grafting_eps": real(0),
    "normalized_grafting": BOOL,
    "relative_eps": BOOL,
    "solver": one_of(*SOLVERS),
    "qr_tolerance": real(0, 1),
    "stagger": BOOL,
    "precondition_vectors": BOOL,
    "bf16_roots": BOOL,
}
STEP = integer(0)
# Options of the whole optimizer, not of a group.
EXCHANGE_DTYPE = one_of(None, torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_SKIPPED_STEPS = integer(1)
# Keys that a group may have besides: torch's, and what schedulers and other libraries add.
FOREIGN_KEYS = {"params", "param_names", "step", "initial_lr", "name", "lr_scale"}


def plain(x: Any) -> Any:
    """Return a NumPy scalar as Python's, which `weights_only` checkpoints can hold; anything else unchanged."""
    if isinstance(x, (tuple, list)):
        return type(x)(map(plain, x))
    if type(x).__module__ != "numpy" or not isinstance(x, Real):
        return x
    return int(x) if isinstance(x, Integral) else float(x)


def check_value(name: str, value: Any, rule: Rule) -> None:
    """Raise ValueError unless the rule allows the value."""
    allowed, words = rule
    if not allowed(value):
        raise ValueError(f"{name} is {value!r}; it must be {words}")


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError, naming option, value, and what is allowed, unless every option is present and in range.

    Checks the count of steps too, if there is one.
    """
    for name, rule in OPTIONS.items():
        if name not in options:
            raise ValueError(f"option {name} is missing; it must be {rule[1]}")
        check_value(name, options[name], rule)
    check_value("step", options.get("step", 0), STEP)


def check_names(group: Mapping[str, Any]) -> None:
    """Raise ValueError if a group has a key that is neither an option nor one of FOREIGN_KEYS."""
    unknown = set(group) - set(OPTIONS) - FOREIGN_KEYS
    if unknown:
        raise ValueError(f"a parameter group has the unknown options {sorted(unknown)}; allowed are {sorted(OPTIONS)}")


def parameter_name(group: Mapping[str, Any], i: int) -> str:
    """Return what errors call the i-th parameter of a group: its name, or else its index, and its shape."""
    names = group.get("param_names")
    return f"parameter {names[i] if names else i} of shape {tuple(group['params'][i].shape)}"


def parameter_names(groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, str]:
    """Return what errors call each parameter."""
    return {p: parameter_name(group, i) for group in groups for i, p in enumerate(group["params"])}


def describe(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each group, option, and parameter: what must be the same on all ranks."""
    lines = []
    for k, group in enumerate(groups):
        lines += [f"group {k}", *(f"option {name} = {group[name]!r}" for name in [*OPTIONS, "step"])]
        lines += [f"{parameter_name(group, i)} of {p.dtype}" for i, p in enumerate(group["params"])]
    return lines


def overlaps(p: Tensor) -> bool:
    """Return whether elements of a tensor may share memory, as after `expand`: a stride within the reach of smaller ones."""
    reach = 0
    for stride, size in sorted(zip(p.stride(), p.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def check_parameters(group: Mapping[str, Any]) -> None:
    """Raise ValueError if a parameter is not dense, real, and floating, overlaps itself, or is a flat one of FSDP1."""
    for i, p in enumerate(group["params"]):
        if getattr(p, "_is_flat_param", False):
            raise ValueError(f"{parameter_name(group, i)} is a part of several, as FSDP1 makes them; use FSDP2, fully_shard")
        if not p.is_floating_point() or p.layout != torch.strided:
            raise ValueError(f"{parameter_name(group, i)} is {p.layout} of {p.dtype}; it must be dense, real and floating")
        if p.numel() and overlaps(p):
            raise ValueError(f"{parameter_name(group, i)} has strides {p.stride()}: elements may share memory; clone() it")
