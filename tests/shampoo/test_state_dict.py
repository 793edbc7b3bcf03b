"""Foreign keys, hooks, copies, and distributed checkpoints, as users of torch's AdamW expect them."""

import pickle
from copy import copy, deepcopy

import pytest
import schedulefree
import torch
import torch.distributed.checkpoint as dcp
from common import LIKE_ADAMW, compare_with_adamw, identical, make_params, train, trained
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from shampoo import AdamWShampoo


def average_without_momentum(state_dict):
    """Return a state_dict with zeros for each exp_avg."""
    state = {i: {k: x * 0 if k == "exp_avg" else x for k, x in entry.items()} for i, entry in state_dict["state"].items()}
    return {**state_dict, "state": state}


# Foreign keys


def test_foreign_keys_live_and_travel():
    params, optimizer = trained()
    for p in params:
        optimizer.state[p]["z"] = p.detach().clone()
        optimizer.state[p]["name"] = "a layer"
    train(optimizer, params, 1)
    optimizer.add_param_group({"params": make_params((2,))})
    del optimizer.param_groups[-1]
    pairs = [(params, optimizer), deepcopy((params, optimizer)), pickle.loads(pickle.dumps((params, optimizer)))]
    other_params, other = trained()
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    for of_optimizer, each in (*pairs, (other_params, other)):
        for p, original in zip(of_optimizer, params):
            assert torch.equal(each.state[p]["z"], optimizer.state[original]["z"])
            assert each.state[p]["name"] == "a layer"
        train(each, of_optimizer, 1)
        assert all("z" in entry and "exp_avg" in entry for entry in each.state_dict()["state"].values())


def test_foreign_keys_survive_a_reset_of_the_others():
    params, optimizer = trained()
    optimizer.state[params[0]] = {"z": torch.ones(2)}
    train(optimizer, params, 1)
    assert optimizer.state[params[0]]["step"] == 1
    assert torch.equal(optimizer.state[params[0]]["z"], torch.ones(2))


def test_loading_copies_foreign_tensors():
    params, optimizer = trained()
    optimizer.state[params[0]]["z"] = torch.ones(2)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    saved["state"][0]["z"].zero_()
    assert torch.equal(optimizer.state[params[0]]["z"], torch.ones(2))


@pytest.mark.parametrize("value", [{"k": 1}, 3])
def test_state_that_belongs_to_no_parameter_travels(value):
    params, optimizer = trained()
    optimizer.state["lookahead"] = value
    other = trained()[1]
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    assert other.state["lookahead"] == optimizer.state_dict()["state"]["lookahead"] == value
    train(optimizer, params, 1)
    assert optimizer.state["lookahead"] == value


def test_schedulefrees_wrapper_resumes_from_a_checkpoint():
    def wrap(params):
        wrapped = schedulefree.ScheduleFreeWrapper(AdamWShampoo(params, block_size=8, precondition_frequency=2), momentum=0.9)
        wrapped.train()
        return wrapped

    params = make_params((6, 5), (20, 9), (7,))
    optimizer = wrap(params)
    train(optimizer, params, 4)
    resumed_params = deepcopy(params)
    resumed = wrap(resumed_params)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    for of_optimizer, each in ((params, optimizer), (resumed_params, resumed)):
        of_optimizer.append(*make_params((3, 4)))
        each.add_param_group({"params": of_optimizer[-1:]})
        train(each, of_optimizer, 4, first=4)
        each.eval()
    assert identical(params, resumed_params)
    assert identical([optimizer.state[p]["z"] for p in params], [resumed.state[p]["z"] for p in resumed_params])
    assert all((p != optimizer.state[p]["z"]).any() for p in params)


def test_schedulefrees_wrapper_starts_anew_after_a_clear():
    params = make_params((6, 5), (7,))
    optimizer = schedulefree.ScheduleFreeWrapper(LIKE_ADAMW(params), momentum=0.9)
    optimizer.train()
    train(optimizer, params, 3)
    optimizer.state.clear()
    train(optimizer, params, 1, first=3)
    assert [optimizer.state[p]["step"].item() for p in params] == [1, 1]
    assert all("z" in optimizer.state[p] for p in params)


# Hooks


def with_hook(register):
    """Return an action for `compare_with_adamw` that registers a hook, saves, loads, and trains on."""

    def act(make, params):
        optimizer = make(params)
        train(optimizer, params, 3)
        handle = register(optimizer, params)
        saved = deepcopy(optimizer.state_dict())
        train(optimizer, params, 2, first=3)
        optimizer.load_state_dict(saved)
        handle.remove()
        train(optimizer, params, 3, first=3)

    return act


