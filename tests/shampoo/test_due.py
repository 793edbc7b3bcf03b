"""The blocks that are due at a step: staggered refreshes, and options that change in mid-run. No root stays empty."""

from itertools import pairwise

import pytest
import torch
from common import make_params, set_gradients, train
from hypothesis import given
from hypothesis import strategies as st

from shampoo import AdamWShampoo
from shampoo.due import due_blocks

STACKS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=5)


@given(STACKS, st.integers(1, 12), st.integers(1, 30))
def test_every_block_is_due_once_per_period(stacks, frequency, start):
    stacks = tuple(stacks)
    due = [due_blocks(stacks, t, start, frequency, stagger=True) for t in range(start + 3 * frequency + 1)]
    blocks = [(i, b) for i, (count, *_) in enumerate(stacks) for b in range(count)]
    for block in blocks:
        own = [t for t, of_step in enumerate(due) for i, some in enumerate(of_step) if block in ((i, b) for b in some)]
        assert own[0] <= start
        assert own[0] > start - frequency
        assert all(1 <= later - t <= frequency for t, later in pairwise(own))
        assert all(later - t == frequency for t, later in pairwise(own) if t > start)


@given(STACKS, st.integers(1, 12))
def test_no_step_costs_more_than_its_share_plus_one_block(stacks, frequency):
    def cost(of_step):
        return sum(len(some) * (m**3 + n**3) for some, (_, m, n) in zip(of_step, stacks))

    costs = [cost(due_blocks(tuple(stacks), t, 1, frequency, stagger=True)) for t in range(frequency + 1, 2 * frequency + 1)]
    assert sum(costs) == sum(count * (m**3 + n**3) for count, m, n in stacks)
    assert max(costs) <= sum(costs) / frequency + max(m**3 + n**3 for _, m, n in stacks)


def test_staggering_does_not_change_constant_roots():
    """With a constant gradient, bias-corrected factors are constant, and so are roots, whenever they are computed."""
    torch.manual_seed(0)
    start, G = torch.randn(2, 24, 20, dtype=torch.float64)
    weights = []
    for stagger in (False, True):
        W = torch.nn.Parameter(start.clone())
        optimizer = AdamWShampoo([W], lr=0.1, block_size=6, precondition_frequency=4, stagger=stagger, betas=(0.9, 0.9))
        for _ in range(20):
            W.grad = G.clone()
            optimizer.step()
        weights.append(W.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)


SHAPES = [(24, 20), (7, 9), (7, 9), (5,), (6, 5, 4)]


def rootless(optimizer):
    """Return parameter and key of each block without roots."""
    state = optimizer.state_dict()["state"]
    return [
        (i, key, b)
        for i, entry in state.items()
        for key, X in entry.items()
        for b in range(len(X) if "roots" in key else 0)
        if not X[b].any()
    ]


def train_and_check(optimizer, params, steps, has=lambda t, i: True):
    """Take these steps. What has a gradient must move, and from the start on blocks that had one must have roots."""
    for t in steps:
        set_gradients(params, t)
        for i, p in enumerate(params):
            p.grad = p.grad if has(t, i) else None
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for i, (p, q) in enumerate(zip(params, before)):
            assert (p != q).all() if has(t, i) else torch.equal(p, q), (t, i)
        group = optimizer.param_groups[0]
        if group["step"] >= group["start_preconditioning_step"]:
            trained = {i for i in range(len(params)) if any(has(s, i) for s in range(1, t + 1))}
            assert not [found for found in rootless(optimizer) if found[0] in trained], t


def change(**options):
    """Return a function that sets options of a group."""
    return lambda optimizer: optimizer.param_groups[0].update(options)


STAGGERED = {"precondition_frequency": 6, "stagger": True}
LATE = {"precondition_frequency": 20, "start_preconditioning_step": 1000}
# For each case the options at first, how many steps are taken with them, and what changes then.
CHANGES = {
    "frequency raised": ({"precondition_frequency": 3}, 5, change(precondition_frequency=50)),
    "frequency raised before the start": ({"precondition_frequency": 10}, 4, change(precondition_frequency=50)),
    "frequency lowered before the start": ({"precondition_frequency": 10}, 4, change(precondition_frequency=3)),
    "frequency changed while staggered": (STAGGERED, 8, change(precondition_frequency=11)),
    "frequency raised before the staggered start": (STAGGERED, 4, change(precondition_frequency=40)),
    "frequency lowered before the staggered start": (STAGGERED, 4, change(precondition_frequency=2)),
    "staggered later": ({"precondition_frequency": 7}, 5, change(stagger=True)),
    "staggered at the step before the start": ({"precondition_frequency": 7}, 6, change(stagger=True)),
    "staggered after the start": ({"precondition_frequency": 7}, 10, change(stagger=True)),
    "staggered and a higher frequency": ({"precondition_frequency": 7}, 5, change(stagger=True, precondition_frequency=40)),
    "no longer staggered": (STAGGERED, 3, change(stagger=False)),
    "start lowered": ({**LATE, "stagger": False}, 7, change(start_preconditioning_step=5)),
    "start lowered while staggered": ({**LATE, "stagger": True}, 7, change(start_preconditioning_step=5)),
    "start lowered to the next step": ({**LATE, "stagger": False}, 7, change(start_preconditioning_step=8)),
    "start raised": ({"precondition_frequency": 5}, 7, change(start_preconditioning_step=12)),
    "start raised before it": (
        {"precondition_frequency": 5},
        4,
        change(start_preconditioning_step=12, precondition_frequency=40),
    ),
}


