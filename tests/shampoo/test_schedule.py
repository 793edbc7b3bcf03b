import numpy
import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from shampoo.schedule import linear, trapezoid, warmup_cosine


def learning_rates(make, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return torch.tensor(rates, dtype=torch.float64)


@pytest.mark.parametrize(("hint", "warmup", "factor"), [(200, 0.02, 1.0), (333, 0.1, 0.6), (50, 0.05, 0.6)])
def test_tail_rise_equals_torchs_schedulers_in_sequence(hint, warmup, factor):
    """Compare far beyond the horizon too, where the cosine of the competition's schedule rises again."""
    horizon = factor * hint
    steps = int(warmup * horizon)

    def torchs(optimizer):
        up = LinearLR(optimizer, start_factor=1e-10, end_factor=1.0, total_iters=steps)
        return SequentialLR(optimizer, [up, CosineAnnealingLR(optimizer, T_max=max(horizon - steps, 1))], milestones=[steps])

    ours = learning_rates(lambda optimizer: warmup_cosine(optimizer, horizon, steps, "rise"), 2 * hint)
    torch.testing.assert_close(ours, learning_rates(torchs, 2 * hint), rtol=1e-6, atol=1e-9)


def test_tail_zero_stays_at_zero():
    rates = learning_rates(lambda optimizer: warmup_cosine(optimizer, 100, 10), 150)
    assert rates.argmax() == 10
    assert rates[10] == 0.5
    assert (rates[100:] == 0).all()


def test_without_warmup_it_starts_at_the_peak():
    assert learning_rates(lambda optimizer: warmup_cosine(optimizer, 100, 0), 1)[0] == 0.5


def test_an_unknown_tail_is_refused():
    with pytest.raises(ValueError, match="tail is 'flat'; it must be one of zero, rise"):
        warmup_cosine(torch.optim.SGD([torch.zeros(1)]), 10, 1, "flat")


@pytest.mark.parametrize(("num_steps", "warmup"), [(100, 10), (61.5, 3), (40, 0)])
@pytest.mark.parametrize(("make", "flat"), [(linear, 0), (trapezoid, 1 / 3)])
def test_a_line_falls_at_once_and_a_trapezoid_is_flat_for_a_third(make, flat, num_steps, warmup):
    rates = learning_rates(lambda optimizer: make(optimizer, num_steps, warmup), 120)
    knots = torch.tensor([0.0, warmup, warmup + flat * (num_steps - warmup), num_steps, 121], dtype=torch.float64)
    steps = torch.arange(120, dtype=torch.float64)
    values = [0.0 if warmup else 0.5, 0.5, 0.5, 0.0, 0.0]
    expected = numpy.interp(steps, knots, values) if warmup else numpy.interp(steps, knots[1:], values[1:])
    torch.testing.assert_close(rates, torch.tensor(expected), rtol=0, atol=1e-9)
