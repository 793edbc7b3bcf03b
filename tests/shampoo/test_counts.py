"""Bias corrections count a parameter's own gradients, as in torch.optim.AdamW; start and frequency count the group's steps."""

import numpy as np
import pytest
import torch
from common import COMPETITION, largest_difference, make_params, set_gradients
from reference import trajectory

from shampoo import AdamWShampoo

NEVER = 10**9
SHAPES = [(6, 5), (7,), (), (6, 5), (20, 9), (6, 5)]
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
PATTERNS = {  # which of the parameters has a gradient at step t = 1, 2, ...
    "late": lambda t, i: i != 0 or t > 2000,
    "every 20th": lambda t, i: i != 0 or t % 20 == 0,
    "frozen": lambda t, i: i != 0,
    "different counts in one stack": lambda t, i: t % (i + 1) == 0,
    "stops": lambda t, i: i != 0 or t <= 50,
    "none at first": lambda t, i: t > 50 and t % (i + 1) == 0,
}


def largest_step_difference(pattern, steps, shapes=SHAPES, seen=lambda t, ours: None, **options):
    """Train with our optimizer before its first roots and with AdamW, in float64. Return the largest difference of weights."""
    ours, theirs = (make_params(*shapes, dtype=torch.float64) for _ in range(2))
    optimizers = AdamWShampoo(ours, start_preconditioning_step=NEVER, **ADAMW, **options), torch.optim.AdamW(theirs, **ADAMW)
    worst = 0.0
    for t in range(1, steps + 1):
        for params, optimizer in zip((ours, theirs), optimizers):
            set_gradients(params, t)
            for i, p in enumerate(params):
                p.grad = p.grad if pattern(t, i) else None
            optimizer.step()
        worst = max(worst, largest_difference([p.detach() for p in ours], [p.detach() for p in theirs]))
        seen(t, ours)
    return worst


@pytest.mark.parametrize("case", PATTERNS)
def test_weights_are_those_of_adamw_when_gradients_come(case):
    steps, shapes = (2050, SHAPES[:2]) if case == "late" else (200, SHAPES)
    assert largest_step_difference(PATTERNS[case], steps, shapes, block_size=8) < 1e-5  # corrections are rounded to float32


def test_blocks_of_one_stack_with_different_counts_are_those_of_adamw():
    """The blocks of (6, 5) cut into 3 x 5 lie in one stack with those of three parameters."""
    assert largest_step_difference(PATTERNS["different counts in one stack"], 60, block_size=3, merge_dims=False) < 1e-5


@pytest.mark.slow
def test_a_first_gradient_after_2000_steps_moves_a_weight_by_about_lr():
    before = {}

    def seen(t, params):
        if t == 2000:
            before["W"] = params[0].detach().clone()
        if t == 2001:
            moved = (params[0].detach() - before["W"] * (1 - ADAMW["lr"] * ADAMW["weight_decay"])).abs()
            assert moved.max() <= 1.001 * ADAMW["lr"]
            before["seen"] = True

    largest_step_difference(PATTERNS["late"], 2001, SHAPES[:2], seen)
    assert before["seen"]


def test_a_frozen_parameter_keeps_its_weights_and_has_no_steps():
    W, b = make_params((6, 5), (6, 5))
    b.requires_grad_(False)
    before = b.detach().clone()
    optimizer = AdamWShampoo([W, b], precondition_frequency=2, weight_decay=0.1)
    for t in range(10):
        set_gradients([W], t)
        optimizer.step()
    assert torch.equal(b, before)
    state = optimizer.state_dict()["state"]
    assert [int(state[i]["step"]) for i in range(2)] == [10, 0]
    assert not any(x.any() for x in state[1].values())
    b.requires_grad_(True)
    set_gradients([W, b], 10)
    optimizer.step()
    assert 0.5e-3 < (b - before * (1 - 1e-4)).norm() / 30**0.5 < 2e-3  # the first step has the length of AdamW's, lr


def test_step_counts_are_those_of_adamw_after_a_resume():
    """Interrupt a run with different counts by a checkpoint."""
    ours, theirs = (make_params(*SHAPES, dtype=torch.float64) for _ in range(2))
    make = [lambda: AdamWShampoo(ours, start_preconditioning_step=NEVER, **ADAMW), lambda: torch.optim.AdamW(theirs, **ADAMW)]
    optimizers = [make[0](), make[1]()]
    for t in range(1, 61):
        for k, params in enumerate((ours, theirs)):
            set_gradients(params, t)
            for i, p in enumerate(params):
                p.grad = p.grad if t % (i + 2) == 0 else None
            optimizers[k].step()
            if t % 17 == 0:
                saved = optimizers[k].state_dict()
                optimizers[k] = make[k]()
                optimizers[k].load_state_dict(saved)
    steps = [[float(optimizer.state[p]["step"]) for p in params] for optimizer, params in zip(optimizers, (ours, theirs))]
    assert steps[0] == steps[1] == [30, 20, 15, 12, 10, 8]
    assert largest_difference([p.detach() for p in ours], [p.detach() for p in theirs]) < 1e-5


