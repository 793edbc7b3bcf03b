"""Which blocks and which of their dimensions have factors, and with which exponents: pure functions of shapes and options."""

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from .blocks import Shape, cut, merge_dims

if TYPE_CHECKING:  # `options` imports this module
    from .options import Options


def merged_shape(shape: Shape, options: "Options") -> Shape:
    """Return the shape that is cut into blocks: `merge_dims` of this shape if the option is on; (1,) for a scalar."""
    if options["merge_dims"]:
        return merge_dims(shape, options["block_size"], options["max_factor_ratio"])
    return shape or (1,)


def block_exponents(block: Sequence[int], options: "Options") -> tuple[float, ...] | None:
    """Return the exponent of each dimension's inverse root, in the paper 1/p and 1/q, or None for a block without factors.

    A dimension d of a block of n elements has a factor if d^2 <= max_factor_ratio n; those without have the exponent 0. A
    vector has none if precondition_vectors is False, or with preconditioner "soap". If `exponents` is None, each is 1/(2k) for
    k factors; if it is a number, each is that number. For a pair (left, right), the first of k dimensions gets left and each
    other one right/(k-1); a vector gets left + right. All are times `exponent_multiplier`.
    """
    order, exponents, ratio = len(block), options["exponents"], options["max_factor_ratio"]
    kept = [ratio is None or d * d <= ratio * prod(block) for d in block]
    if not any(kept) or (order == 1 and (not options["precondition_vectors"] or options["preconditioner"] == "soap")):
        return None
    if exponents is None:
        each = [1 / (2 * sum(kept))] * order
    elif isinstance(exponents, (tuple, list)):
        left, right = exponents
        each = [left] + [right / (order - 1)] * (order - 1) if order > 1 else [left + right]
    else:
        each = [exponents] * order
    return tuple(options["exponent_multiplier"] * e if keep else 0.0 for e, keep in zip(each, kept, strict=True))


def parameter_exponents(shape: Shape, options: "Options") -> list[tuple[float, ...]]:
    """Return the exponents of each shape of a parameter's blocks that have factors; [] if a dimension is >= max_dim."""
    if max(shape, default=1) >= options["max_dim"]:
        return []
    found = [block_exponents(grid.block, options) for grid in cut(merged_shape(shape, options), options["block_size"])]
    return [exponents for exponents in found if exponents is not None]
