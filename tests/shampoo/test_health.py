"""Gradients and factors that are not finite, too large or too small: what is skipped, what goes on, what is said."""

import logging
from copy import deepcopy

import numpy as np
import pytest
import torch

from experiments.inverse_roots import KINDS, judge, survey
from experiments.soak import soak
from shampoo import AdamWShampoo, health
from shampoo.roots import SOLVERS

SMALL = {"lr": 0.1, "precondition_frequency": 2, "weight_decay": 0.1, "momentum": 0.5}
MULTIPLE = {"eigh": 1, "qr": 1, "newton": 10}  # of the bound of a backward stable solver


def make(*shapes, dtype=torch.float32, **options):
    draw = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in shapes]
    named = [(f"layer{i}", p) for i, p in enumerate(params)] if torch.__version__ >= "2.6" else params
    return params, AdamWShampoo(named, **{**SMALL, **options})


def step(params, optimizer, t, scale=1.0):
    draw = torch.Generator().manual_seed(t)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=draw)).to(p.dtype)
    optimizer.step()


def kept(params, optimizer):
    """Copies of weights, state and counts."""
    return [p.detach().clone() for p in params], deepcopy(optimizer.state_dict())


def same(one, other):
    (weights, state), (weights_, state_) = one, other
    tensors = [(x, state_["state"][i][name]) for i, of in state["state"].items() for name, x in of.items()]
    pairs = [*zip(weights, weights_, strict=True), *tensors]
    return all(torch.equal(x, y) for x, y in pairs) and state["param_groups"] == state_["param_groups"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e20])
def test_a_step_whose_gradients_are_not_finite_changes_nothing(value, caplog):
    params, optimizer = make((4, 5), (3,))
    for t in range(3):
        step(params, optimizer, t)
    before = kept(params, optimizer)
    params[1].grad[2] = value
    with caplog.at_level(logging.WARNING, logger="shampoo"):
        optimizer.step()
    assert same(before, kept(params, optimizer))
    assert optimizer.events == {"steps skipped": 1}
    assert "shape (3,) hold NaN or Inf" in caplog.text
    assert "(4, 5)" not in caplog.text
    step(params, optimizer, 4)
    assert not same(before, kept(params, optimizer))


def test_the_last_step_that_may_be_skipped_is_an_error():
    params, optimizer = make((4, 5), max_skipped_steps=3)
    for t, bad in enumerate([True, True, False, True, True]):
        step(params, optimizer, t, torch.nan if bad else 1.0)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row were skipped, and max_skipped_steps is 3: .*\(4, 5\)"):
        step(params, optimizer, 9, torch.nan)
    assert optimizer.events["steps skipped"] == 5
    optimizer.load_state_dict(optimizer.state_dict())
    step(params, optimizer, 10, torch.nan)  # counted from one again


def test_where_the_host_does_not_wait_the_next_step_counts(monkeypatch, device):
    """As on an accelerator: no weight moves, and what the step saw is read at the next."""
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
def test_weights_stay_finite_whatever_the_scale(scale, dtype, grafting):
    params, optimizer = make((6, 5), (7,), dtype=dtype, grafting=grafting, block_size=5, lr=1e-6)
    for t in range(8):
        step(params, optimizer, t, scale)
    step(params, optimizer, 9)
    assert all(torch.isfinite(p).all() for p in params)


def test_shampoo_does_not_see_the_scale_of_gradients():
    """Powers that sum to 1/2 and Adam's length: the same weights, whatever power of two gradients are multiplied by."""
    found = []
    for scale in (1.0, 2.0**40, 2.0**-40):
        params, optimizer = make((6, 5), block_size=6, eps=1e-30, grafting_eps=0.0)
        for t in range(12):
            step(params, optimizer, t, scale)
        found.append(params[0].detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-5)


def test_newton_goes_on_while_the_small_eigenvalues_grow():
    """They are far from 1 for as long as the largest ones take to settle, and some entries grow meanwhile."""
    draw = np.random.default_rng(0)
    for d in range(2, 30):
        found = judge(KINDS["repeated eigenvalues"](draw, d), p=1 / 8, eps=1e-10, solver="newton")
        assert found["error"] <= MULTIPLE["newton"] * found["bound"]


def test_zeros_first_gradients_late_and_alternation():
    params, optimizer = make((4, 5), (4, 5), (4, 5))
    for t in range(400):
        step(params, optimizer, t)
        params[0].grad = torch.zeros(4, 5) if t < 300 else params[0].grad  # zero for long
        params[1].grad = params[1].grad if t > 390 else None  # the first one late
        params[2].grad *= t % 2
        before = [p.detach().clone() for p in params]
        optimizer.step()
        assert all(torch.isfinite(p).all() for p in params)
        assert all((p - q).norm() < 2 for p, q in zip(params, before))
    assert not optimizer.events


@pytest.mark.parametrize("first", [True, False], ids=["no root yet", "a root before"])
def test_a_factor_that_is_lost_costs_its_block_alone(first, caplog):
    """Its root stays as it was, or is the identity; the other blocks of its stack move as ever; it is said once."""
    lost, whole = make((8, 4), (3,), block_size=4), make((8, 4), (3,), block_size=4)
    for t in range(1 if first else 3):
        step(*lost, t)
        step(*whole, t)
    lost[1]._buckets[0][0].factors[0][0][1, 0, 0] = torch.inf
    with caplog.at_level(logging.WARNING, logger="shampoo"):
        for t in range(3, 7):
            step(*lost, t)
            step(*whole, t)
    cause = "roots replaced by the identity" if first else "roots kept as they were"
    assert lost[1].events[cause] >= 1
    assert caplog.text.count("roots") == len(lost[1].events)
    assert "shape (8, 4)" in caplog.text
    assert torch.equal(lost[0][0][:4], whole[0][0][:4])
    assert torch.equal(lost[0][1], whole[0][1])
    assert torch.isfinite(lost[0][0]).all()
    assert not torch.equal(lost[0][0][4:], whole[0][0][4:])


def test_roots_of_matrices_of_every_kind():
    """300 of the 10,000 of `experiments/inverse_roots.py`, the largest ones left to it."""
    found = survey(300, seed=1, solvers=list(SOLVERS), largest=128)
    assert not found["broken"].any()
    assert not found["rescued"].any()
    bounded = found[found["bound"] <= 0.1]
    assert len(bounded) > 300
    assert (bounded["error"] <= bounded["solver"].map(MULTIPLE) * bounded["bound"]).all()


@pytest.mark.parametrize("number", [np.float64(0.1), np.float32(0.1), np.int64(1)])
def test_numbers_of_numpy_are_plain_numbers_in_a_checkpoint(number, tmp_path):
    params, optimizer = make((2, 3), lr=number)
    optimizer.param_groups[0]["weight_decay"] = number  # as a scheduler might
    step(params, optimizer, 0)
    torch.save(optimizer.state_dict(), tmp_path / "saved")
    loaded = torch.load(tmp_path / "saved", weights_only=True)
    assert loaded["param_groups"][0]["lr"] == pytest.approx(float(number))
    assert type(loaded["param_groups"][0]["weight_decay"]) in (float, int)


def test_a_long_run_with_saving_and_loading_is_the_run_without():
    """A part of the 20,000 steps of `experiments/soak.py`."""
    skipped, _ = soak(steps=450, save_every=45)
    assert skipped > 0