BASE = {
    "lr": 1e-2, "betas": (0.9, 0.97), "eps": 1e-2, "precondition_frequency": 3, "start_preconditioning_step": 4, "block_size": 8
}  # fmt: skip
REFERENCE = {
    "roots": {},
    "roots of blocks": {"block_size": 3, "merge_dims": False},
    "factors of every third gradient": {"factor_frequency": 3},
    "factors of every second gradient, momentum": {"factor_frequency": 2, "momentum": 0.9, "nadam": True},
    "factors of every fourth gradient, sums": {"factor_frequency": 4, "betas": (0.9, 1.0)},
    "no bias correction": {"bias_correction": False, "factor_frequency": 2},
    "no grafting": {"grafting": "none", "factor_frequency": 3},
    "sgd": {"grafting": "sgd"},
    "grafting's own beta2": {"grafting_beta2": 0.8, "factor_frequency": 2},
    "coupled decay": {"decoupled_weight_decay": False, "weight_decay": 0.1},
    "newton": {"solver": "newton", "factor_frequency": 2},
    "start before the first gradients": {"start_preconditioning_step": 1},
}


@pytest.mark.parametrize("pattern", ["every 20th", "different counts in one stack", "none at first"])
@pytest.mark.parametrize("case", REFERENCE)
def test_weights_with_roots_are_those_of_the_reference_when_gradients_come(case, pattern):
    options = dict(AdamWShampoo([torch.zeros(1)]).defaults) | COMPETITION | BASE | REFERENCE[case]
    shapes, rng = [(6, 5), (7,), (), (6, 5), (9, 4), (6, 5)], np.random.default_rng(0)
    weights = [rng.standard_normal(shape) for shape in shapes]
    scale = 1 if pattern == "different counts in one stack" else 5  # 40 steps show what takes 200
    gradients = [
        [rng.standard_normal(s) if PATTERNS[pattern](scale * t, i) else None for i, s in enumerate(shapes)]
        for t in range(1, 41)
    ]
    params = [torch.nn.Parameter(torch.tensor(w)) for w in weights]
    optimizer, ours = AdamWShampoo([{"params": params, **options}]), []
    for row in gradients:
        for p, g in zip(params, row):
            p.grad = None if g is None else torch.tensor(g)
        optimizer.step()
        ours.append([p.detach().numpy().copy() for p in params])
    assert largest_difference(ours, trajectory(weights, gradients, [BASE["lr"]] * len(gradients), options)) < 1e-9


def test_start_and_frequency_count_the_steps_of_the_group():
    """Of a parameter with its first gradient at step 5, roots are there at once if start is 4, and change every third step."""
    W, V = make_params((6, 5), (4, 4))
    optimizer = AdamWShampoo([W, V], precondition_frequency=3, start_preconditioning_step=4, block_size=6)
    roots = []
    for t in range(1, 13):
        set_gradients([W, V], t)
        V.grad = V.grad if t >= 5 else None
        optimizer.step()
        roots.append(optimizer.state[V]["inv_roots.0.0"].clone())
    assert [t for t in range(2, 13) if not torch.equal(roots[t - 1], roots[t - 2])] == [5, 6, 9, 12]


def test_the_count_of_a_parameter_is_not_that_of_its_group():
    W, V = make_params((6, 5), (4, 4))
    optimizer = AdamWShampoo([{"params": [W]}, {"params": [V]}])
    for t in range(12):
        set_gradients([W, V], t)
        W.grad = W.grad if t % 3 else None
        V.grad = V.grad if t % 2 else None
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in (W, V)] == [8, 6]
    assert [group["step"] for group in optimizer.param_groups] == [8, 6]


def test_a_skipped_step_is_not_counted():
    W, V = make_params((6, 5), (4, 4))
    optimizer = AdamWShampoo([W, V])
    for t in range(6):
        set_gradients([W, V], t)
        if t == 3:
            W.grad[0, 0] = torch.nan
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in (W, V)] == [5, 5]
    assert optimizer.param_groups[0]["step"] == 5


def test_a_parameter_that_leaves_its_group_and_returns_keeps_its_count_and_moments():
    ours, theirs = (make_params((6, 5), (4, 4), dtype=torch.float64) for _ in range(2))
    optimizers = AdamWShampoo(ours, start_preconditioning_step=NEVER, **ADAMW), torch.optim.AdamW(theirs, **ADAMW)
    for t in range(1, 31):
        for params, optimizer in zip((ours, theirs), optimizers):
            optimizer.param_groups[0]["params"] = params[:1] if 10 <= t < 20 else list(params)
            set_gradients(params, t)
            optimizer.step()
    assert largest_difference([p.detach() for p in ours], [p.detach() for p in theirs]) < 1e-5
    assert [int(optimizers[0].state[p]["step"]) for p in ours] == [30, 20]


@pytest.mark.parametrize("decoupled", [False, True])
def test_maximize_is_that_of_adam_and_adamw(decoupled):
    """Decay is that of minimizing."""
    ours, theirs = (make_params((6, 5), (7,), dtype=torch.float64) for _ in range(2))
    optimizers = (
        AdamWShampoo(ours, start_preconditioning_step=NEVER, **ADAMW, maximize=True, decoupled_weight_decay=decoupled),
        (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, **ADAMW, maximize=True),
    )
    for t in range(10):
        for params, optimizer in zip((ours, theirs), optimizers):
            set_gradients(params, t)
            optimizer.step()
    assert largest_difference([p.detach() for p in ours], [p.detach() for p in theirs]) < 1e-5
