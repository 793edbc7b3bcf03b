"""What stands in the groups is trained, with the options that it has there, as under torch's AdamW."""

import io
from copy import deepcopy

import pytest
import schedulefree
import torch
from common import ADAMW, compare_change_with_adamw, compare_with_adamw, identical, make_params, set_gradients, train
from torch.optim import lr_scheduler

from shampoo import AdamWShampoo


def new_parameter(*shape):
    return torch.nn.Parameter(torch.ones(shape, dtype=torch.float64))


def one_group_each(make, params):
    """Return an optimizer with a group for each parameter, with rates 0.1, 0.01, 0.001."""
    return make([{"params": [p], "lr": 10.0 ** -(i + 1)} for i, p in enumerate(params)])


# Parameters


def test_a_parameter_appended_to_a_group_is_trained():
    def act(make, params):
        optimizer = make(params[:2])
        train(optimizer, params[:2], 3)
        optimizer.param_groups[0]["params"].append(params[2])
        train(optimizer, params, 3, first=3)

    compare_with_adamw(act)


def test_a_parameter_that_replaces_another_is_trained_in_its_place():
    def act(make, params):
        optimizer, new = make(params), new_parameter(20, 9)
        train(optimizer, params, 3)
        optimizer.param_groups[0]["params"][1] = new
        train(optimizer, [params[0], new, params[2]], 3, first=3)
        return [*params, new]

    compare_with_adamw(act)


def test_a_removed_parameter_no_longer_moves():
    def change(optimizer, params):
        del optimizer.param_groups[0]["params"][1]

    compare_change_with_adamw(change)


def test_a_parameter_that_returns_to_a_group_continues_from_its_state():
    def act(make, params):
        optimizer = make(params)
        train(optimizer, params, 3)
        removed = optimizer.param_groups[0]["params"].pop(1)
        train(optimizer, params, 3, first=3)
        optimizer.param_groups[0]["params"].append(removed)
        train(optimizer, params, 3, first=6)

    compare_with_adamw(act)


@pytest.mark.parametrize("container", [tuple, torch.nn.ParameterList])
def test_the_parameters_of_a_group_may_stand_in_any_container(container):
    def change(optimizer, params):
        optimizer.param_groups[0]["params"] = container(params[:2])

    compare_change_with_adamw(change)


def test_without_parameters_a_step_does_nothing():
    def act(make, params):
        optimizer = make(params)
        train(optimizer, params, 3)
        optimizer.param_groups[0]["params"].clear()
        train(optimizer, params, 2, first=3)
        optimizer.param_groups.clear()
        train(optimizer, params, 2, first=5)

    compare_with_adamw(act)


def test_state_is_kept_when_preconditioned_parameters_change_groups():
    """Roots and factors move along: splitting a group in two with the same options changes no bit."""
    weights = []
    for split in (False, True):
        params = make_params((6, 5), (20, 9), (7,))
        optimizer = AdamWShampoo(params, block_size=8, precondition_frequency=2)
        train(optimizer, params, 5)
        if split:
            (group,) = optimizer.param_groups
            optimizer.param_groups.append({**group, "params": [group["params"].pop()]})
        train(optimizer, params, 5, first=5)
        weights.append(params)
    assert identical(*weights)


def test_a_parameter_of_another_shape_takes_the_place_of_a_preconditioned_one():
    params = make_params((6, 5), (20, 9))
    optimizer = AdamWShampoo(params, block_size=8, precondition_frequency=2)
    train(optimizer, params, 5)
    new = torch.nn.Parameter(torch.ones(3, 11))
    optimizer.param_groups[0]["params"][0] = new
    before = new.detach().clone()
    train(optimizer, [new, params[1]], 5, first=5)
    assert (new != before).all()
    assert set(optimizer.state) >= {new, params[1]}
    assert optimizer.state_dict()["state"][0]["exp_avg"].shape == (3, 11)


@pytest.mark.parametrize("order", ["state first", "data first"])
def test_data_of_another_shape_starts_anew_once_its_state_is_deleted(order):
    def change(optimizer, params):
        if order == "state first":
            del optimizer.state[params[0]]
        params[0].grad, params[0].data = None, torch.ones(3, 5, dtype=torch.float64)
        if order == "data first":
            del optimizer.state[params[0]]

    compare_change_with_adamw(change)


def test_data_of_another_shape_is_refused_by_name():
    params = make_params((6, 5), (7,))
    optimizer = AdamWShampoo(params, block_size=8)
    train(optimizer, params, 2)
    params[0].grad, params[0].data = None, torch.ones(3, 5)
    with pytest.raises((ValueError, RuntimeError), match=r"parameter 0 of shape \(3, 5\)"):
        train(optimizer, params, 1)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_parameter_that_is_put_into_groups_twice_is_refused_by_name(groups):
    params = make_params((6, 5), (7,))
    optimizer = AdamWShampoo(params)
    (group,) = optimizer.param_groups
    if groups == 1:
        group["params"].append(params[0])
    else:
        optimizer.param_groups.append({**group, "params": [params[0]]})
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(6, 5\)"):
        train(optimizer, params, 1)


