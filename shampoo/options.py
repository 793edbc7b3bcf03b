"""What each option of the optimizer may be, and the checks that say so."""

from collections.abc import Callable, Sequence
from math import inf
from numbers import Integral, Real
from typing import Any

import torch

from .grafting import GRAFTING
from .roots import SOLVERS

LARGEST = 1e38  # what float32 holds, with room to spare

Rule = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and the words for what is


def real(low: float, high: float = inf, *, above: bool = False, below: bool = False) -> Rule:
    """A number in [low, high] that float32 can hold; with `above` not low itself, with `below` not high itself."""

    def allowed(x: Any) -> bool:
        """Whether x is such a number."""
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


def plain(x: Any) -> Any:
    """NumPy's numbers as Python's, which `weights_only` checkpoints can hold; everything else as it is."""
    if isinstance(x, (tuple, list)):
        return type(x)(map(plain, x))
    if type(x).__module__ != "numpy" or not isinstance(x, Real):
        return x
    return int(x) if isinstance(x, Integral) else float(x)


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
    "relative_eps": BOOL,
    "qr_tolerance": real(0, 1),
    "start_preconditioning_step": either(integer(1), NONE),
    "exponents": either(EXPONENT, pair(EXPONENT, EXPONENT), NONE),
    "exponent_multiplier": real(0),
    "grafting": one_of(*GRAFTING),
    "grafting_beta2": either(real(0, 1), NONE),
    "grafting_eps": real(0),
    "normalized_grafting": BOOL,
    "solver": one_of(*SOLVERS),
    "stagger": BOOL,
    "precondition_vectors": BOOL,
    "bf16_roots": BOOL,
}


def check_value(name: str, value: Any, rule: Rule) -> None:
    """Raise ValueError unless the rule allows the value."""
    allowed, words = rule
    if not allowed(value):
        raise ValueError(f"{name} is {value!r}; it must be {words}")


def check_options(options: dict[str, Any]) -> None:
    """Raise ValueError, naming option, value and what is allowed, unless every option is there and in range, and
    the count of steps, if it is there.
    """
    for name, rule in OPTIONS.items():
        if name not in options:
            raise ValueError(f"option {name} is missing; it must be {rule[1]}")
        check_value(name, options[name], rule)
    check_value("step", options.get("step", 0), integer(0))


def check_exchange(dtype: Any) -> None:
    """Raise ValueError unless ranks can exchange directions in this dtype; None is that of the state."""
    check_value("exchange_dtype", dtype, one_of(None, torch.float32, torch.bfloat16, torch.float16, torch.float64))


def check_limit(steps: Any) -> None:
    """Raise ValueError unless this is a number of steps that may be skipped."""
    check_value("max_skipped_steps", steps, integer(1))


def check_rank(to: Any, size: int) -> None:
    """Raise ValueError unless `to` is a rank of a group of this size, or None."""
    check_value("to", to, one_of(None, *range(size)))


def parameter_name(group: dict[str, Any], i: int) -> str:
    """What errors call the i-th parameter of a group: its name where the group has names, and its place and shape."""
    names = group.get("param_names")
    return f"parameter {names[i] if names else i} of shape {tuple(group['params'][i].shape)}"


def parameter_names(groups: Sequence[dict[str, Any]]) -> dict[torch.Tensor, str]:
    """What errors call each parameter."""
    return {p: parameter_name(group, i) for group in groups for i, p in enumerate(group["params"])}


def describe(groups: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each group, option and parameter: what all ranks must have alike."""
    lines = []
    for k, group in enumerate(groups):
        lines += [f"group {k}", *(f"option {name} = {group[name]!r}" for name in [*OPTIONS, "step"])]
        lines += [f"{parameter_name(group, i)} of {p.dtype}" for i, p in enumerate(group["params"])]
    return lines


def overlaps(p: torch.Tensor) -> bool:
    """Whether numbers of a tensor may share memory, as after `expand`: a stride is no larger than what smaller ones reach."""
    reach = 0
    for stride, size in sorted(zip(p.stride(), p.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def check_parameters(group: dict[str, Any]) -> None:
    """Raise ValueError if a parameter is not a dense tensor of a real floating dtype, shares memory with itself, or holds
    several, as FSDP1 makes them.
    """
    for i, p in enumerate(group["params"]):
        if getattr(p, "_is_flat_param", False):
            raise ValueError(f"{parameter_name(group, i)} is a part of several, as FSDP1 makes them; use FSDP2, fully_shard")
        if not p.is_floating_point() or p.layout != torch.strided:
            raise ValueError(f"{parameter_name(group, i)} is {p.layout} of {p.dtype}; it must be dense, real and floating")
        if p.numel() and overlaps(p):
            raise ValueError(f"{parameter_name(group, i)} has strides {p.stride()}: numbers may share memory; clone() it")


def check_gradients(group: dict[str, Any]) -> None:
    """Raise RuntimeError if a gradient is sparse or complex."""
    for i, p in enumerate(group["params"]):
        if p.grad is not None and (p.grad.layout != torch.strided or p.grad.is_complex()):
            raise RuntimeError(
                f"the gradient of {parameter_name(group, i)} has layout {p.grad.layout} and dtype {p.grad.dtype}; "
                "it must be dense and real (for an embedding: sparse=False)"
            )
