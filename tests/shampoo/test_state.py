"""`state`, hooks, and state_dicts as users of torch's AdamW expect them."""

import gc
import pickle
import weakref
from collections import defaultdict
from copy import copy, deepcopy

import pytest
import schedulefree
import torch
import torch.distributed.checkpoint as dcp
from common import ADAMW, LIKE_ADAMW, compare_with_adamw, identical, largest_difference, make_params, train
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from shampoo import AdamWShampoo

CUT = pytest.mark.parametrize("i", [0, 1], ids=["one block", "several blocks"])  # index of a parameter in SHAPES


def trained(steps=3, **options):
    """Return parameters and an optimizer with factors and roots after some steps."""
    params = make_params((6, 5), (20, 9), (7,))
    optimizer = AdamWShampoo(params, **{"block_size": 8, "precondition_frequency": 2, **options})
    train(optimizer, params, steps)
    return params, optimizer


def average_without_momentum(state_dict):
    """Return a state_dict with zeros for each exp_avg."""
    state = {i: {k: x * 0 if k == "exp_avg" else x for k, x in entry.items()} for i, entry in state_dict["state"].items()}
    return {**state_dict, "state": state}


# What `state` shows


def test_state_shows_the_moments_of_adamw_and_follows_each_step():
    def act(make, params):
        optimizer = make(params)
        train(optimizer, params, 3)
        entries = [optimizer.state[p] for p in params]
        train(optimizer, params, 2, first=3)
        return [entry[key] for entry in entries for key in ("exp_avg", "exp_avg_sq", "step")]

    compare_with_adamw(act)


def test_state_counts_the_gradients_of_each_parameter():
    def act(make, params):
        optimizer = make(params)
        train(optimizer, params, 3)
        params[1].grad = None
        optimizer.step()
        return [optimizer.state[p]["step"] for p in params]

    compare_with_adamw(act)


def test_state_shows_what_a_state_dict_holds():
    params, optimizer = trained()
    saved = optimizer.state_dict()["state"]
    assert identical([dict(optimizer.state[p]) for p in params], list(saved.values()))
    assert any(key.startswith("inv_roots") for key in optimizer.state[params[1]])


@pytest.mark.parametrize("options", [{}, {"solver": "qr", "stagger": True}, {"bf16_roots": True, "momentum": 0.9}], ids=str)
@pytest.mark.parametrize("look", [False, True], ids=["replaced", "looked at"])
def test_looking_at_state_and_replacing_it_with_copies_change_nothing(look, options):
    weights = []
    for act in (False, True):
        params, optimizer = trained(**options)
        for entry in optimizer.state.values() if act else ():
            for key, x in list(entry.items()):
                entry[key] = x if look else x.clone()
        train(optimizer, params, 5, first=3)
        weights.append(params)
    assert identical(*weights)


# Changes in `state`


def clear_all(optimizer, params):
    optimizer.state.clear()


def delete_one(optimizer, params):
    del optimizer.state[params[1]]


def clear_one(optimizer, params):
    optimizer.state[params[1]].clear()


def assign_empty(optimizer, params):
    optimizer.state = defaultdict(dict)


def zero_in_place(optimizer, params):
    for entry in optimizer.state.values():
        for x in entry.values():
            x.zero_()


def zero_all_at_once(optimizer, params):
    torch._foreach_zero_([optimizer.state[p]["exp_avg"] for p in params])


def replace_averages(optimizer, params):
    for p in params:
        optimizer.state[p]["exp_avg"] = torch.full_like(p, 0.5)


def advance_steps(optimizer, params):
    for entry in optimizer.state.values():
        entry["step"] += 5


def move_to_its_device(optimizer, params):
    for entry in optimizer.state.values():
        for x in entry.values():
            x.data = x.data.to(params[0].device, copy=True)


CHANGES = [
    clear_all, delete_one, clear_one, assign_empty, zero_in_place, zero_all_at_once, replace_averages, advance_steps,
    move_to_its_device,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.replace("_", " "))
def test_a_change_in_state_acts_as_under_adamw(change):
    def act(make, params):
        optimizer = make(params)
        train(optimizer, params, 3)
        change(optimizer, params)
        train(optimizer, params, 3, first=3)

    compare_with_adamw(act)


def test_a_deleted_entry_resets_factors_and_roots():
    params, optimizer = trained(7)
    del optimizer.state[params[1]]
    q = torch.nn.Parameter(params[1].detach().clone())
    fresh = AdamWShampoo([q], block_size=8, precondition_frequency=2)
    fresh.param_groups[0]["step"] = 7
    for t in range(7, 12):
        train(optimizer, params, 1, first=t)
        q.grad = params[1].grad.clone()
        fresh.step()
    torch.testing.assert_close(q, params[1], rtol=0, atol=1e-6)


