"""Preconditioner "soap", covariance "kl", and max_factor_ratio: stored weights, what is refused, resuming, and failures.

`golden/variants.npz` was computed by other code in float64: initial weights, gradients (float32), and weights after some steps.
`test_reference` compares all combinations with the float64 reference.
"""

import copy
import json
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from common import COMPETITION, make_params, train

from shampoo import AdamWShampoo

DATA = np.load(Path(__file__).parent / "golden" / "variants.npz")
CASES = json.loads(str(DATA["cases"]))
SOAP = {"preconditioner": "soap", "solver": "eigh"}
KL = {"covariance": "kl", "exponents": 0.5}
SHAPES = [(6, 5), (7,), (), (4, 3, 5), (20, 9)]


def split(flat, shapes):
    parts = np.split(flat, np.cumsum([prod(shape) for shape in shapes])[:-1])
    return [torch.tensor(part).double().reshape(shape) for part, shape in zip(parts, shapes)]


@pytest.mark.parametrize("name", CASES)
def test_weights_equal_the_stored_ones(name, device):
    case = CASES[name]
    params = [torch.nn.Parameter(w.to(device)) for w in split(DATA[f"{name}/init"], case["shapes"])]
    optimizer = AdamWShampoo(params, **COMPETITION | case["options"])
    stored = dict(zip(DATA[f"{name}/steps"].tolist(), DATA[f"{name}/param"]))
    for t, (lr, grads) in enumerate(zip(case["lrs"], DATA[f"{name}/grad"])):
        optimizer.param_groups[0]["lr"] = lr
        for p, G in zip(params, split(grads, case["shapes"])):
            p.grad = G.to(device)
        optimizer.step()
        for p, W in zip(params, split(stored[t], case["shapes"]) if t in stored else ()):
            torch.testing.assert_close(p.detach().cpu(), W, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (SOAP | KL, "with preconditioner 'soap', covariance is 'kl'; it must be one of 'gram'"),
        (SOAP | {"solver": "newton"}, "with preconditioner 'soap', solver is 'newton'; it must be one of 'auto', 'eigh', 'qr'"),
        (SOAP | {"start_preconditioning_step": 2}, "with preconditioner 'soap', start_preconditioning_step is 2; .* 1"),
        (SOAP | {"grafting": "none"}, "with preconditioner 'soap', grafting is 'none'; it must be one of 'adam'"),
        (SOAP | {"normalized_grafting": True}, "with preconditioner 'soap', normalized_grafting is True; .* False"),
        (SOAP | {"bf16_roots": True}, "with preconditioner 'soap', bf16_roots is True; it must be one of False"),
        (
            {"covariance": "kl", "exponents": None},
            r"covariance 'kl' is defined for exponents 1/2; .* \(0.25, 0.25\): set exponents=0.5",
        ),
        (KL | {"exponents": (0.5, 0.25)}, "covariance 'kl' is defined for exponents 1/2"),
        (KL | {"exponent_multiplier": 0.9}, "covariance 'kl' is defined for exponents 1/2"),
        ({"covariance": "KL"}, "covariance is 'KL'; it must be one of 'gram', 'kl'"),
        ({"max_factor_ratio": 0}, "max_factor_ratio is 0; it must be a number > 0"),
        ({"unfactored_beta2": 1.5}, "unfactored_beta2 is 1.5"),
    ],
)
def test_what_is_not_defined_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        AdamWShampoo(make_params((6, 5)), merge_dims=False, **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [("start_preconditioning_step", 9), ("normalized_grafting", True), ("covariance", "kl"), ("solver", "newton")],
)
def test_what_soap_is_not_defined_for_is_refused_at_the_next_step(name, value):
    params = make_params((6, 5), (4, 4))
    optimizer = AdamWShampoo(params, **SOAP, merge_dims=False)
    train(optimizer, params, 3)
    before, earlier = [p.detach().clone() for p in params], optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"with preconditioner 'soap', {name} is {value!r}"):
        train(optimizer, params, 1, first=3)
    assert all(map(torch.equal, params, before))
    optimizer.param_groups[0][name] = earlier
    train(optimizer, params, 1, first=3)


def test_a_later_start_of_shampoo_keeps_its_state():
    """From then on, and until the new start, the grafting method alone updates the weights, as if it had always done so."""
    ours, theirs = make_params((6, 5)), make_params((6, 5))
    optimizer, adam = AdamWShampoo(ours, start_preconditioning_step=1), AdamWShampoo(theirs, start_preconditioning_step=100)
    for each, params in ((optimizer, ours), (adam, theirs)):
        train(each, params, 3)
    factors = optimizer.state[ours[0]]["factors.0.0"].clone()
    optimizer.param_groups[0]["start_preconditioning_step"] = 100
    before = [p.detach().clone() for p in ours + theirs]
    for each, params in ((optimizer, ours), (adam, theirs)):
        train(each, params, 1, first=3)
    steps = [p.detach() - W for p, W in zip(ours + theirs, before)]
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-7)
    assert not torch.equal(factors, optimizer.state[ours[0]]["factors.0.0"])
    assert torch.equal(optimizer.state[ours[0]]["factors.0.0"], adam.state[theirs[0]]["factors.0.0"])