def test_a_load_pre_hook_sees_the_state_and_may_change_it_in_place():
    def hook(optimizer, state_dict):
        assert state_dict["state"][1]["exp_avg"].any()
        state_dict["state"][1]["exp_avg"].zero_()
        state_dict["param_groups"][0]["lr"] = 0.05

    compare_with_adamw(with_hook(lambda optimizer, params: optimizer.register_load_state_dict_pre_hook(hook)))


def test_a_load_pre_hook_may_assign_keys_without_changing_the_users_dict():
    def hook(optimizer, state_dict):
        state_dict["state"] = average_without_momentum(state_dict)["state"]

    compare_with_adamw(with_hook(lambda optimizer, params: optimizer.register_load_state_dict_pre_hook(hook)))
    params, optimizer = trained()
    saved = deepcopy(optimizer.state_dict())
    optimizer.register_load_state_dict_pre_hook(hook)
    optimizer.load_state_dict(saved)
    assert saved["state"][0]["exp_avg"].any()
    assert not optimizer.state[params[0]]["exp_avg"].any()


def test_a_load_pre_hook_may_return_another_state_dict():
    def register(optimizer, params):
        return optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: average_without_momentum(state_dict))

    compare_with_adamw(with_hook(register))


def test_a_load_pre_hook_that_matches_by_name_loads_each_layers_own_state():
    """The hook of torch's documentation, for a model with its layers in another order."""
    layers = make_params((6, 5), (20, 9), (7,))
    optimizer = AdamWShampoo(layers, block_size=8, precondition_frequency=2)
    optimizer.param_groups[0]["names"] = ["a", "b", "c"]
    train(optimizer, layers, 4)
    reordered = deepcopy(layers[::-1])
    other = AdamWShampoo(reordered, block_size=8)
    other.param_groups[0]["names"] = ["c", "b", "a"]

    def by_name(to, state_dict):
        state_dict = deepcopy(state_dict)
        (group,) = state_dict["param_groups"]
        by_name = dict(zip(group["names"], state_dict["state"].values()))
        (own,) = to.param_groups
        state_dict["state"] = {i: by_name[name] for i, name in enumerate(own["names"])}
        return state_dict

    other.register_load_state_dict_pre_hook(by_name)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(layers, reordered[::-1]):
        assert identical(dict(optimizer.state[p]), dict(other.state[q]))


def test_a_state_dict_pre_hook_may_change_state():
    def hook(optimizer):
        for entry in optimizer.state.values():
            entry["exp_avg"] = torch.zeros_like(entry["exp_avg"])
            entry["exp_avg_sq"].mul_(4)

    compare_with_adamw(with_hook(lambda optimizer, params: optimizer.register_state_dict_pre_hook(hook)))


@pytest.mark.parametrize("returns", [False, True], ids=["in place", "returned"])
def test_a_state_dict_post_hook_sees_tensors_and_its_changes_are_kept(returns):
    def hook(optimizer, state_dict):
        assert state_dict["state"][1]["exp_avg"].any()
        changed = {**average_without_momentum(state_dict), "note": "mine"}
        return changed if returns else state_dict.update(changed)

    compare_with_adamw(with_hook(lambda optimizer, params: optimizer.register_state_dict_post_hook(hook)))
    optimizer = trained()[1]
    optimizer.register_state_dict_post_hook(hook)
    assert optimizer.state_dict()["note"] == "mine"
    assert not optimizer.state_dict()["state"][1]["exp_avg"].any()


def test_a_load_post_hook_sees_the_loaded_state_and_may_change_it():
    seen = []

    def hook(optimizer):
        for p in optimizer.param_groups[0]["params"]:
            seen.append(optimizer.state[p]["step"].item())
            optimizer.state[p]["exp_avg_sq"].mul_(4)
        optimizer.param_groups[0]["lr"] = 0.05

    compare_with_adamw(with_hook(lambda optimizer, params: optimizer.register_load_state_dict_post_hook(hook)))
    assert seen == [3.0] * 6