def test_roots_that_are_zeroed_in_place_freeze_nothing():
    params, optimizer = trained(3)
    optimizer.param_groups[0]["precondition_frequency"] = 1000
    before = deepcopy(params)
    for entry in optimizer.state.values():
        for key in entry:
            if key.startswith("inv_roots"):
                entry[key].zero_()
    train(optimizer, params, 1)
    assert all((p != q).any() for p, q in zip(params, before))


@CUT
def test_an_in_place_edit_acts_once(i):
    def act(make, params):
        optimizer = make(params)
        train(optimizer, params, 3)
        optimizer.state[params[i]]["exp_avg"].mul_(0.5)
        train(optimizer, params, 3, first=3)

    compare_with_adamw(act)


@pytest.mark.parametrize("i", [0, 1])
def test_a_held_entry_may_be_edited_at_every_step(i):
    def act(make, params):
        optimizer = make(params)
        train(optimizer, params, 3)
        entry = optimizer.state[params[i]]
        for t in range(3, 7):
            entry["exp_avg"].mul_(0.5)
            train(optimizer, params, 1, first=t)

    compare_with_adamw(act)


@CUT
def test_a_held_tensor_stays_live_when_others_change(i):
    def act(make, params):
        optimizer = make(params)
        train(optimizer, params, 3)
        average = optimizer.state[params[i]]["exp_avg"]
        optimizer.state[params[2]]["exp_avg"] = torch.zeros_like(params[2])
        for t in range(3, 6):
            average.mul_(0.5)
            train(optimizer, params, 1, first=t)

    compare_with_adamw(act)


@pytest.mark.parametrize("act", ["deepcopy", "pickle", "add_param_group", "replace another"])
def test_a_held_state_stays_that_of_the_optimizer(act):
    params, optimizer = trained()
    state, entry = optimizer.state, optimizer.state[params[0]]
    if act == "deepcopy":
        deepcopy(optimizer)
    elif act == "pickle":
        pickle.dumps(optimizer)
    elif act == "add_param_group":
        optimizer.add_param_group({"params": make_params((2,))})
    else:
        state[params[2]]["exp_avg"] = torch.zeros(7)
        train(optimizer, params, 1)
    assert "exp_avg" in entry
    assert state[params[1]]["exp_avg"].any()
    state.clear()
    train(optimizer, params, 1, first=3)
    assert optimizer.state[params[0]]["step"] == 1


@pytest.mark.parametrize("key", ["exp_avg", "step"])
@pytest.mark.parametrize("edit", ["data in place", "numpy", "data"])
def test_edits_behind_autograds_back_are_seen(edit, key):
    def act(make, params):
        optimizer = make(params)
        train(optimizer, params, 3)
        x = optimizer.state[params[1]][key]
        if edit == "data in place":
            x.data.zero_()
        elif edit == "numpy":
            x.numpy()[...] = 0
        else:
            x.data = torch.zeros_like(x)
        train(optimizer, params, 3, first=3)

    compare_with_adamw(act)


@pytest.mark.parametrize("edit", ["data", "set_"])
def test_new_memory_for_a_moment_in_one_piece_is_seen(edit):
    def act(make, params):
        optimizer = make(params)
        train(optimizer, params, 3)
        average = optimizer.state[params[0]]["exp_avg"]
        if edit == "data":
            average.data = torch.zeros_like(average)
        else:
            average.set_(torch.zeros_like(average))
        train(optimizer, params, 3, first=3)

    compare_with_adamw(act)


def test_the_state_of_adamw_is_taken_over():
    def act(make, params):
        first = torch.optim.AdamW(params, **ADAMW)
        train(first, params, 3)
        optimizer = make(params)
        for p in params:
            optimizer.state[p].update(deepcopy(first.state[p]))
        train(optimizer, params, 3, first=3)

    compare_with_adamw(act)


# Surgery on groups and state


def test_a_parameter_of_the_same_shape_takes_over_a_deleted_entry():
    def act(make, params):
        optimizer, old = make(params), params[0]
        train(optimizer, params, 3)
        entry = optimizer.state.get(old)
        entry["exp_avg"] = torch.zeros_like(entry["exp_avg"])
        del optimizer.state[old]
        params[0] = optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(old.detach().clone())
        optimizer.state[params[0]] = entry
        train(optimizer, params, 3, first=3)

    compare_with_adamw(act)


