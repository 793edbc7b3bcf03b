"""Allowed values of the optimizer's options, and checks of options and parameters."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import inf
from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .blocks import merged_shape
from .grafting import GRAFTING
from .group import Options
from .preconditioner import PRECONDITIONERS, block_exponents
from .roots import SOLVERS
from .update import LARGEST

Rule = tuple[Callable[[Any], bool], str]  # (whether a value is allowed, description of allowed values)


def real(low: float, high: float = inf, *, above: bool = False, below: bool = False) -> Rule:
    """Allow numbers in [low, high], excluding low if `above` and high if `below`, of magnitude at most LARGEST (1e38)."""

    def allowed(x: Any) -> bool:
        """Return whether x is such a number, and not a bool."""
        number = isinstance(x, Real) and not isinstance(x, bool) and bool(-LARGEST <= x <= LARGEST)  # type: ignore[operator]
        return number and low <= x <= high and not (above and x == low) and not (below and x == high)

    return allowed, f"a number {'>' if above else '>='} {low} and {'<' if below else '<='} {min(high, LARGEST)}"


def integer(low: int) -> Rule:
    """Allow integers >= low, but not bool."""
    return lambda x: isinstance(x, Integral) and not isinstance(x, bool) and int(x) >= low, f"an integer >= {low}"


def one_of(*values: Any) -> Rule:
    """Allow these values; types must match, so 1 is not True."""
    return lambda x: any(type(x) is type(v) and x == v for v in values), "one of " + ", ".join(map(repr, values))


def scalar(rule: Rule) -> Rule:
    """Allow tensors of one element that the rule allows."""
    return lambda x: isinstance(x, Tensor) and x.numel() == 1 and rule[0](x.item()), f"a tensor of one element, {rule[1]}"


def pair(first: Rule, second: Rule) -> Rule:
    """Allow tuples and lists of two values, each allowed by its rule."""
    return (
        lambda x: isinstance(x, (tuple, list)) and len(x) == 2 and first[0](x[0]) and second[0](x[1]),
        f"a pair: {first[1]}, and {second[1]}",
    )


def either(*rules: Rule) -> Rule:
    """Allow what any of the rules allows."""
    return lambda x: any(allowed(x) for allowed, _ in rules), ", or ".join(words for _, words in rules)


NONE: Rule = (lambda x: x is None, "None")
BOOL: Rule = one_of(True, False)
EXPONENT: Rule = real(0)

OPTIONS: dict[str, Rule] = {
    "lr": either(real(0), scalar(real(0))),
    "maximize": BOOL,
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
# Options of the whole optimizer, not of a group.
EXCHANGE_DTYPE = one_of(None, torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_SKIPPED_STEPS = integer(1)
# Options of other torch optimizers that groups may have only if they are off, and why.
NOT_NEEDED = {
    "amsgrad": "AdamWShampoo has no counterpart",
    "foreach": "updates are always batched",
    "fused": "updates are always batched",
    "capturable": "step counts are on the host",
    "differentiable": "weights are updated in place",
}
# Options that determine which state there is. If one changes, state is rebuilt from what fits.
STRUCTURAL = (
    "block_size", "merge_dims", "max_dim", "precondition_vectors", "preconditioner", "exponents", "exponent_multiplier",
    "grafting", "solver", "bf16_roots",
)  # fmt: skip


def plain(x: Any) -> Any:
    """Convert NumPy numbers to Python's, also in tuples and lists, as torch.load(weights_only=True) needs."""
    if type(x) in (tuple, list):
        return type(x)(map(plain, x))
    if type(x).__module__ != "numpy" or not isinstance(x, Real):
        return x
    return int(x) if isinstance(x, Integral) else float(x)


def check_value(name: str, value: Any, rule: Rule) -> None:
    """Raise ValueError, with the name, the value, and what is allowed, unless the rule allows the value."""
    allowed, words = rule
    if not allowed(value):
        raise ValueError(f"{name} is {value!r}; it must be {words}")


def check_groups(groups: Sequence[Mapping[str, Any]]) -> None:
    """Check all groups with `check_group`."""
    params = Counter(p for group in groups for p in group["params"])
    for k, group in enumerate(groups):
        if missing := OPTIONS.keys() - group.keys():
            raise ValueError(
                f"group {k} lacks {', '.join(sorted(missing))}; add groups with add_param_group(), which fills in defaults"
            )
        check_group(group)
        for i, p in enumerate(group["params"]):
            if params[p] > 1:
                raise ValueError(
                    f"{parameter_name(group, i)} of group {k} appears {params[p]} times in param_groups; keep it once"
                )


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError for an invalid option or parameter of a group, or exponents that its solver cannot take."""
    check_names(group)
    for name, rule in OPTIONS.items():
        check_value(name, group[name], rule)
    check_value("step", group["step"], integer(0))
    for i, p in enumerate(group["params"]):
        if not isinstance(p, Tensor):
            raise ValueError(f"params of a parameter group holds {p!r}; it must hold tensors")
        check_parameter(p, parameter_name(group, i))
        if not is_lazy(p):
            order = len(merged_shape(tuple(p.shape), group["block_size"], group["merge_dims"]))
            SOLVERS[group["solver"]].check(block_exponents(order, cast(Options, group)))


def check_names(group: Mapping[str, Any]) -> None:
    """Raise ValueError for a key that is one edit away from an option, and for a key of NOT_NEEDED that is on.

    Other unknown keys are allowed, since schedulers and libraries add their own to groups.
    """
    for name, value in group.items():
        near = [option for option in OPTIONS if is_one_edit(name, option)] if name not in OPTIONS and len(name) > 2 else []
        if near:
            raise ValueError(f"a parameter group has the unknown option {name}; did you mean {near[0]}?")
        if name in NOT_NEEDED and value:
            raise ValueError(f"{name} is {value!r}; it must be False or None: {NOT_NEEDED[name]}")


def is_one_edit(a: str, b: str) -> bool:
    """Return whether a becomes b by inserting, deleting, or replacing one character, or by swapping two adjacent ones."""
    shorter, longer = sorted((a, b), key=len)
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(shorter))
    rest, other = a[same:], b[same:]
    swapped = rest[:2] == other[:2][::-1] and rest[2:] == other[2:]
    return len(longer) <= len(shorter) + 1 and (rest[1:] == other[1:] or shorter[same:] == longer[same + 1 :] or swapped)


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
    reach = 0
    for stride, size in sorted(zip(p.stride(), p.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def check_parameter(p: Tensor, name: str) -> None:
    """Raise ValueError unless p is dense, floating-point, without elements that share memory, and no FSDP1 FlatParameter."""
    if getattr(p, "_is_flat_param", False):
        raise ValueError(f"{name} is an FSDP1 FlatParameter, which holds pieces of several parameters; use FSDP2 (fully_shard)")
    if not p.is_floating_point() or p.layout != torch.strided:
        raise ValueError(f"{name} is {p.layout} of {p.dtype}; it must be a dense floating-point tensor")
    if not is_lazy(p) and p.numel() and overlaps(p):
        raise ValueError(f"{name} has strides {p.stride()}: its elements may share memory; pass a clone() of it")