@pytest.mark.skipif(torch.__version__ < "2.6", reason="torch's optimizers take names from 2.6 on")
def test_no_parameter_is_called_by_the_name_of_one_that_left_the_group(caplog):
    params = make_params((6, 5), (3, 5), (7,))
    optimizer = AdamWShampoo(zip(["first", "second", "third"], params))
    optimizer.param_groups[0]["params"].pop(0)
    params[1].grad = torch.full((3, 5), torch.nan)
    optimizer.step()
    assert "parameter 0 of shape (3, 5)" in caplog.text  # the names do not fit the group any more
    assert "first" not in caplog.text


# Groups


def test_reversed_groups_keep_their_rates():
    def act(make, params):
        optimizer = one_group_each(make, params)
        train(optimizer, params, 3)
        optimizer.param_groups.reverse()
        train(optimizer, params, 3, first=3)

    compare_with_adamw(act)


def test_a_popped_group_is_no_longer_trained():
    def act(make, params):
        optimizer = one_group_each(make, params)
        train(optimizer, params, 3)
        optimizer.param_groups.pop(1)
        train(optimizer, params, 3, first=3)

    compare_with_adamw(act)


def test_parameters_take_the_options_of_the_group_that_they_move_to():
    def act(make, params):
        optimizer = one_group_each(make, params)
        train(optimizer, params, 3)
        first, second, third = optimizer.param_groups
        first["params"], second["params"] = second["params"], first["params"]
        third["params"].append(first["params"].pop())
        train(optimizer, params, 3, first=3)

    compare_with_adamw(act)


def test_a_new_list_of_groups_is_followed():
    def change(optimizer, params):
        (group,) = optimizer.param_groups
        optimizer.param_groups = [{**group, "params": [p], "lr": 0.1 * i} for i, p in enumerate(params)]

    compare_change_with_adamw(change)


def test_changed_groups_are_saved_and_loaded_as_they_stand():
    params = make_params((6, 5), (20, 9), (7,))
    optimizer = AdamWShampoo([{"params": [p]} for p in params], block_size=8, precondition_frequency=2)
    train(optimizer, params, 3)
    optimizer.param_groups.pop(0)
    optimizer.param_groups.reverse()
    other_params = deepcopy(params)
    other = AdamWShampoo([{"params": [p]} for p in other_params[:0:-1]], block_size=8)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    train(optimizer, params, 3, first=3)
    train(other, other_params, 3, first=3)
    assert identical(params, other_params)


def test_a_group_without_options_that_was_put_there_by_hand_is_refused_by_name():
    params = make_params((6, 5), (7,))
    optimizer = AdamWShampoo(params[:1])
    optimizer.param_groups.append({"params": params[1:], "lr": 0.1})
    with pytest.raises(ValueError, match=r"group 1 .*betas"):
        train(optimizer, params, 1)


def test_the_dict_that_a_user_passes_is_the_group():
    def act(make, params):
        group = {"params": params}
        optimizer = make([group])
        train(optimizer, params, 2)
        group["lr"] = 0.1
        train(optimizer, params, 2, first=2)

    compare_with_adamw(act)


# Keys of groups

FOREIGN = {
    "lr_mult": 0.5, "lr_scale": 0.5, "layer_id": 3, "group_name": "head", "name": "head", "max_lr": 0.1, "min_lr": 0.0,
    "initial_lr": 0.1, "fix_step": None, "swa_lr": 0.1, "base_momentum": 0.85, "max_momentum": 0.95, "wd_mult": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), FOREIGN.items(), ids=FOREIGN)
def test_foreign_keys_of_a_group_live_and_travel(key, value):
    params = make_params((6, 5), (7,))
    optimizer = AdamWShampoo([{"params": params[:1], key: value}])
    optimizer.add_param_group({"params": params[1:], key: value})
    train(optimizer, params, 1)
    other = AdamWShampoo([{"params": [p]} for p in params])
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    for group in (*optimizer.param_groups, *other.param_groups, *deepcopy(optimizer).param_groups):
        assert group[key] == value


@pytest.mark.parametrize(
    ("key", "option"), [("weight_dcay", "weight_decay"), ("beta", "betas"), ("epss", "eps"), ("lrr", "lr")]
)
def test_a_key_one_edit_away_from_an_option_is_an_error(key, option):
    with pytest.raises(ValueError, match=rf"unknown option {key}; did you mean {option}\?"):
        AdamWShampoo([{"params": make_params((2,)), key: 0.1}])


def test_the_groups_of_schedulefrees_optimizer_are_taken_over():
    optimizer = AdamWShampoo(schedulefree.AdamWScheduleFree(make_params((2, 3)), r=0.5, foreach=False).param_groups)
    assert optimizer.param_groups[0]["r"] == 0.5


@pytest.mark.parametrize("other", [torch.optim.AdamW, torch.optim.Adam, torch.optim.NAdam])
def test_the_groups_of_another_optimizer_are_taken_over_after_a_scheduler(other):
    def act(make, params):
        first = torch.optim.AdamW(params, lr=0.05, weight_decay=0.3)
        lr_scheduler.OneCycleLR(first, 0.1, total_steps=10)
        optimizer = make(first.param_groups)
        train(optimizer, params, 5)

    compare_with_adamw(act)
    theirs = other(make_params((2, 3)), lr=0.05)
    lr_scheduler.OneCycleLR(theirs, 0.1, total_steps=10)
    assert AdamWShampoo(theirs.param_groups).param_groups[0]["max_lr"] == 0.1