def test_an_entry_may_be_cut_before_its_parameter_is_replaced():
    """As Gaussian splatting prunes: the entry fits the new parameter, and is then dropped."""

    def act(make, params):
        optimizer, old = make(params), params[0]
        train(optimizer, params, 3)
        entry = optimizer.state.get(old)
        entry["exp_avg"], entry["exp_avg_sq"] = entry["exp_avg"][:4], entry["exp_avg_sq"][:4]
        del optimizer.state[old]
        params[0] = optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(old.detach()[:4].clone())
        train(optimizer, params, 3, first=3)

    compare_with_adamw(act)


@pytest.mark.parametrize("order", ["state first", "group first"])
def test_an_entry_moves_to_the_parameter_that_replaces_its_own(order):
    def act(make, params):
        optimizer, old = make(params), params[1]
        train(optimizer, params, 3)
        params[1] = torch.nn.Parameter(old.detach().clone())
        if order == "state first":
            optimizer.state[params[1]] = optimizer.state.pop(old)
        optimizer.param_groups[0]["params"][1] = params[1]
        if order == "group first":
            optimizer.state[params[1]] = optimizer.state.pop(old)
        train(optimizer, params, 3, first=3)

    compare_with_adamw(act)


def test_state_that_is_there_before_its_group_is_taken():
    def act(make, params):
        first, optimizer = make(params[2:]), make(params[:2])
        train(first, params[2:], 3)
        optimizer.state[params[2]] = deepcopy(first.state[params[2]])
        optimizer.add_param_group({"params": params[2:]})
        train(optimizer, params, 3)

    compare_with_adamw(act)


@pytest.mark.parametrize("change", ["clear", "delete", "edit"])
def test_the_state_of_a_removed_parameter_is_still_there(change):
    def act(make, params):
        optimizer = make(params)
        train(optimizer, params, 3)
        optimizer.param_groups[0]["params"].pop()
        train(optimizer, params, 1, first=3)
        if change == "clear":
            optimizer.state.clear()
        elif change == "delete":
            del optimizer.state[params[2]]
        else:
            optimizer.state[params[2]]["exp_avg"].zero_()
        optimizer.param_groups[0]["params"].append(params[2])
        train(optimizer, params, 3, first=4)

    compare_with_adamw(act)


@pytest.mark.parametrize("repair", ["replace", "clear"])
def test_a_wrong_tensor_in_state_is_refused_at_the_step_and_can_be_repaired(repair):
    params, optimizer = trained()
    optimizer.state[params[0]]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(6, 5\) holds .*\(3,\) for exp_avg"):
        train(optimizer, params, 1)
    if repair == "replace":
        optimizer.state[params[0]]["exp_avg"] = torch.zeros(6, 5)
    else:
        optimizer.state.clear()
    train(optimizer, params, 1)


def test_a_deleted_entry_is_gone_until_the_next_step():
    params, optimizer = trained()
    del optimizer.state[params[0]]
    assert params[0] not in optimizer.state
    for _ in params[1:]:
        optimizer.state.popitem()
    assert not optimizer.state
    train(optimizer, params, 1)
    assert [optimizer.state[p]["step"] for p in params] == [1, 1, 1]


def test_a_group_is_not_added_while_state_is_wrong():
    params, optimizer = trained()
    optimizer.state[params[0]]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"parameter 0 .*for exp_avg"):
        optimizer.add_param_group({"params": make_params((2,))})
    assert len(optimizer.param_groups) == 1


class Wrapper(AdamWShampoo):
    """What Lightning makes of an optimizer: an object of a derived class with the same attributes."""

    def __init__(self, optimizer):
        vars(self).update({name: x for name, x in vars(optimizer).items() if name not in ("step", "__del__")})


@pytest.mark.parametrize("change", CHANGES[:3], ids=lambda change: change.__name__.replace("_", " "))
def test_a_wrapper_that_shares_attributes_shares_state(change):
    params, optimizer = trained()
    change(Wrapper(optimizer), params)
    train(optimizer, params, 2, first=3)
    assert optimizer.state[params[1]]["step"] == 2


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


# Models that change


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
    def act(make, params):
        optimizer = make(params)
        train(optimizer, params, 3)
        for p in params:
            p.data, p.grad = p.data.cuda(), None
        for entry in optimizer.state.values():  # AdamW needs it
            for key in ("exp_avg", "exp_avg_sq"):
                entry[key] = entry[key].cuda()
        train(optimizer, params, 3, first=3)

    compare_with_adamw(act)


def test_new_data_of_the_same_shape_keeps_the_state():
    def act(make, params):
        optimizer = make(params)
        train(optimizer, params, 3)
        params[0].data = torch.ones(5, 6, dtype=torch.float64).T
        train(optimizer, params, 3, first=3)

    compare_with_adamw(act)


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


