"""Parameters, flat vectors, and stacks: every element is copied to exactly one place and back."""

import pytest
import torch
from common import assemble, make_params
from hypothesis import given
from hypothesis import strategies as st

from shampoo.assignment import share_blocks
from shampoo.blocks import merge_dims
from shampoo.copies import chunks, flatten, load, move, read, stack_views

shapes = st.lists(st.integers(1, 9), max_size=4).map(tuple)


@given(
    shapes=st.lists(shapes, min_size=1, max_size=5), block_size=st.integers(1, 10), merge=st.booleans(), seed=st.integers(0, 99)
)
def test_load_assemble_and_move_are_consistent(shapes, block_size, merge, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    (layout,), _ = share_blocks([merge_dims(shape, block_size) if merge else shape or (1,) for shape in shapes], block_size)
    flat, _ = load(layout, tensors, torch.float32, torch.device("cpu"))
    assert flat.numel() == layout.numel == sum(x.numel() for x in tensors)
    assert torch.equal(flatten(stack_views(layout.stacks, flat)), flat)
    assert all(torch.equal(x.view(y.shape), y) for x, y in zip(assemble([layout], [flat]), tensors))
    doubled = [torch.nn.Parameter(x.clone()) for x in tensors]
    for p, x in zip(doubled[:-1], tensors):
        p.grad = x
    with torch.no_grad():
        inputs = read(doubled, [layout], decay=0.0)
        move(doubled, [layout], inputs, [load(layout, inputs.grads, torch.float32, torch.device("cpu"))[1]], lr=-1.0)
    assert all(torch.equal(x, 2 * y) for x, y in zip(doubled[:-1], tensors))
    assert torch.equal(doubled[-1], tensors[-1])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_what_no_view_can_update_is_updated_all_the_same(decay):
    """Channels-last and transposed parameters beside one that a view can update."""
    params = make_params((4, 3, 2, 2), (5, 3), (6, 4))
    params[0].data = params[0].data.to(memory_format=torch.channels_last)
    params[1].data = params[1].data.T
    (layout,), _ = share_blocks([merge_dims(tuple(p.shape), 4) for p in params], block_size=4)
    before, grads = [p.detach().clone() for p in params], [torch.randn(p.shape) for p in params]
    for p, G in zip(params, grads):
        p.grad = G
    with torch.no_grad():
        inputs = read(params, [layout], decay)
        assert not inputs.in_place
        _, views = load(layout, inputs.grads, torch.float32, torch.device("cpu"))
        move(params, [layout], inputs, [views], lr=0.5)
    for p, W, G in zip(params, before, grads):
        assert torch.equal(p, W - 0.5 * G)
        assert p.stride() == W.stride()


def test_a_stack_holds_the_blocks_of_one_shape_in_the_order_of_parameters():
    (layout,), _ = share_blocks([(4, 6), (2, 3), (5, 3)], block_size=3)
    X, Y, Z = torch.arange(24.0).view(4, 6), 100 + torch.arange(6.0).view(2, 3), 200 + torch.arange(15.0).view(5, 3)
    flat, _ = load(layout, [X, Y, Z], torch.float32, torch.device("cpu"))
    by_shape = {tuple(stack.shape[1:]): stack for stack in stack_views(layout.stacks, flat)}
    expected = {(3, 3): [X[:3, :3], X[:3, 3:], Z[:3]], (1, 3): [X[3:, :3], X[3:, 3:]], (2, 3): [Y, Z[3:]]}
    assert by_shape.keys() == expected.keys()
    assert all(torch.equal(by_shape[shape], torch.stack(blocks)) for shape, blocks in expected.items())


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=8), st.integers(1, 40))
def test_chunks_are_consecutive_and_no_longer_than_allowed(stacks, numel):
    kinds = tuple(d % 2 == 0 for _, d in stacks)
    found = chunks(tuple(stacks), kinds, numel)
    lengths = [b * d for b, d in stacks]
    assert [length for _, some, of_stacks, _ in found for length in of_stacks] == lengths
    assert [i for _, some, *_ in found for i in range(len(stacks))[some]] == list(range(len(stacks)))
    assert [i for part, *_ in found for i in range(sum(lengths))[part]] == list(range(sum(lengths)))
    assert all(sum(of_stacks) <= numel or len(of_stacks) == 1 for _, _, of_stacks, _ in found)
    assert all(kinds[some] == (kind,) * len(of_stacks) for _, some, of_stacks, kind in found)
