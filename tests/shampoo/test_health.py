"""Gradients and factors that are non-finite, too large or too small: what is skipped, what continues, what is logged."""

import logging
from copy import deepcopy

import numpy as np
import pytest
import torch
from common import identical, make_params, set_gradients

from shampoo import AdamWShampoo, health, preconditioner

SMALL = {"lr": 0.1, "precondition_frequency": 2, "weight_decay": 0.1, "momentum": 0.5}


def make(*shapes, dtype=torch.float32, **options):
    """Return parameters and their optimizer, which knows their names where torch supports it."""
    params = make_params(*shapes, dtype=dtype)
    named = [(f"layer{i}", p) for i, p in enumerate(params)] if torch.__version__ >= "2.6" else params
    return params, AdamWShampoo(named, **{**SMALL, **options})


def step(params, optimizer, t, scale=1.0):
    set_gradients(params, seed=t, scale=scale)
    optimizer.step()


def snapshot(params, optimizer):
    """Return copies of the weights and the state."""
    return [p.detach().clone() for p in params], deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e20])
def test_a_step_with_non_finite_gradients_changes_nothing(value, caplog):
    params, optimizer = make((4, 5), (3,))
    for t in range(3):
        step(params, optimizer, t)
    before = snapshot(params, optimizer)
    params[1].grad[2] = value
    with caplog.at_level(logging.WARNING, logger="shampoo"):
        optimizer.step()
    assert identical(before, snapshot(params, optimizer))
    assert optimizer.events == {"steps skipped": 1}
    assert "shape (3,) hold NaN or Inf" in caplog.text
    assert "(4, 5)" not in caplog.text
    step(params, optimizer, 4)
    assert not identical(before, snapshot(params, optimizer))


def test_too_many_consecutive_skipped_steps_raise():
    params, optimizer = make((4, 5), max_skipped_steps=3)
    for t, bad in enumerate([True, True, False, True, True]):
        step(params, optimizer, t, torch.nan if bad else 1.0)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row were skipped, and max_skipped_steps is 3: .*\(4, 5\)"):
        step(params, optimizer, 9, torch.nan)
    assert optimizer.events["steps skipped"] == 5
    optimizer.load_state_dict(optimizer.state_dict())
    step(params, optimizer, 10, torch.nan)  # the count starts over


def test_on_an_accelerator_the_next_step_counts_the_skipped_one(monkeypatch, device):
    """No weight moves in a skipped step, and the host reads its flag only at the next step."""
    monkeypatch.setattr(health, "waits", lambda x: True)
    params, optimizer = make((4, 5), (3,), max_skipped_steps=2)
    for t in range(3):
        step(params, optimizer, t)
    before = [p.detach().clone() for p in params]
    step(params, optimizer, 3, torch.nan)
    assert all(map(torch.equal, before, params))
    assert not optimizer.events
    step(params, optimizer, 4)
    assert optimizer.events == {"steps skipped": 1}
    assert all(torch.isfinite(p).all() and (p != q).all() for p, q in zip(params, before))
    step(params, optimizer, 5, torch.nan)
    step(params, optimizer, 6, torch.nan)
    with pytest.raises(FloatingPointError, match="2 steps in a row"):
        optimizer.step()


@pytest.mark.parametrize("grafting", ["adam", "none", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1e20, 1e15, 1e-20, 1e-30, 0.0])
def test_weights_stay_finite_at_any_gradient_scale(scale, dtype, grafting):
    params, optimizer = make((6, 5), (7,), dtype=dtype, grafting=grafting, block_size=5, lr=1e-6)
    for t in range(8):
        step(params, optimizer, t, scale)
    step(params, optimizer, 9)
    assert all(torch.isfinite(p).all() for p in params)


def test_weights_do_not_depend_on_the_scale_of_gradients():
    """With exponents that sum to 1/2 and Adam grafting, a factor of 2^40 or 2^-40 leaves the weights unchanged."""
    found = []
    for scale in (1.0, 2.0**40, 2.0**-40):
        params, optimizer = make((6, 5), block_size=6, eps=1e-30, grafting_eps=0.0)
        for t in range(12):
            step(params, optimizer, t, scale)
        found.append(params[0].detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-5)