def test_hooks_run_in_order_and_not_after_their_removal():
    optimizer, order = trained()[1], []
    for register in ("register_state_dict_pre_hook", "register_state_dict_post_hook"):
        getattr(optimizer, register)(lambda *_: order.append(2))
        getattr(optimizer, register)(lambda *_: order.append(1), prepend=True)
        getattr(optimizer, register)(lambda *_: order.append(3)).remove()
    saved = optimizer.state_dict()
    assert order == [1, 2, 1, 2]
    for register in ("register_load_state_dict_pre_hook", "register_load_state_dict_post_hook"):
        getattr(optimizer, register)(lambda *_: order.append(4))
        getattr(optimizer, register)(lambda *_: order.append(3), prepend=True)
    optimizer.load_state_dict(saved)
    assert order == [1, 2, 1, 2, 3, 4, 3, 4]


@pytest.mark.parametrize("held", [False, True])
def test_step_hooks_may_scale_gradients_and_state(held):
    def act(make, params):
        optimizer = make(params)
        train(optimizer, params, 2)
        entries = [optimizer.state[p] for p in params]

        def before(optimizer, args, kwargs):
            for p in params:
                p.grad.mul_(2)

        def after(optimizer, args, kwargs):
            for p, entry in zip(params, entries):
                (entry if held else optimizer.state[p])["exp_avg"].mul_(0.5)

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        train(optimizer, params, 4, first=2)

    compare_with_adamw(act)


# Copies


@pytest.mark.parametrize("clone", [deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_copies_have_what_was_changed_in_state_before(clone):
    params, optimizer = trained()
    optimizer.state[params[0]]["exp_avg"] = torch.ones(6, 5)
    optimizer.state[params[1]]["exp_avg"].zero_()
    other_params, other = clone((params, optimizer))
    assert torch.equal(other.state[other_params[0]]["exp_avg"], torch.ones(6, 5))
    assert not other.state[other_params[1]]["exp_avg"].any()
    train(optimizer, params, 3, first=3)
    train(other, other_params, 3, first=3)
    assert identical(params, other_params)


def test_a_shallow_copy_trains_the_same_parameters():
    def act(make, params):
        optimizer = make(params)
        train(optimizer, params, 3)
        train(copy(optimizer), params, 3, first=3)

    compare_with_adamw(act)


# torch.distributed.checkpoint

FLAT = pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])

FROZEN = pytest.mark.parametrize("frozen", [(), (0,), (2,), (0, 2)], ids=str)


def build(seed, frozen, groups):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3))
    params = list(model.parameters())
    for i in frozen:
        params[i].requires_grad_(False)
    in_two = [{"params": params[::2], "weight_decay": 0.1}, {"params": params[1::2], "lr": 0.02, "group_name": "biases"}]
    optimizer = AdamWShampoo(in_two if groups == 2 else params, block_size=8, precondition_frequency=2)
    return model, optimizer


def train_model(model, optimizer, steps):
    for t in steps:
        torch.manual_seed(t)
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()


@FLAT
@FROZEN
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("trained_before", [False, True])
def test_a_distributed_checkpoint_resumes_bit_for_bit(tmp_path, flat, frozen, groups, trained_before):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = build(0, frozen, groups)
    train_model(model, optimizer, range(5))
    saved = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.save(saved, checkpoint_id=tmp_path)

    resumed, other = build(1, frozen, groups)
    train_model(resumed, other, range(3 if trained_before else 0))
    for group in other.param_groups:
        group["lr"] = 0.5  # the options come from the checkpoint
    found = {"model": get_model_state_dict(resumed), "optimizer": get_optimizer_state_dict(resumed, other, options=options)}
    dcp.load(found, checkpoint_id=tmp_path)
    set_model_state_dict(resumed, found["model"])
    set_optimizer_state_dict(resumed, other, found["optimizer"], options=options)
    for each in ((model, optimizer), (resumed, other)):
        train_model(*each, range(5, 9))
    assert identical(list(model.parameters()), list(resumed.parameters()))


@FLAT
def test_foreign_keys_travel_through_a_distributed_checkpoint(tmp_path, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = build(0, (0,), 2)
    train_model(model, optimizer, range(3))
    resumed, other = build(1, (0,), 2)
    for each, of_model, value in ((optimizer, model, 1.0), (other, resumed, 0.0)):
        for p in of_model.parameters():
            each.state[p]["z"] = torch.full((2,), value)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=tmp_path)
    found = {"optimizer": get_optimizer_state_dict(resumed, other, options=options)}
    dcp.load(found, checkpoint_id=tmp_path)
    set_optimizer_state_dict(resumed, other, found["optimizer"], options=options)
    assert [other.state[p]["z"].tolist() for p in resumed.parameters() if p.requires_grad] == [[1.0, 1.0]] * 3
    assert other.param_groups[1]["group_name"] == "biases"