# What cannot be loaded


def edit(entry, key, change):
    """Return a function that changes a value of the state_dict's group ("group"), or of a parameter's entry."""

    def act(state_dict):
        node = state_dict["param_groups"][0] if entry == "group" else state_dict["state"][entry]
        if change is None:
            del node[key]
        else:
            node[key] = change(node[key])

    return act


def first_element(value):
    """Return a function that sets the first element of a tensor to a value."""

    def change(x):
        x.view(-1)[0] = value
        return x

    return change


REFUSED = {
    "a group without step": (edit("group", "step", None), "group 0 of the state_dict lacks step"),
    "a group without lr": (edit("group", "lr", None), "group 0 of the state_dict lacks lr"),
    "a group without eps": (edit("group", "eps", None), "group 0 of the state_dict lacks eps"),
    "a mistyped option": (
        lambda s: s["param_groups"][0].update(weigth_decay=0.1),
        r"weigth_decay; did you mean weight_decay\?",
    ),
    "amsgrad": (lambda s: s["param_groups"][0].update(amsgrad=True), "amsgrad is True"),
    "a negative step of the group": (edit("group", "step", lambda _: -1), "step is -1"),
    "half a step": (edit(0, "step", lambda _: 0.5), r"parameter 0 .* holds 0\.5 for step"),
    "NaN steps": (edit(0, "step", lambda x: x * torch.nan), r"parameter 0 .*for step"),
    "no step": (edit(0, "step", None), r"parameter 0 .* holds nothing for step"),
    "NaN in exp_avg": (edit(1, "exp_avg", first_element(torch.nan)), r"parameter 1 .* elements of exp_avg that are not finite"),
    "Inf in exp_avg_sq": (edit(1, "exp_avg_sq", first_element(torch.inf)), r"parameter 1 .* elements of exp_avg_sq .*finite"),
    "a negative exp_avg_sq": (edit(1, "exp_avg_sq", first_element(-1)), r"parameter 1 .* elements of exp_avg_sq .*nonnegative"),
    "NaN in a factor": (edit(1, "factors.0.0", first_element(torch.nan)), r"parameter 1 .*factors\.0\.0.*finite"),
    "Inf in a root": (edit(0, "inv_roots.0.1", first_element(torch.inf)), r"parameter 0 .*inv_roots\.0\.1.*finite"),
    "a sparse tensor": (edit(0, "exp_avg", lambda x: x.to_sparse()), "parameter 0 .*sparse_coo.*must be a dense"),
    "a meta tensor": (edit(0, "exp_avg", lambda x: x.to("meta")), "parameter 0 .*meta"),
    "a complex tensor": (edit(0, "exp_avg", lambda x: x + 0j), "parameter 0 .*complex64"),
    "integers": (edit(0, "exp_avg", lambda x: x.long()), "parameter 0 .*int64"),
    "an array": (edit(0, "exp_avg", lambda x: x.numpy()), r"(?s)parameter 0 .*for exp_avg"),
    "a version of the future": (lambda s: s.update(version=99), "version is 99; it must be one of 1, 2"),
}


@pytest.mark.parametrize(("corrupt", "message"), REFUSED.values(), ids=REFUSED)
def test_state_that_cannot_be_is_refused_by_name_and_changes_nothing(corrupt, message):
    params, optimizer = trained()
    saved, before = (deepcopy(optimizer.state_dict()) for _ in range(2))
    corrupt(saved)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert identical(before, optimizer.state_dict())
    train(optimizer, params, 1)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "factors.0.0"])
def test_elements_that_float32_cannot_hold_are_refused(key):
    _, optimizer = trained()
    saved = deepcopy(optimizer.state_dict())
    saved["state"][0][key] = torch.full_like(saved["state"][0][key], 1e300, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"parameter 0 .*{key}.*finite"):
        optimizer.load_state_dict(saved)


def test_a_dtype_without_arithmetic_is_refused_by_name_or_loaded():
    params, optimizer = trained()
    saved = deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].to(torch.float8_e4m3fn)
    error = ""
    try:
        optimizer.load_state_dict(saved)
    except ValueError as refused:
        error = str(refused)
    assert not error or "parameter 0" in error
    train(optimizer, params, 1)


