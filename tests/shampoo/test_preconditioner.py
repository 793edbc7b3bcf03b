"""Exponents and costs of a block."""

from math import prod

import pytest
import torch
from common import COMPETITION, make_params, train
from torch.utils.flop_counter import FlopCounterMode

from shampoo import AdamWShampoo
from shampoo.blocks import block_exponents
from shampoo.preconditioner import PRECONDITIONERS, Kronecker

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


@pytest.mark.parametrize("shape", [(12, 8), (20, 9), (6, 5, 4)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"exponents": (0.5, 0.0)},
        {"betas": (0.9, 1.0)},
        {"covariance": "kl", "exponents": 0.5},
        {"preconditioner": "soap"},
        {"max_factor_ratio": 1.0},
    ],
    ids=str,
)
def test_the_cost_of_an_ordinary_step_is_that_of_the_products_that_torch_counts(shape, options):
    common = {"block_size": 12, "merge_dims": False, "start_preconditioning_step": 1, "precondition_frequency": 10**9}
    params = make_params(shape)
    optimizer = AdamWShampoo(params, **common, **options)
    train(optimizer, params, 2)
    in_place = {torch.ops.aten.baddbmm_: lambda A, X, Y, **_: 2 * prod(X) * Y[-1]}  # torch counts only baddbmm
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        train(optimizer, params, 1, first=2)
    (group,), (bucket,) = optimizer.param_groups, optimizer._buckets
    cost = PRECONDITIONERS[group["preconditioner"]].cost
    stacks = [(number, block, block_exponents(tuple(block), group)) for number, *block in bucket.layout.stacks]
    expected = sum(number * cost(block, exponents, group) for number, block, exponents in stacks if exponents)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-4)
    assert expected > 0
