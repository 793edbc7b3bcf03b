"""Checks of options, parameter groups, and parameters, and how error messages name them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .factors import parameter_exponents
from .group import OPTIONS, Options
from .preconditioner import PRECONDITIONERS
from .rules import check_value, integer

# Options of other torch optimizers that groups may have only if they are off, and why.
NOT_NEEDED = {
    "amsgrad": "AdamWShampoo has no counterpart",
    "foreach": "updates are always batched",
    "fused": "updates are always batched",
    "capturable": "step counts are on the host",
    "differentiable": "weights are updated in place",
}


def plain(x: Any) -> Any:
    """Convert NumPy numbers to Python's, also in tuples and lists, as torch.load(weights_only=True) needs."""
    if type(x) in (tuple, list):
        return type(x)(map(plain, x))
    if type(x).__module__ != "numpy" or not isinstance(x, Real):
        return x
    return int(x) if isinstance(x, Integral) else float(x)


def set_start(group: dict[str, Any]) -> None:
    """Replace None for start_preconditioning_step, so that a later change of the frequency does not move it."""
    if group["start_preconditioning_step"] is None:
        group["start_preconditioning_step"] = 1 if group["preconditioner"] == "soap" else group["precondition_frequency"]


def check_groups(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for an invalid option or parameter of a group, or exponents that its solver cannot take."""
    params = Counter(p for group in groups for p in group["params"])
    rules = {**OPTIONS, "step": integer(0)}
    for k, group in enumerate(groups):
        if missing := rules.keys() - group.keys():
            raise ValueError(
                f"group {k} lacks {', '.join(sorted(missing))}; add groups with add_param_group(), which fills in defaults"
            )
        check_names(group)
        for name, rule in rules.items():
            check_value(name, group[name], rule)
        for i, p in enumerate(group["params"]):
            if not isinstance(p, Tensor):
                raise ValueError(f"params of a parameter group holds {p!r}; it must hold tensors")
            name = parameter_name(group, i)
            check_parameter(p, name)
            if params[p] > 1:
                raise ValueError(f"{name} of group {k} appears {params[p]} times in param_groups; keep it once")
        own = cast(Options, group)
        exponents = {each for p in group["params"] if not is_lazy(p) for each in parameter_exponents(tuple(p.shape), own)}
        PRECONDITIONERS[group["preconditioner"]].check(own, exponents)


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
