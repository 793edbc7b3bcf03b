"""A step as on an accelerator, where the host does not wait, taken on the CPU: `health.waits` is replaced."""

import pytest
import torch
from common import MORE_SHAPES, VARIANTS, make_params, set_gradients

from experiments.step_time import Watch
from shampoo import AdamWShampoo, health
from shampoo.update import graft, graft_all


@pytest.fixture
def accelerated(monkeypatch):
    """Return a function that takes a step as on an accelerator."""

    def step(optimizer):
        with monkeypatch.context() as patched:
            patched.setattr(health, "waits", lambda norms: True)
            optimizer.step()

    return step


def pair(options, shapes=MORE_SHAPES, dtype=torch.float32):
    """Return two lists of equal parameters, and an optimizer for each."""
    both = [make_params(*shapes, dtype=dtype) for _ in range(2)]
    return both, [AdamWShampoo(params, **{"block_size": 16, "precondition_frequency": 3, **options}) for params in both]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [*VARIANTS.values(), {"start_preconditioning_step": 4}], ids=[*VARIANTS, "late start"])
def test_weights_are_those_of_the_cpu(options, dtype, accelerated):
    """Also where blocks have no gradient, gradients of extreme size, or gradients that make a direction overflow."""
    (expected, found), (on_cpu, on_device) = pair(options, dtype=dtype)
    for t in range(12):
        for params in (expected, found):
            set_gradients(params, t, scale={5: 1e-18, 6: 1e12}.get(t, 1.0))
            params[0].grad[:16] = 0
            params[1].grad = None if t % 4 == 1 else params[1].grad
            params[4].grad.mul_(1e15 if t == 9 else 1)
        on_cpu.step()
        accelerated(on_device)
        for a, b in zip(expected, found, strict=True):
            assert b.isfinite().all()
            rounding = 2e-6 if dtype == torch.float32 else 1e-12
            torch.testing.assert_close(b, a, rtol=rounding, atol=rounding * a.abs().max().item())


@pytest.mark.parametrize("grafting", ["none", "sgd", "adam"])
def test_a_block_without_a_usable_direction_takes_the_grafting_method_s_step(grafting, accelerated):
    """A block whose direction overflows, and one whose direction vanishes, beside others of their stack."""
    options = {"grafting": grafting, "exponents": 1, "eps": 1e-12, "relative_eps": False, "merge_dims": False}
    (expected, found), (on_cpu, on_device) = pair(options, [(32, 16), (16, 32), (8, 16)])
    for t in range(6):
        for params in (expected, found):
            set_gradients(params, t, scale=1e-7 if t < 3 else 1.0)
            params[0].grad[:16] *= 1e15 if t == 4 else 1.0
            params[1].grad[:, :16] *= 1e17  # times 1 / L and 1 / R, 0 in float32
        on_cpu.step()
        accelerated(on_device)
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    assert on_cpu.events["directions not finite"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_step_with_non_finite_gradients_leaves_weights_unchanged(value, accelerated):
    params = make_params(*MORE_SHAPES)
    optimizer = AdamWShampoo(params, block_size=16, precondition_frequency=3, weight_decay=0.1)
    for t in range(6):
        set_gradients(params, t)
        params[t % len(params)].grad.view(-1)[0] = value if t == 4 else 1.0
        before = [p.detach().clone() for p in params]
        accelerated(optimizer)
        assert all(torch.equal(p, old) == (t == 4) for p, old in zip(params, before, strict=True))
    assert optimizer.events == {"steps skipped": 1}


def test_operations_grow_by_at_most_eight_with_each_stack(accelerated):
    """Per stack: two factors, two products with roots, two norms, a scaling, and a choice."""

    def operations(sizes):
        params = make_params(*((n, 16) for n in sizes))
        optimizer = AdamWShampoo(params, block_size=32, merge_dims=False, max_factor_ratio=None, precondition_frequency=100)
        optimizer.param_groups[0]["start_preconditioning_step"] = 1
        for t in range(3):
            set_gradients(params, t)
            with Watch(record=False) as watch:
                accelerated(optimizer)
        assert watch.syncs == 0
        return watch.operations

    few, many = operations(range(10, 13)), operations(range(10, 23))
    assert many - few <= 10 * 8


@pytest.mark.parametrize("sets_length", [True, False])
def test_each_block_is_scaled_or_replaced(sets_length):
    """Each block of two elements has a direction P, a step A, and the result, of length ||A||, expected where A sets it."""
    cases = [  # P, A, expected, whether P is usable, expected if A does not set the length
        ([3.0, 4.0], [0.0, 10.0], [6.0, 8.0], True, [3.0, 4.0]),
        ([3e-30, 4e-30], [0.0, 10.0], [6.0, 8.0], True, [3e-30, 4e-30]),
        ([3e30, 4e30], [0.0, 10.0], [6.0, 8.0], True, [3e30, 4e30]),
        ([3e30, 4e30], [0.0, 1e-15], [6e-16, 8e-16], True, [3e30, 4e30]),
        ([3e-37, 4e-37], [0.0, 1e4], [6e3, 8e3], True, [3e-37, 4e-37]),
        ([3.0, 4.0], [0.0, 0.0], [0.0, 0.0], True, [3.0, 4.0]),
        ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0], True, [0.0, 0.0]),
        ([0.0, 0.0], [1.0, 2.0], [1.0, 2.0], not sets_length, [0.0, 0.0]),
        ([torch.inf, 1.0], [1.0, 2.0], [1.0, 2.0], False, [0.0, 0.0]),
        ([torch.nan, 1.0], [0.0, 0.0], [0.0, 0.0], False, [0.0, 0.0]),
    ]
    P, A, lengthened, usable, plain = (torch.tensor(column) for column in zip(*cases, strict=True))
    expected = lengthened if sets_length else plain
    stacks = [torch.full((7, 2), 7.0), torch.full((3, 2), 7.0)]
    found = graft_all(P.clone().split([7, 3]), A.split([7, 3]), sets_length, stacks)
    assert found.tolist() == usable.tolist()
    torch.testing.assert_close(torch.cat(stacks), expected, rtol=1e-6, atol=0)
    stack = torch.full((10, 2), 7.0)
    assert graft(P, A, sets_length, stack) == (~usable).nonzero().flatten().tolist()
    torch.testing.assert_close(stack, expected, rtol=1e-6, atol=0)
