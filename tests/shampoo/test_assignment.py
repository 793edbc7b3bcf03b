"""Which rank owns which block."""

from math import prod

import pytest
import torch
from common import assemble
from hypothesis import given
from hypothesis import strategies as st

from shampoo.assignment import Cost, assign, share_blocks
from shampoo.copies import load


@given(st.lists(st.tuples(st.floats(0.1, 1000), st.integers(1, 99)), max_size=60), st.integers(1, 9))
def test_costs_are_balanced_first(items, ranks):
    items = [Cost(*item) for item in items]
    owners, loads = assign(items, [Cost(0.0, 0)] * ranks)
    for r, of_rank in enumerate(loads):
        own = [item for item, owner in zip(items, owners) if owner == r]
        assert of_rank == (pytest.approx(sum(item.flops for item in own)), sum(item.numel for item in own))
    mean, largest = sum(rank.flops for rank in loads) / ranks, max((item.flops for item in items), default=0)
    assert max(rank.flops for rank in loads) <= max(1.03 * mean, mean + largest) + 1e-6


def test_elements_are_balanced_too_where_costs_allow_it():
    items = [Cost(100.0, 5)] + [Cost(1.0, numel) for numel in (9, 1, 1, 7, 1, 1)]
    _, loads = assign(items, [Cost(0.0, 0)] * 3)
    assert sorted(loads) == [(2, 10), (4, 10), (100, 5)]


def test_the_blocks_of_all_ranks_are_those_of_a_single_process():
    shapes = [(5, 7), (4,), (), (3, 3, 3), (8, 8)]
    merged = [shape or (1,) for shape in shapes]
    (single,), _ = share_blocks(merged, 4)
    distributed, _ = share_blocks(merged, 4, flops=prod, loads=[Cost(0.0, 0)] * 3)
    tensors = [torch.randn(shape) for shape in shapes]
    flats = [load(layout, tensors, torch.float32, torch.device("cpu"))[0] for layout in distributed]
    assert sum(layout.numel for layout in distributed) == single.numel
    assert all(torch.equal(x.view(y.shape), y) for x, y in zip(assemble(distributed, flats), tensors))