def test_zero_late_and_alternating_gradients_keep_weights_finite():
    params, optimizer = make((4, 5), (4, 5), (4, 5))
    for t in range(400):
        step(params, optimizer, t)
        params[0].grad = torch.zeros(4, 5) if t < 300 else params[0].grad  # zero for 300 steps
        params[1].grad = params[1].grad if t > 390 else None  # the first gradient comes late
        params[2].grad *= t % 2
        before = [p.detach().clone() for p in params]
        optimizer.step()
        assert all(torch.isfinite(p).all() for p in params)
        assert all((p - q).norm() < 2 for p, q in zip(params, before))
    assert not optimizer.events


@pytest.mark.parametrize("first", [True, False], ids=["no previous root", "previous root"])
def test_a_non_finite_factor_affects_only_its_own_block(first, caplog):
    """Its root stays as it was, or becomes the identity; the other blocks of its stack are unaffected; it is logged once."""
    lost, intact = make((8, 4), (3,), block_size=4), make((8, 4), (3,), block_size=4)
    for t in range(1 if first else 3):
        step(*lost, t)
        step(*intact, t)
    lost[1]._buckets[0].preconditioners[0].factors[0][1, 0, 0] = torch.inf
    with caplog.at_level(logging.WARNING, logger="shampoo"):
        for t in range(3, 7):
            step(*lost, t)
            step(*intact, t)
    cause = "roots replaced by the identity" if first else "roots kept as they were"
    assert lost[1].events[cause] >= 1
    assert caplog.text.count("roots") == len(lost[1].events)
    assert "shape (8, 4)" in caplog.text
    assert torch.equal(lost[0][0][:4], intact[0][0][:4])
    assert torch.equal(lost[0][1], intact[0][1])
    assert torch.isfinite(lost[0][0]).all()
    assert not torch.equal(lost[0][0][4:], intact[0][0][4:])


@pytest.mark.parametrize("number", [np.float64(0.1), np.float32(0.1), np.int64(1)])
def test_numpy_numbers_become_python_numbers_in_a_checkpoint(number, tmp_path):
    params, optimizer = make((2, 3), lr=number)
    optimizer.param_groups[0]["weight_decay"] = number  # as a scheduler might
    step(params, optimizer, 0)
    torch.save(optimizer.state_dict(), tmp_path / "saved")
    loaded = torch.load(tmp_path / "saved", weights_only=True)
    assert loaded["param_groups"][0]["lr"] == pytest.approx(float(number))
    assert type(loaded["param_groups"][0]["weight_decay"]) in (float, int)


@pytest.mark.parametrize("grafting", ["adam", "rmsprop", "adagrad", "sgd", "none"])
@pytest.mark.parametrize("start", [1, 100], ids=["with roots", "before the first roots"])
def test_without_grafting_eps_a_row_without_gradient_leaves_all_weights_finite(start, grafting, device):
    """Where torch.optim.AdamW divides 0 by 0 and has NaN, weights stay but for rounding; all others move."""
    (ours,), (theirs,) = make_params((6, 8), device=device), make_params((6, 8), device=device)
    options = {"grafting_eps": 0.0, "grafting": grafting, "start_preconditioning_step": start, "merge_dims": False}
    optimizers = AdamWShampoo([ours], **options), torch.optim.AdamW([theirs], eps=0.0, weight_decay=0.0)
    start_weights = ours.detach().clone()
    for t in range(4):
        for p, optimizer in zip((ours, theirs), optimizers):
            set_gradients([p], t)
            p.grad[2] = 0
            optimizer.step()
    assert theirs.isnan().sum() == 8
    assert ours.isfinite().all()
    torch.testing.assert_close(ours[2], start_weights[2], rtol=0, atol=1e-5)
    if not (grafting == "none" and start == 100):
        others = [0, 1, 3, 4, 5]
        assert (ours[others] != start_weights[others]).all()


