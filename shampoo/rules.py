"""Rules for the values of options: what is allowed, and how an error message describes it."""

from collections.abc import Callable
from math import inf
from numbers import Integral, Real
from typing import Any

from torch import Tensor

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
    """Allow integers in [low, LARGEST], but not bool."""
    return lambda x: isinstance(x, Integral) and real(low)[0](x), f"an integer >= {low} and <= {LARGEST}"


def one_of(*values: Any) -> Rule:
    """Allow these values; types must match, so 1 is not True."""
    return lambda x: any(type(x) is type(v) and x == v for v in values), "one of " + ", ".join(map(repr, values))


def scalar(rule: Rule) -> Rule:
    """Allow tensors of one element that the rule allows."""
    return lambda x: isinstance(x, Tensor) and x.numel() == 1 and rule[0](x.item()), f"a tensor of one element, {rule[1]}"


def pair(first: Rule, second: Rule) -> Rule:
    """Allow tuples and lists of two values, each allowed by its rule."""
    words = f"a pair: {first[1]}, and {second[1]}"
    return lambda x: isinstance(x, (tuple, list)) and len(x) == 2 and first[0](x[0]) and second[0](x[1]), words


def either(*rules: Rule) -> Rule:
    """Allow what any of the rules allows."""
    return lambda x: any(allowed(x) for allowed, _ in rules), ", or ".join(words for _, words in rules)


NONE: Rule = (lambda x: x is None, "None")
BOOL: Rule = one_of(True, False)


def check_value(name: str, value: Any, rule: Rule) -> None:
    """Raise ValueError, with the name, the value, and what is allowed, unless the rule allows the value."""
    allowed, words = rule
    if not allowed(value):
        raise ValueError(f"{name} is {value!r}; it must be {words}")