@pytest.mark.parametrize("name", ["amsgrad", "foreach", "fused", "capturable", "differentiable"])
def test_options_of_torchs_that_are_off_are_accepted_and_refused_with_a_reason_if_on(name):
    params = make_params((2, 3))
    for value in (False, None):
        train(AdamWShampoo([{"params": params, name: value}]), params, 1)
    with pytest.raises(ValueError, match=rf"^{name} is True; it must be False or None: \w+"):
        AdamWShampoo([{"params": params, name: True}])


def test_maximize_climbs_and_may_be_set_later():
    def act(make, params):
        optimizer = make(params, maximize=True)
        train(optimizer, params, 3)
        optimizer.param_groups[0]["maximize"] = False
        train(optimizer, params, 3, first=3)

    compare_with_adamw(act)


def test_maximize_equals_the_negative_gradient_with_preconditioning():
    weights = []
    for sign in (1.0, -1.0):
        params = make_params((6, 5), (20, 9))
        optimizer = AdamWShampoo(params, block_size=8, precondition_frequency=2, maximize=sign < 0, weight_decay=0.1)
        for t in range(6):
            set_gradients(params, t, scale=sign)
            optimizer.step()
        weights.append(params)
    assert identical(*weights)


# Learning rates

SCHEDULERS = {
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=12),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 1e-3, 1e-1, step_size_up=3),
    "SWALR": lambda optimizer: torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.1, anneal_epochs=3),
    "LambdaLR of tensors": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda t: torch.tensor(0.9) ** t),
    "MultiplicativeLR of tensors": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda t: torch.tensor(0.9)),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer, 0.1, 1, 3), lr_scheduler.ExponentialLR(optimizer, 0.9)], [3]
    ),
}


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
def test_rates_of_a_scheduler_are_followed_saved_and_loaded(schedule, tensor):
    def act(make, params):
        lr = torch.tensor(1e-2, dtype=torch.float64) if tensor else 1e-2
        optimizer = make(params, lr=lr)
        scheduler = schedule(optimizer)
        for t in range(6):
            train(optimizer, params, 1, first=t)
            scheduler.step()
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        resumed = make(params, lr=deepcopy(lr))
        resumed.load_state_dict(torch.load(file, weights_only=True))
        train(resumed, params, 3, first=6)

    compare_with_adamw(act)


def test_a_plateau_lowers_the_rate():
    def act(make, params):
        optimizer = make(params)
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
        for t in range(8):
            train(optimizer, params, 1, first=t)
            scheduler.step(1.0)
        assert optimizer.param_groups[0]["lr"] < ADAMW["lr"]

    compare_with_adamw(act)


def test_a_cycle_of_betas_through_zero_is_followed():
    def act(make, params):
        optimizer = make(params)
        scheduler = lr_scheduler.OneCycleLR(
            optimizer, 0.1, total_steps=12, base_momentum=0.0, pct_start=0.5, anneal_strategy="linear"
        )
        for t in range(10):
            train(optimizer, params, 1, first=t)
            scheduler.step()

    compare_with_adamw(act)


def test_a_rate_that_is_a_tensor_may_be_filled_in_place():
    def act(make, params):
        lr = torch.tensor(1e-2, dtype=torch.float64)
        optimizer = make(params, lr=lr)
        train(optimizer, params, 3)
        lr.fill_(0.1)
        train(optimizer, params, 3, first=3)

    compare_with_adamw(act)


def test_a_rate_may_be_a_tensor_with_one_dimension():
    weights = []
    for lr in (1e-2, torch.tensor([1e-2], dtype=torch.float64)):
        params = make_params((6, 5))
        train(AdamWShampoo(params, lr=lr), params, 3)
        weights.append(params)
    assert identical(*weights)


@pytest.mark.parametrize("lr", [torch.tensor(-1.0), torch.tensor(torch.nan), torch.ones(2), torch.tensor(1j)], ids=str)
def test_a_tensor_that_is_no_rate_is_refused_by_name(lr):
    with pytest.raises(ValueError, match=r"^lr is tensor\(.*; it must be "):
        AdamWShampoo(make_params((2, 3)), lr=lr)


def test_a_gradient_scaler_works_as_with_adamw():
    def act(make, params):
        optimizer, scaler = make(params), torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        for t in range(8):
            set_gradients(params, t, scale=scaler.get_scale())
            if t == 3:
                params[0].grad[0, 0] = torch.inf
            scaler.scale(torch.ones(1))
            scaler.step(optimizer)
            scaler.update()

    compare_with_adamw(act)


def test_a_compiled_step_works():
    def act(make, params):
        optimizer = make(params)
        step = torch.compile(optimizer.step, backend="eager")
        for t in range(4):
            set_gradients(params, t)
            step()

    compare_with_adamw(act)