def test_a_parameter_without_a_nonzero_gradient_stays_where_it_is_without_grafting_eps():
    params = make_params((6, 5), (7,))
    optimizer = AdamWShampoo(params, grafting_eps=0.0, precondition_frequency=2)
    before = [p.detach().clone() for p in params]
    for t in range(4):
        set_gradients(params, t, scale=0.0)
        optimizer.step()
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize("grafting", ["adam", "sgd", "none"])
def test_a_direction_that_is_not_finite_is_counted_and_moves_by_grafting(grafting, caplog, device):
    """Roots of zero factors are 1e12 on both sides, and a gradient of 1e15 comes before the next refresh."""
    params = make_params((8, 4), (4, 3), device=device)
    optimizer = AdamWShampoo(params, exponents=1, eps=1e-12, grafting=grafting, precondition_frequency=10, block_size=4)
    for t in range(10):
        set_gradients(params, t, scale=0.0)
        optimizer.step()
    for p in params:
        p.data.zero_()
    set_gradients(params, 10, scale=1e-7)
    params[0].grad[:4] *= 1e22  # one block of two; a second parameter
    with caplog.at_level(logging.WARNING, logger="shampoo"):
        optimizer.step()
    assert all(p.isfinite().all() for p in params)
    moved = [p.detach().abs() for p in params]
    assert moved[0][4:].min() > 0
    assert moved[1].min() > 0
    assert (moved[0][:4].min() > 0) == (grafting != "none")  # without grafting a block stays where it is
    assert grafting != "adam" or moved[0].max() < 3e-3
    if device.type == "cpu":
        assert optimizer.events == {"directions not finite": 1}
        assert "directions not finite for a block of parameter 0 of shape (8, 4)" in caplog.text


def test_a_direction_that_is_not_finite_does_not_stay_in_the_momentum():
    (p,) = make_params((4, 4))
    optimizer = AdamWShampoo(
        [p], exponents=1, eps=1e-12, precondition_frequency=10, block_size=4, momentum=0.9, merge_dims=False
    )
    for t in range(20):
        set_gradients([p], t, scale=1e15 if t == 10 else 0.0)
        optimizer.step()
        assert p.isfinite().all()
    assert optimizer.state[p]["momentum_buffer"].isfinite().all()


@pytest.mark.parametrize("exponents", [1, 0.75])
@pytest.mark.parametrize("scale", [1e8, 1e15])
def test_a_direction_that_vanishes_does_not_freeze_weights(scale, exponents):
    """Of gradients of 1e8, the direction with exponents 1 is about 1e-24; its length should be that of Adam's step."""
    (p,) = make_params((6, 5))
    optimizer = AdamWShampoo([p], exponents=exponents, block_size=6, precondition_frequency=2)
    for t in range(6):
        set_gradients([p], t, scale)
        before = p.detach().clone()
        optimizer.step()
    assert (p - before).norm() > 1e-3 or optimizer.events


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", ["eigh", "qr"])
def test_a_root_that_bfloat16_cannot_hold_is_its_largest_number(solver, dtype):
    """A root of 3.4e38 is finite in float32, and rounds to Inf in bfloat16."""
    params = make_params((6, 5), dtype=dtype)
    optimizer = AdamWShampoo(
        params, eps=3.4e38**-0.25, exponents=4, bf16_roots=True, precondition_frequency=2, block_size=6, solver=solver
    )
    for t in range(4):
        set_gradients(params, t, scale=0.0)
        optimizer.step()
    root = optimizer.state[params[0]]["inv_roots.0.0"]
    assert root.dtype == torch.bfloat16
    assert root[0].diagonal().tolist() == [torch.finfo(torch.bfloat16).max] * 6
    for t in range(4):
        set_gradients(params, t, scale=1e-3)
        optimizer.step()
        assert all(p.isfinite().all() for p in params)
    assert all(x.isfinite().all() for x in optimizer.state[params[0]].values())


@pytest.mark.parametrize("grafting", ["adam", "adagrad", "sgd"])
@pytest.mark.parametrize("missing", [False, True])
def test_sums_that_overflow_stay_finite(grafting, missing):
    """Two hundred gradients whose squares add up to more than float32 holds."""
    params = make_params((6, 5), (7,))
    optimizer = AdamWShampoo(params, betas=(0.9, 1.0), grafting=grafting, precondition_frequency=2, block_size=6)
    for t in range(200):
        set_gradients(params, t, scale=2.5e18)
        params[1].grad = params[1].grad if t % 2 or not missing else None
        optimizer.step()
        assert all(p.isfinite().all() for p in params)
    for p in params:
        assert all(x.isfinite().all() for x in optimizer.state[p].values())
    before = [p.detach().clone() for p in params]
    assert 9e37 < optimizer.state[params[0]]["factors.0.0"].max() <= 1.0001e38
    set_gradients(params, 200, scale=2.5e18)
    optimizer.step()
    assert all((p != q).any() for p, q in zip(params, before))


