"""Gradients and factors that are non-finite, too large or too small: what is skipped, what continues, what is logged."""

import logging
from copy import deepcopy

import numpy as np
import pytest
import torch
from common import identical, make_params, set_gradients

from shampoo import AdamWShampoo, health

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
