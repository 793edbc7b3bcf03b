"""Exponents and costs of a block."""

import pytest
import torch
from common import COMPETITION

from shampoo import AdamWShampoo
from shampoo.blocks import block_exponents
from shampoo.preconditioner import Kronecker

DEFAULTS = dict(AdamWShampoo([torch.zeros(1)]).defaults) | COMPETITION


@pytest.mark.parametrize(
    ("exponents", "order", "expected"),
    [
        (None, 1, (0.5,)),
        (None, 2, (0.25, 0.25)),
        (None, 3, (1 / 6, 1 / 6, 1 / 6)),
        (0.5, 2, (0.5, 0.5)),
        ((0.25, 0.5), 1, (0.75,)),
        ((0.25, 0.5), 2, (0.25, 0.5)),
        ([0.25, 0.5], 3, (0.25, 0.25, 0.25)),
        ((0.5, 0.0), 2, (0.5, 0.0)),
    ],
)
@pytest.mark.parametrize("multiplier", [1.0, 0.5, 0.0])
def test_the_exponents_of_a_block_are_those_of_its_order_times_the_multiplier(exponents, order, expected, multiplier):
    options = DEFAULTS | {"exponents": exponents, "exponent_multiplier": multiplier}
    found = block_exponents((5,) * order, options)
    assert found == pytest.approx([multiplier * e for e in expected])


def test_the_cost_of_a_block_is_that_of_its_products_and_roots():
    """For each factor of size d of a block of n elements: 2 n d, as much for each update, and 25 d^3 for each root."""
    options = DEFAULTS | {"factor_frequency": 2, "precondition_frequency": 10}
    left, right = 2 * 12 * 4 * 1.5 + 2.5 * 4**3, 2 * 12 * 3 * 1.5 + 2.5 * 3**3
    assert Kronecker.cost((4, 3), (0.25, 0.25), options) == pytest.approx(left + right)
    assert Kronecker.cost((4, 3), (0.5, 0.0), options) == pytest.approx(left)
    assert Kronecker.cost((4, 3), (0.0, 0.0), options) == 0
