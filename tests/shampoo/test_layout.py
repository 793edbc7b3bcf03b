"""Blocks, stacks and the flat vector: every element of every parameter is in exactly one place."""

from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shampoo.blocking import cut, merge_dims
from shampoo.layout import Load, apply, assign, build_layouts, flatten, gather, load, stack_views, tile_view

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


@given(shape=shapes, limit=st.integers(1, 50))
def test_merging_keeps_all_elements_and_merges_wherever_allowed(shape, limit):
    merged = merge_dims(shape, limit)
    assert prod(merged) == prod(shape)
    assert all(a * b > limit for a, b in pairwise(merged))


@pytest.mark.parametrize(
    ("shape", "tiles"),
    [
        ((1280,), [((0,), (1,), (1024,)), ((1024,), (1,), (256,))]),
        ((2500, 30), [((0, 0), (2, 1), (1024, 30)), ((2048, 0), (1, 1), (452, 30))]),
        ((2048, 2048), [((0, 0), (2, 2), (1024, 1024))]),
        ((0, 4), []),
    ],
)
def test_shapes_are_cut_into_tiles(shape, tiles):
    assert cut(shape, 1024) == tiles


@given(shape=shapes.filter(len), block_size=st.integers(1, 10))
def test_tiles_cover_every_element_once(shape, block_size):
    X = torch.zeros(shape)
    tiles = cut(shape, block_size)
    for tile in tiles:
        assert max(tile.block) <= block_size
        tile_view(X, tile).add_(1)
    assert (X == 1).all()
    assert len(tiles) <= 2 ** len(shape)


@given(
    shapes=st.lists(shapes, min_size=1, max_size=5), block_size=st.integers(1, 10), merge=st.booleans(), seed=st.integers(0, 99)
)
def test_load_gather_and_apply_are_consistent(shapes, block_size, merge, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    (layout,) = build_layouts(shapes, block_size, merge)
    flat = load(layout, tensors, torch.float32, torch.device("cpu"))
    assert flat.numel() == layout.numel == sum(x.numel() for x in tensors)
    assert torch.equal(flatten(stack_views(layout, flat)), flat)
    assert all(torch.equal(x.view(y.shape), y) for x, y in zip(gather([layout], [flat]), tensors))
    doubled = [x.clone() for x in tensors]
    apply([layout], [*doubled[:-1], None], [flat], 1.0)
    assert all(torch.equal(x, 2 * y) for x, y in zip(doubled[:-1], tensors))
    assert torch.equal(doubled[-1], tensors[-1])


def test_a_stack_holds_the_blocks_of_one_shape_in_the_order_of_parameters():
    (layout,) = build_layouts([(4, 6), (2, 3), (5, 3)], block_size=3, merge=False)
    X, Y, Z = torch.arange(24.0).view(4, 6), 100 + torch.arange(6.0).view(2, 3), 200 + torch.arange(15.0).view(5, 3)
    flat = load(layout, [X, Y, Z], torch.float32, torch.device("cpu"))
    by_shape = {tuple(stack.shape[1:]): stack for stack in stack_views(layout, flat)}
    expected = {(3, 3): [X[:3, :3], X[:3, 3:], Z[:3]], (1, 3): [X[3:, :3], X[3:, 3:]], (2, 3): [Y, Z[3:]]}
    assert by_shape.keys() == expected.keys()
    assert all(torch.equal(by_shape[shape], torch.stack(blocks)) for shape, blocks in expected.items())


@given(st.lists(st.tuples(st.floats(0.1, 1000), st.integers(1, 99)), max_size=60), st.integers(1, 9))
def test_costs_are_balanced_first(items, ranks):
    items = [Load(*item) for item in items]
    owners, loads = assign(items, [Load(0.0, 0)] * ranks)
    for r, of_rank in enumerate(loads):
        own = [item for item, owner in zip(items, owners) if owner == r]
        assert of_rank == (pytest.approx(sum(item.cost for item in own)), sum(item.numel for item in own))
    mean, largest = sum(rank.cost for rank in loads) / ranks, max((item.cost for item in items), default=0)
    assert max(rank.cost for rank in loads) <= max(1.03 * mean, mean + largest) + 1e-6


def test_elements_are_balanced_too_where_costs_allow_it():
    items = [Load(100.0, 5)] + [Load(1.0, numel) for numel in (9, 1, 1, 7, 1, 1)]
    _, loads = assign(items, [Load(0.0, 0)] * 3)
    assert sorted(loads) == [(2, 10), (4, 10), (100, 5)]


def test_the_blocks_of_all_ranks_are_those_of_a_single_process():
    shapes = [(5, 7), (4,), (), (3, 3, 3), (8, 8)]
    (single,) = build_layouts(shapes, 4, merge=False)
    distributed = build_layouts(shapes, 4, merge=False, cost=prod, loads=[Load(0.0, 0)] * 3)
    tensors = [torch.randn(shape) for shape in shapes]
    flats = [load(layout, tensors, torch.float32, torch.device("cpu")) for layout in distributed]
    assert sum(layout.numel for layout in distributed) == single.numel
    assert all(torch.equal(x.view(y.shape), y) for x, y in zip(gather(distributed, flats), tensors))
