"""Shapes of blocks: every element of every parameter is in exactly one."""

from itertools import chain, pairwise
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shampoo.blocks import cut, merge_dims, split, stack, view

shapes = st.lists(st.integers(1, 9), max_size=4).map(tuple)


@pytest.mark.parametrize(
    ("shape", "merged"),
    [
        ((64, 64, 3, 3), (64, 576)),
        ((512, 512, 3, 3), (512, 512, 9)),
        ((1280,), (1280,)),
        ((1, 8, 1), (8,)),
        ((), (1,)),
        ((1, 1), (1,)),
        ((4, 300, 2, 5), (4, 600, 5)),
        ((2048, 512, 1, 1), (2048, 512)),
        ((32, 32, 1, 7), (1024, 7)),
    ],
)
def test_dimensions_are_merged_up_to_the_limit(shape, merged):
    assert merge_dims(shape, 1024) == merged


@pytest.mark.parametrize(
    ("shape", "ratio", "merged"),
    [
        ((64, 64, 3, 3), 1.0, (64, 64, 9)),
        ((16, 3, 3, 3), 1.0, (16, 3, 9)),
        ((16, 3, 3, 3), 2.0, (16, 27)),
        ((16, 16), 1.0, (16, 16)),
        ((12, 64, 768), 1.0, (768, 768)),
        ((512, 512, 3, 3), 2.0, (512, 512, 9)),
        ((5,), 1.0, (5,)),
        ((1, 1), 1.0, (1,)),
    ],
)
def test_merged_dimensions_are_small_enough_for_factors(shape, ratio, merged):
    assert merge_dims(shape, 1024, ratio) == merged


@given(shape=shapes, limit=st.integers(1, 50), ratio=st.floats(0.5, 4))
def test_no_merged_dimension_is_larger_than_its_block_warrants(shape, limit, ratio):
    merged = merge_dims(shape, limit, ratio)
    numel = prod(min(size, limit) for size in merged)
    assert prod(merged) == prod(shape)
    assert numel == prod(min(size, limit) for size in shape)
    assert all(size == 1 or size in shape or size**2 <= ratio * numel for size in merged)


@given(shape=shapes, limit=st.integers(1, 50))
def test_merging_keeps_all_elements_and_merges_wherever_allowed(shape, limit):
    merged = merge_dims(shape, limit)
    assert prod(merged) == prod(shape)
    assert all(a * b > limit for a, b in pairwise(merged))


@pytest.mark.parametrize(
    ("shape", "grids"),
    [
        ((1280,), [((0,), (1,), (1024,)), ((1024,), (1,), (256,))]),
        ((2500, 30), [((0, 0), (2, 1), (1024, 30)), ((2048, 0), (1, 1), (452, 30))]),
        ((2048, 2048), [((0, 0), (2, 2), (1024, 1024))]),
        ((0, 4), []),
    ],
)
def test_shapes_are_cut_into_grids_of_equal_blocks(shape, grids):
    assert [grid[:3] for grid in cut(shape, 1024)] == grids


@given(shape=shapes.filter(len), block_size=st.integers(1, 10), single=st.booleans())
def test_grids_cover_every_element_once(shape, block_size, single):
    X = torch.zeros(shape)
    grids = cut(shape, block_size)
    assert len(grids) <= 2 ** len(shape)
    for grid in chain(*map(split, grids)) if single else grids:
        assert max(grid.block) <= block_size
        found = view(grid, shape)
        X.as_strided(found.shape, found.stride, found.offset).add_(1)
    assert (X == 1).all()


def test_a_block_of_a_stack_knows_its_parameter():
    shapes = [(4, 6), (2, 3), (5, 3)]
    layout = stack(shapes, [grid for i, shape in enumerate(shapes) for grid in cut(shape, 3, i)])
    found = {shape[1:]: params for shape, params in zip(layout.stacks, layout.params)}
    assert found == {(3, 3): [0, 0, 2], (1, 3): [0, 0], (2, 3): [1, 2]}