@pytest.mark.parametrize("exponents", [1e-30, 1e-320, (1e-30, 0.5), (0.5, 1e-30), 1 / 65, 0.3])
def test_newton_refuses_exponents_that_it_cannot_have(exponents):
    with pytest.raises(ValueError, match=r"solver 'newton' needs exponents 0, 1, 1/2, ..., 1/64"):
        AdamWShampoo(make_params((6, 5)), solver="newton", exponents=exponents, block_size=6)
    (p,) = params = make_params((6, 5))
    optimizer = AdamWShampoo(params, solver="newton", block_size=6)
    step(params, optimizer, 0)
    optimizer.param_groups[0]["exponents"] = exponents
    before = p.detach().clone()
    with pytest.raises(ValueError, match="solver 'newton' needs exponents"):
        step(params, optimizer, 1)
    assert torch.equal(p, before)
    optimizer.param_groups[0]["exponents"] = 1 / 64
    step(params, optimizer, 2)
    assert p.isfinite().all()


@pytest.mark.parametrize("factor_frequency", [2, 3])
@pytest.mark.parametrize("stagger", [False, True])
def test_heads_that_are_trained_in_turn_all_have_factors(stagger, factor_frequency):
    heads = make_params((6, 5), (6, 5), (6, 5))[:factor_frequency]
    optimizer = AdamWShampoo(heads, factor_frequency=factor_frequency, precondition_frequency=4, block_size=6, stagger=stagger)
    for t in range(24):
        set_gradients(heads, t)
        for i, p in enumerate(heads):
            p.grad = p.grad if t % len(heads) == i else None
        optimizer.step()
    factors, roots = ([optimizer.state[p][f"{name}.0.0"] for p in heads] for name in ("factors", "inv_roots"))
    assert all(x.any() for x in factors + roots)
    identity = 1e-8**-0.25 * torch.eye(6)  # the root of an empty factor
    assert all((x - identity).norm() > 1 for x in roots)


@pytest.mark.parametrize("chunk", [1, 2**22], ids=["one block at a time", "all blocks"])
def test_a_factor_that_is_not_finite_starts_anew_and_its_parameter_is_named(chunk, caplog, monkeypatch):
    """One of three blocks of the second stack: the others keep their factors, and later roots are as usual."""
    monkeypatch.setattr(preconditioner, "SOLVER_CHUNK", chunk)
    params = make_params((4, 3), (6, 5), (6, 5), (6, 5))
    optimizer = AdamWShampoo(params, precondition_frequency=2, merge_dims=False)
    for t in range(3):
        step(params, optimizer, t)
    optimizer.state[params[2]]["factors.0.1"][0, 2, 2] = torch.inf
    lengths = [optimizer.state[p]["factors.0.1"].norm() for p in params]
    with caplog.at_level(logging.WARNING, logger="shampoo"):
        step(params, optimizer, 3)
    assert optimizer.events == {"roots kept as they were": 1}
    assert "roots kept as they were for a block of parameter 2 of shape (6, 5)" in caplog.text
    state = [optimizer.state[p] for p in params]
    assert not state[2]["factors.0.1"].any()
    assert all(state[i]["factors.0.1"].norm() > 0.9 * lengths[i] for i in (0, 1, 3))
    root = state[2]["inv_roots.0.1"].clone()
    for t in range(4, 6):
        step(params, optimizer, t)
    assert optimizer.events == {"roots kept as they were": 1}  # it is counted once
    assert not torch.equal(root, optimizer.state[params[2]]["inv_roots.0.1"])
    assert all(x.isfinite().all() for p in params for x in optimizer.state[p].values())


def test_a_direction_that_is_not_finite_is_counted_once():
    (p,) = params = make_params((4, 4))
    options = {"exponents": 1, "eps": 1e-12, "betas": (0.0, 0.9), "block_size": 4, "merge_dims": False}
    optimizer = AdamWShampoo(params, precondition_frequency=10, **options)
    for t in range(15):
        set_gradients(params, t, scale=1e15 if t == 10 else 0.0)
        optimizer.step()
        assert optimizer.events == ({"directions not finite": 1} if t >= 10 else {})
    assert p.isfinite().all()


@pytest.mark.parametrize("value", [-1.0, 1.5, torch.nan, torch.inf, True, "7", None, torch.ones(2)])
def test_a_count_of_steps_that_is_none_is_refused(value):
    params, optimizer = make((4, 5))
    step(params, optimizer, 0)
    saved = deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = torch.tensor(value) if isinstance(value, float) else value
    with pytest.raises(ValueError, match=r"shape \(4, 5\) holds .* for step; it must be an integer >= 0"):
        optimizer.load_state_dict(saved)
