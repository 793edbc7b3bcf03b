"""How much memory state takes: what `state_bytes` says, what there is, and the bound by max_factor_ratio."""

import logging
from math import prod

import pytest
import torch
from common import make_params, train
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shampoo import AdamWShampoo
from shampoo.memory import state_bytes


class Model(nn.Module):
    """Parameters of these shapes on the meta device."""

    def __init__(self, *shapes):
        super().__init__()
        for i, shape in enumerate(shapes):
            self.register_parameter(f"p{i}", nn.Parameter(torch.empty(shape, device="meta")))


def gpt2():
    layer = [
        (768,),
        (768,),
        (2304, 768),
        (2304,),
        (768, 768),
        (768,),
        (768,),
        (768,),
        (3072, 768),
        (3072,),
        (768, 3072),
        (768,),
    ]
    return Model((50257, 768), (1024, 768), *12 * layer, (768,), (768,))


def vit_s():
    layer = [
        (384,),
        (384,),
        (1152, 384),
        (1152,),
        (384, 384),
        (384,),
        (384,),
        (384,),
        (1536, 384),
        (1536,),
        (384, 1536),
        (384,),
    ]
    return Model((1, 1, 384), (1, 197, 384), (384, 3, 16, 16), (384,), *12 * layer, (384,), (384,), (1000, 384), (1000,))


def resnet8():
    def stage(width, before):
        return [(width, before, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]

    return Model((16, 1, 3, 3), (16,), (16,), *stage(16, 16), *stage(32, 16), *stage(64, 32), (10, 64), (10,))


def lora(rank=8):
    """Adapters of all linear layers of a 7B model (Llama 2)."""
    sizes = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
    return Model(*[shape for _ in range(32) for n, m in sizes for shape in ((rank, n), (m, rank))])


@pytest.mark.parametrize("model", [gpt2, vit_s, resnet8])
@pytest.mark.parametrize("ratio", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("preconditioner", ["shampoo", "soap"])
def test_bounded_state_takes_at_most_40_bytes_per_element(model, ratio, preconditioner):
    found = state_bytes(model(), max_factor_ratio=ratio, preconditioner=preconditioner)
    assert 8 < found.per_element <= 40


def test_state_of_adapters_is_small_if_it_is_bounded():
    assert state_bytes(lora(), max_factor_ratio=None, block_size=1024).total > 20e9
    assert state_bytes(lora()).total < 0.5e9


@given(
    st.lists(st.lists(st.integers(2, 40), min_size=1, max_size=4), min_size=1, max_size=4),
    st.floats(1, 4),
    st.integers(2, 20),
    st.booleans(),
)
def test_a_ratio_of_c_bounds_state_by_8_and_8_times_c_plus_1_over_c_bytes_per_element(shapes, ratio, block_size, merge):
    """Of the dimensions of a block, sum of d^2 <= (c + 1/c) n, and a third or fourth one is 1 where that is equal."""
    options = {"max_factor_ratio": ratio, "block_size": block_size, "merge_dims": merge}
    for shape in shapes:
        sizes = [(min(d, block_size), d % block_size) for d in shape]
        small = prod(min(full, rest or full) for full, rest in sizes)  # elements of the smallest block
        found = state_bytes(Model(shape), **options)
        assert found.per_element <= 8 + 8 * (ratio + 1 / ratio) + 8 * (len(shape) - 1) / small


@pytest.mark.parametrize("options", [{}, {"solver": "qr", "bf16_roots": True}, {"preconditioner": "soap"}, {"momentum": 0.9}])
def test_what_it_says_is_what_there_is(options):
    options = {"block_size": 8, "max_factor_ratio": 2.0, **options}
    params = make_params((6, 5), (20, 9), (7,), ())
    model = nn.ParameterList([*params, nn.Parameter(torch.zeros(3), requires_grad=False)])
    before = state_bytes(model, **options)
    optimizer = AdamWShampoo(params, **options)
    train(optimizer, params, 2)
    held = {str(i): sum(X.nbytes for key, X in optimizer.state[p].items() if key != "step") for i, p in enumerate(params)}
    assert before.by_parameter == held
    assert before.total == sum(held.values())
    assert before.per_element == pytest.approx(before.total / sum(p.numel() for p in params))


def test_unknown_and_invalid_options_are_refused():
    with pytest.raises(TypeError, match="blocksize"):
        state_bytes(resnet8(), blocksize=4)
    with pytest.raises(ValueError, match="block_size is 0"):
        state_bytes(resnet8(), block_size=0)


@pytest.mark.parametrize(("options", "logged"), [({"max_factor_ratio": None, "block_size": 1024}, True), ({}, False)])
def test_the_first_step_logs_large_state_once(options, logged, caplog):
    params = make_params((300,), (5, 5))
    optimizer = AdamWShampoo(params, **options)
    with caplog.at_level(logging.WARNING, logger="shampoo"):
        train(optimizer, params, 3)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == logged
    assert all("bytes per element" in message and "max_factor_ratio" in message for message in messages)
