"""State follows models that change: dtype, device, frozen and lazy parameters."""

from copy import deepcopy

import pytest
import torch
from common import compare_change_with_adamw, compare_with_adamw, identical, make_params, train

from shampoo import AdamWShampoo


@pytest.mark.parametrize("to", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_state_follows_the_dtype_of_a_model(to):
    """AdamW fails here; so compare with one that loads the state after the change."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Linear(9, 3))
    options = {"block_size": 8, "precondition_frequency": 2}
    optimizer = AdamWShampoo(model.parameters(), **options)
    train(optimizer, list(model.parameters()), 3)
    model.to(to)
    other_model = deepcopy(model)
    other = AdamWShampoo(other_model.parameters(), **options)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    for each, of_model in ((optimizer, model), (other, other_model)):
        train(each, list(of_model.parameters()), 3, first=3)
    assert identical(list(model.parameters()), list(other_model.parameters()))
    expected = torch.float64 if to == torch.float64 else torch.float32
    assert {x.dtype for entry in optimizer.state.values() for key, x in entry.items() if key != "step"} == {expected}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_state_follows_a_model_to_another_device():
    def change(optimizer, params):
        for p in params:
            p.data, p.grad = p.data.cuda(), None
        for entry in optimizer.state.values():  # AdamW needs it
            for key in ("exp_avg", "exp_avg_sq"):
                entry[key] = entry[key].cuda()

    compare_change_with_adamw(change)


def test_new_data_of_the_same_shape_keeps_the_state():
    def change(optimizer, params):
        params[0].data = torch.ones(5, 6, dtype=torch.float64).T

    compare_change_with_adamw(change)


def test_a_frozen_parameter_resumes_from_its_own_steps():
    def act(make, params):
        optimizer = make(params)
        train(optimizer, params, 3)
        params[1].requires_grad_(False)
        for t in range(3, 6):
            for p in (params[0], params[2]):
                p.grad.fill_(t)
            params[1].grad = None
            optimizer.step()
        params[1].requires_grad_(True)
        train(optimizer, params, 3, first=6)

    compare_with_adamw(act)


def lazy():
    torch.manual_seed(0)
    return torch.nn.LazyLinear(4, dtype=torch.float64)


@pytest.mark.parametrize("look", [False, True])
def test_a_lazy_layer_is_trained_once_it_has_a_shape(look):
    def act(make, params):
        layer = lazy()
        optimizer = make(layer.parameters())
        if look:
            assert not any(optimizer.state.values())
            optimizer.load_state_dict(optimizer.state_dict())
        layer(torch.ones(2, 5, dtype=torch.float64))
        train(optimizer, list(layer.parameters()), 4)
        return layer.parameters()

    compare_with_adamw(act)


def test_a_lazy_layer_takes_state_that_was_loaded_before_it_had_a_shape():
    def act(make, params):
        layer, resumed = lazy(), lazy()
        layer(torch.ones(2, 5, dtype=torch.float64))
        first, optimizer = make(layer.parameters()), make(resumed.parameters())
        train(first, list(layer.parameters()), 3)
        optimizer.load_state_dict(deepcopy(first.state_dict()))
        resumed(torch.ones(2, 5, dtype=torch.float64))
        resumed.load_state_dict(layer.state_dict())
        train(optimizer, list(resumed.parameters()), 3, first=3)
        return resumed.parameters()

    compare_with_adamw(act)


def test_a_parameter_without_data_is_refused_by_name_at_the_step():
    params = [*make_params((7,)), torch.nn.Parameter(torch.empty(4, 3, device="meta"))]
    optimizer = AdamWShampoo(params)
    params[0].grad, params[1].grad = torch.ones(7), torch.empty(4, 3, device="meta")
    with pytest.raises((ValueError, RuntimeError), match=r"parameter 1 of shape \(4, 3\) .*meta"):
        optimizer.step()