@pytest.mark.parametrize("grafting", ["adam", "sgd"])
@pytest.mark.parametrize("case", CHANGES)
def test_weights_move_at_every_step_when_options_change(case, grafting):
    options, steps, act = CHANGES[case]
    params = make_params(*SHAPES, dtype=torch.float64)
    optimizer = AdamWShampoo(params, grafting=grafting, block_size=6, **options)
    train_and_check(optimizer, params, range(1, steps + 1))
    act(optimizer)
    train_and_check(optimizer, params, range(steps + 1, steps + 26))


@pytest.mark.parametrize("case", CHANGES)
def test_weights_move_at_every_step_when_options_change_and_gradients_come_late(case):
    """One parameter has its first gradient after the change, one every fourth."""
    options, steps, act = CHANGES[case]
    params = make_params(*SHAPES, dtype=torch.float64)
    optimizer = AdamWShampoo(params, block_size=6, **options)
    has = [lambda t: True, lambda t: t > steps + 5, lambda t: t % 4 == 0, lambda t: t > steps + 3, lambda t: True]
    train_and_check(optimizer, params, range(1, steps + 1), lambda t, i: has[i](t))
    act(optimizer)
    train_and_check(optimizer, params, range(steps + 1, steps + 26), lambda t, i: has[i](t))


@pytest.mark.parametrize("case", CHANGES)
def test_weights_move_without_grafting_from_the_start_on_when_options_change(case):
    """Before it, roots are zero, and nothing moves."""
    options, steps, act = CHANGES[case]
    params = make_params(*SHAPES, dtype=torch.float64)
    optimizer = AdamWShampoo(params, grafting="none", block_size=6, **options)
    for t in range(1, steps + 26):
        if t == steps + 1:
            act(optimizer)
        set_gradients(params, t)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        if t >= optimizer.param_groups[0]["start_preconditioning_step"]:
            assert all((p != q).all() for p, q in zip(params, before)), t
            assert not rootless(optimizer)


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("steps", [3, 5, 8, 11])
def test_weights_move_at_every_step_after_a_resume_with_other_stacks(steps, stagger):
    """Groups of the same parameters in another order of shapes: blocks lie in other stacks, with other steps of refresh."""
    options = {"block_size": 6, "precondition_frequency": 7, "stagger": stagger}
    params = make_params(*SHAPES, dtype=torch.float64)
    optimizer = AdamWShampoo(params, **options)
    train_and_check(optimizer, params, range(1, steps + 1))
    saved = optimizer.state_dict()
    order = [3, 1, 4, 0, 2]
    shuffled = [params[i] for i in order]
    saved = {**saved, "state": {k: saved["state"][i] for k, i in enumerate(order)}}
    other = AdamWShampoo(shuffled, **options)
    other.load_state_dict(saved)
    train_and_check(other, shuffled, range(steps + 1, steps + 26))


@pytest.mark.parametrize("stagger", [False, True])
def test_a_parameter_that_is_reset_or_added_in_mid_run_gets_roots_at_its_first_gradient(stagger):
    params = make_params(*SHAPES, dtype=torch.float64)
    optimizer = AdamWShampoo(params[:3], block_size=6, precondition_frequency=7, stagger=stagger)
    train_and_check(optimizer, params[:3], range(1, 11))
    del optimizer.state[params[1]]
    train_and_check(optimizer, params[:3], range(11, 21))
    optimizer.param_groups[0]["params"].append(params[3])
    train_and_check(optimizer, params[:4], range(21, 31))
    optimizer.state.clear()
    train_and_check(optimizer, params[:4], range(31, 41))


def test_a_block_without_roots_gets_them_alone():
    """Of a stack, the roots of the other blocks stay as they are until they are due."""
    params = make_params((6, 5), (6, 5))
    optimizer = AdamWShampoo(params, block_size=6, precondition_frequency=10)
    roots = []
    for t in range(1, 21):
        set_gradients(params, t)
        params[1].grad = params[1].grad if t > 13 else None
        optimizer.step()
        roots.append([optimizer.state[p]["inv_roots.0.0"].clone() for p in params])
    changed = [[t for t in range(2, 21) if not torch.equal(roots[t - 1][i], roots[t - 2][i])] for i in range(2)]
    assert changed == [[10, 20], [14, 20]]


def test_a_frequency_beyond_any_run_takes_neither_memory_nor_time():
    params = make_params((6, 5), (7,))
    optimizer = AdamWShampoo(params, stagger=True, precondition_frequency=10**12, start_preconditioning_step=2)
    train(optimizer, params, 4)
    assert optimizer.state[params[0]]["inv_roots.0.0"].any()