OTHERS = {
    "AdamW": torch.optim.AdamW,
    "SGD": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
    "Adagrad": torch.optim.Adagrad,
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("own_groups", [False, True])
def test_the_state_of_another_optimizer_is_called_that(make, own_groups):
    params, optimizer = trained()
    other = make(params)
    train(other, params, 2)
    saved = {**optimizer.state_dict(), "state": other.state_dict()["state"]} if own_groups else other.state_dict()
    with pytest.raises(ValueError, match="another optimizer's"):
        optimizer.load_state_dict(deepcopy(saved))


def test_a_block_size_that_is_changed_later_is_refused_and_may_be_changed_back():
    params, optimizer = trained()
    optimizer.param_groups[0]["block_size"] = 4
    for act in (optimizer.state_dict, lambda: train(optimizer, params, 1)):
        with pytest.raises(ValueError, match=r"parameter 0 of shape \(6, 5\)"):
            act()
    optimizer.param_groups[0]["block_size"] = 8
    train(optimizer, params, 1, first=3)
    AdamWShampoo(make_params((6, 5), (20, 9), (7,))).load_state_dict(optimizer.state_dict())


def test_a_block_size_may_change_once_the_state_is_cleared():
    params, optimizer = trained()
    optimizer.state.clear()
    optimizer.param_groups[0].update(block_size=4, solver="qr")
    train(optimizer, params, 5)
    assert optimizer.state_dict()["state"][1]["eigvecs.0.0"].shape[1:] == (4, 4)
    AdamWShampoo(make_params((6, 5), (20, 9), (7,))).load_state_dict(optimizer.state_dict())


def test_a_changed_block_size_is_named_and_a_clear_helps():
    params, optimizer = trained()
    optimizer.param_groups[0]["block_size"] = 4
    with pytest.raises(ValueError, match="block_size"):
        train(optimizer, params, 1)
    optimizer.state.clear()
    train(optimizer, params, 1)


def test_a_state_dict_of_version_1_counts_the_steps_of_the_group():
    params, optimizer = trained()
    saved = deepcopy(optimizer.state_dict())
    del saved["version"]
    for entry in saved["state"].values():
        del entry["step"]
    other_params = deepcopy(params)
    other = AdamWShampoo(other_params)
    other.load_state_dict(saved)
    assert [other.state[p]["step"].item() for p in other_params] == [3, 3, 3]
    train(optimizer, params, 3, first=3)
    train(other, other_params, 3, first=3)
    assert largest_difference([p.detach() for p in params], [p.detach() for p in other_params]) == 0


HANDED_OVER = {
    "the whole": lambda old, new, params: setattr(new, "state", old.state),
    "updated": lambda old, new, params: new.state.update(old.state),
    "one by one": lambda old, new, params: [new.state.__setitem__(p, old.state[p]) for p in params],
}


@pytest.mark.parametrize("hand_over", HANDED_OVER.values(), ids=HANDED_OVER)
def test_state_that_is_handed_to_another_optimizer_goes_on_there(hand_over):
    def act(make, params):
        old, new = make(params), make(params)
        train(old, params, 5)
        hand_over(old, new, params)
        train(new, params, 5, first=5)

    compare_with_adamw(act)


def test_a_look_in_inference_mode_breaks_nothing():
    def act(make, params):
        optimizer = make(params)
        train(optimizer, params, 3)
        with torch.inference_mode():
            assert all(entry["exp_avg"].norm() > 0 for entry in optimizer.state.values())
        train(optimizer, params, 3, first=3)

    compare_with_adamw(act)


def test_a_deleted_optimizer_and_a_replaced_state_are_freed_at_once():
    params = make_params((6, 5), (20, 9))
    optimizer = AdamWShampoo(params, block_size=8)
    train(optimizer, params, 2)
    bucket, saved = weakref.ref(optimizer._buckets[0].exp_avg), deepcopy(optimizer.state_dict())
    gc.collect()
    gc.disable()
    try:
        optimizer.load_state_dict(saved)
        assert bucket() is None
        gone = weakref.ref(optimizer)
        del optimizer
        assert gone() is None
    finally:
        gc.enable()


def test_setting_an_empty_state_from_outside_is_a_reset():
    def act(make, params):
        optimizer = make(params)
        train(optimizer, params, 3)
        optimizer.__setstate__({"state": defaultdict(dict)})
        train(optimizer, params, 3, first=3)

    compare_with_adamw(act)


def test_an_entry_is_compared_and_updated_as_a_dictionary_before_it_is_looked_at():
    params, optimizer = trained()
    assert optimizer.state[params[0]] != {}
    params, optimizer = trained()
    optimizer.state[params[0]] |= {"exp_avg": torch.zeros_like(params[0])}
    assert not optimizer.state[params[0]]["exp_avg"].any()
    assert len(optimizer.state[params[0]]) > 3