def test_kl_takes_the_exponents_that_are_left():
    """With max_factor_ratio, thin matrices keep one factor, and exponents=None is 1/2 for it."""
    options = {"covariance": "kl", "exponents": None, "max_factor_ratio": 1.0}
    AdamWShampoo(make_params((3, 16), (8,)), **options)
    with pytest.raises(ValueError, match=r"set exponents=0\.5"):
        AdamWShampoo(make_params((3, 16), (8, 8)), merge_dims=False, **options)


@pytest.mark.parametrize("options", [SOAP, SOAP | {"solver": "qr"}, KL, KL | {"max_factor_ratio": 1.0}], ids=str)
def test_a_run_resumes_bit_for_bit(options):
    params = make_params(*SHAPES)
    common = {"lr": 1e-2, "precondition_frequency": 3, "block_size": 8, "nadam": True, **options}
    optimizer = AdamWShampoo(params, **common)
    train(optimizer, params, 7)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = AdamWShampoo(copies, lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, params, 7, first=7)
    train(resumed, copies, 7, first=7)
    assert all(map(torch.equal, params, copies))


@pytest.mark.parametrize(("before", "after"), [("shampoo", "soap"), ("soap", "shampoo")])
def test_the_second_moment_of_another_preconditioner_is_refused(before, after):
    params = make_params((6, 5), (4, 4))
    optimizer = AdamWShampoo(params, preconditioner=before, start_preconditioning_step=1, merge_dims=False)
    train(optimizer, params, 3)
    optimizer.param_groups[0]["preconditioner"] = after
    with pytest.raises(ValueError, match=r"holds nothing for .*exp_avg_sq"):
        train(optimizer, params, 1, first=3)


def test_exponents_of_zero_leave_soap_with_adam():
    weights = []
    for options in (SOAP | {"exponents": 0.0}, {"max_dim": 2}):
        params = make_params((6, 5))
        train(AdamWShampoo(params, lr=0.1, **options), params, 5)
        weights.append(params[0])
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("solver", ["eigh", "qr"])
def test_a_basis_of_a_factor_that_is_not_finite_stays(solver):
    params = make_params((6, 6), (8, 8))
    optimizer = AdamWShampoo(params, **(SOAP | {"solver": solver}), merge_dims=False, precondition_frequency=2)
    train(optimizer, params, 3)
    state = optimizer.state[params[0]]
    basis = state["eigvecs.0.0"].clone()
    state["factors.0.0"][0, 1, 0] = torch.inf
    train(optimizer, params, 1, first=3)
    assert optimizer.events["roots kept as they were"] == 1
    assert torch.equal(state["eigvecs.0.0"], basis)
    train(optimizer, params, 4, first=4)
    assert all(p.isfinite().all() for p in params)
    assert not torch.equal(state["eigvecs.0.0"], basis)


@pytest.mark.parametrize("solver", ["eigh", "qr"])
def test_a_solver_that_fails_leaves_bases_orthogonal(solver, monkeypatch):
    params = make_params((6, 6))
    optimizer = AdamWShampoo(
        params, **(SOAP | {"solver": solver}), merge_dims=False, precondition_frequency=2, qr_tolerance=0.0
    )

    def fail(A):
        raise torch.linalg.LinAlgError("no convergence")

    train(optimizer, params, 1)
    with monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "eigh", fail)
        patched.setattr(torch.linalg, "qr", fail)
        train(optimizer, params, 1, first=1)
    Q = optimizer.state[params[0]]["eigvecs.0.0"][0]
    torch.testing.assert_close(Q.T @ Q, torch.eye(6), rtol=0, atol=1e-5)
    assert optimizer.events["roots kept as they were"] == 2


@pytest.mark.parametrize("gradient", [0.0, 1e-30, 1e15])
@pytest.mark.parametrize("options", [SOAP, KL, KL | {"grafting": "none"}], ids=str)
def test_extreme_gradients_leave_weights_finite(options, gradient):
    params = make_params((6, 5), (7,))
    optimizer = AdamWShampoo(params, lr=1e-3, precondition_frequency=1, merge_dims=False, **options)
    for scale in [0.0, gradient, 1.0, gradient, 1.0]:
        for i, p in enumerate(params):
            p.grad = scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        optimizer.step()
    assert all(p.isfinite().all() for p in params)
