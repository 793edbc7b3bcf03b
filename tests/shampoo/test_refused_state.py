"""State that cannot be loaded is refused by name, and changes nothing."""

from copy import deepcopy

import pytest
import torch
from common import identical, largest_difference, make_params, train, trained

from shampoo import AdamWShampoo


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
