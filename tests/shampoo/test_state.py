"""What `state` shows, and what changes in it do, as under torch's AdamW."""

import gc
import pickle
import weakref
from collections import defaultdict
from copy import deepcopy

import pytest
import torch
from common import ADAMW, compare_change_with_adamw, compare_with_adamw, identical, make_params, train, trained

from shampoo import AdamWShampoo

CUT = pytest.mark.parametrize("i", [0, 1], ids=["one block", "several blocks"])  # index of a parameter in SHAPES


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
    compare_change_with_adamw(change)


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
    def change(optimizer, params):
        optimizer.state[params[i]]["exp_avg"].mul_(0.5)

    compare_change_with_adamw(change)


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
    def change(optimizer, params):
        x = optimizer.state[params[1]][key]
        if edit == "data in place":
            x.data.zero_()
        elif edit == "numpy":
            x.numpy()[...] = 0
        else:
            x.data = torch.zeros_like(x)

    compare_change_with_adamw(change)


@pytest.mark.parametrize("edit", ["data", "set_"])
def test_new_memory_for_a_moment_in_one_piece_is_seen(edit):
    def change(optimizer, params):
        average = optimizer.state[params[0]]["exp_avg"]
        if edit == "data":
            average.data = torch.zeros_like(average)
        else:
            average.set_(torch.zeros_like(average))

    compare_change_with_adamw(change)


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
    def change(optimizer, params):
        old = params[0]
        entry = optimizer.state.get(old)
        entry["exp_avg"] = torch.zeros_like(entry["exp_avg"])
        del optimizer.state[old]
        params[0] = optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(old.detach().clone())
        optimizer.state[params[0]] = entry

    compare_change_with_adamw(change)


def test_an_entry_may_be_cut_before_its_parameter_is_replaced():
    """As Gaussian splatting prunes: the entry fits the new parameter, and is then dropped."""

    def change(optimizer, params):
        old = params[0]
        entry = optimizer.state.get(old)
        entry["exp_avg"], entry["exp_avg_sq"] = entry["exp_avg"][:4], entry["exp_avg_sq"][:4]
        del optimizer.state[old]
        params[0] = optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(old.detach()[:4].clone())

    compare_change_with_adamw(change)


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


# Handing over, looking, and dropping


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
    def change(optimizer, params):
        with torch.inference_mode():
            assert all(entry["exp_avg"].norm() > 0 for entry in optimizer.state.values())

    compare_change_with_adamw(change)


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
    def change(optimizer, params):
        optimizer.__setstate__({"state": defaultdict(dict)})

    compare_change_with_adamw(change)


def test_an_entry_is_compared_and_updated_as_a_dictionary_before_it_is_looked_at():
    params, optimizer = trained()
    assert optimizer.state[params[0]] != {}
    params, optimizer = trained()
    optimizer.state[params[0]] |= {"exp_avg": torch.zeros_like(params[0])}
    assert not optimizer.state[params[0]]["exp_avg"].any()
    assert len(optimizer.state[params[0]]) > 3
