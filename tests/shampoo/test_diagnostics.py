"""The diagnostics, compared with numpy in float64 and with known cases."""

import logging
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import COMPETITION, make_params, set_gradients
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from shampoo import AdamWShampoo
from shampoo.diagnostics import diagnostics, log_diagnostics, spectrum, weights

OPTIONS = COMPETITION | {
    "lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-3, "block_size": 8, "merge_dims": False, "precondition_frequency": 3
}  # fmt: skip
GRADIENT = {"gradient_norm", "gradient_nuclear_norm", "nuclear_ratio"}
UPDATE = {"update_norm", "update_ratio"}
FACTORS = {"condition", "effective_rank", "root_residual", "roots_missing"}


def make(*shapes, dtype=torch.float64, device="cpu", **options):
    params = make_params(*shapes, dtype=dtype, device=device)
    return params, AdamWShampoo(params, **{**OPTIONS, **options})


def step(params, optimizer, t):
    """Take step t with random gradients that grow with t. Return the diagnostics and the gradients."""
    set_gradients(params, seed=t, scale=t)
    before = weights(optimizer)
    optimizer.step()
    return diagnostics(optimizer, before), [p.grad.cpu().double().numpy() for p in params]


def power(S, p):
    lam, Q = np.linalg.eigh(S)
    return (Q * lam**p) @ Q.T


def second_moments(gradients, beta, eps, relative):
    """Return, for each side of a block and after each gradient, the bias-corrected factor without and with eps, in numpy."""
    sides, moments = [lambda G: G @ G.T, lambda G: G.T @ G], []
    for side in sides:
        A, of_side = 0, []
        for t, G in enumerate(gradients, start=1):
            A = beta * A + (1 - beta) * side(G)
            corrected = A / (1 - beta**t)
            of_side.append((corrected, corrected + eps * (np.trace(corrected) if relative else 1) * np.eye(len(A))))
        moments.append(of_side)
    return moments


@pytest.mark.parametrize("relative", [False, True])
def test_values_of_a_matrix_in_blocks_equal_numpys(device, relative):
    (W,), optimizer = make((12, 7), device=device, relative_eps=relative)
    gradients, starts = [], [W.detach().cpu().numpy().copy()]
    for t in range(1, 6):
        found, (G,) = step([W], optimizer, t)
        gradients.append(G)
        starts.append(W.detach().cpu().numpy().copy())
    found = found["parameter 0 of shape (12, 7)"]
    assert set(found) == GRADIENT | UPDATE | FACTORS | {"weight_norm"}
    singular = np.linalg.svd(G, compute_uv=False)
    norm = np.linalg.norm
    expected = {
        "gradient_norm": norm(G),
        "gradient_nuclear_norm": singular.sum(),
        "nuclear_ratio": singular.sum() / (np.sqrt(7) * norm(G)),
        "weight_norm": norm(starts[-1]),
        "update_norm": norm(starts[-1] - starts[-2]),
        "update_ratio": norm(starts[-1] - starts[-2]) / norm(starts[-2]),
        "roots_missing": 0,
    }
    conditions, ranks, residuals = [], [], []
    for rows in (slice(0, 8), slice(8, 12)):
        for of_side in second_moments([G[rows] for G in gradients], 0.95, 1e-3, relative):
            A, S = of_side[-1]
            conditions.append(np.linalg.cond(S))
            shares = np.clip(np.linalg.eigvalsh(A), 1e-300, None) / np.trace(A)
            ranks.append(np.exp(-(shares * np.log(shares)).sum()))
            half, stale = power(S, 1 / 8), power(of_side[2][1], -1 / 4)  # of step 3, the only one with a refresh
            residuals.append(norm(half @ stale @ half - np.eye(len(S))) / np.sqrt(len(S)))
    expected |= {"condition": max(conditions), "effective_rank": min(ranks), "root_residual": max(residuals)}
    assert found == pytest.approx(expected, rel=1e-5)  # bias corrections are rounded to float32


def test_the_residual_is_one_without_roots_small_when_they_are_fresh_and_then_grows(device):
    params, optimizer = make((10, 10), dtype=torch.float32, device=device, precondition_frequency=4)
    found = [next(x for name, x in step(params, optimizer, t)[0].items() if name != "optimizer") for t in range(1, 8)]
    residuals = [of_step["root_residual"] for of_step in found]
    assert residuals[:3] == pytest.approx([1, 1, 1], rel=1e-12)
    assert residuals[3] < 1e-4
    assert 0.02 < residuals[4] < residuals[5] < residuals[6]
    assert [of_step["roots_missing"] for of_step in found] == [1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(("factor", "expected"), [(2.0, 1.0), (0.5, 0.5), (1.0, 0.0)])
def test_the_residual_includes_the_solvers_error(factor, expected):
    params, optimizer = make((6,), precondition_frequency=1)
    step(params, optimizer, 1)
    optimizer._buckets[0].preconditioners[0].inv_roots[0].mul_(factor)
    assert diagnostics(optimizer)["parameter 0 of shape (6,)"]["root_residual"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "bound"),
    [({}, 1e-5), ({"exponents": (0.5, 0.0)}, 1e-5), ({"solver": "newton"}, 1e-5), ({"bf16_roots": True}, 2**-7)],
)
def test_fresh_roots_of_every_kind_have_a_small_residual(options, bound):
    params, optimizer = make((6, 6), dtype=torch.float32, precondition_frequency=1, **options)
    residuals = [step(params, optimizer, t)[0]["parameter 0 of shape (6, 6)"]["root_residual"] for t in range(1, 4)]
    assert max(residuals) < bound


def test_approximate_bases_show_in_the_residual():
    params, optimizer = make((6, 6), precondition_frequency=1, solver="qr")
    residuals = [step(params, optimizer, t)[0]["parameter 0 of shape (6, 6)"]["root_residual"] for t in range(1, 4)]
    assert residuals[0] < 1e-5  # the first basis is exact
    assert min(residuals[1:]) > 1e-3
    assert max(residuals[1:]) < 0.3


@pytest.mark.parametrize("solver", ["eigh", "qr", "newton"])
def test_roots_of_zero_gradients_are_not_missing(solver):
    params, optimizer = make((16, 8), precondition_frequency=1, solver=solver, relative_eps=True)
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
    assert diagnostics(optimizer)["parameter 0 of shape (16, 8)"]["roots_missing"] == 0


def test_missing_and_rescued_roots_are_reported():
    params, optimizer = make((16, 8), precondition_frequency=1)
    step(params, optimizer, 1)
    optimizer._buckets[0].preconditioners[0].inv_roots[1][1] = torch.eye(8)
    optimizer.events["roots computed in float64"] += 3
    found = diagnostics(optimizer)
    assert found["parameter 0 of shape (16, 8)"]["roots_missing"] == 1 / 4  # two blocks with two roots each
    assert found["optimizer"] == {"steps": 1, "steps_skipped": 0, "roots_rescued": 3}


@pytest.mark.parametrize(
    ("shape", "m", "n"), [((9, 5), 9, 5), ((6, 2, 3), 6, 6), ((3, 4, 2, 5), 3, 40), ((7,), 7, 1), ((), 1, 1)]
)
def test_the_nuclear_ratio_is_one_for_equal_singular_values_and_smallest_for_rank_one(shape, m, n):
    (W,), optimizer = make(shape, lr=0.0)

    def ratio(matrix):
        W.grad = torch.as_tensor(matrix).reshape(shape)
        optimizer.step()
        return next(x for name, x in diagnostics(optimizer).items() if name != "optimizer")["nuclear_ratio"]

    rng = np.random.default_rng(0)
    U, singular, V = np.linalg.svd(rng.standard_normal((m, n)), full_matrices=False)
    assert ratio(3.0 * U @ V) == pytest.approx(1)
    assert ratio(np.outer(rng.standard_normal(m), rng.standard_normal(n))) == pytest.approx(min(m, n) ** -0.5)
    assert ratio((U * singular) @ V) == pytest.approx(singular.sum() / np.linalg.norm(singular) / min(m, n) ** 0.5)


def test_norms_are_those_of_the_merged_matrix():
    params, optimizer = make((4, 6, 2, 2), (4, 2), merge_dims=True, lr=0.0)  # merged to (4, 6, 4) and (8,)
    found, (G, _) = step(params, optimizer, 1)
    expected = np.linalg.norm(G.reshape(4, 24), "nuc")
    assert found["parameter 0 of shape (4, 6, 2, 2)"]["gradient_nuclear_norm"] == pytest.approx(expected)
    assert found["parameter 1 of shape (4, 2)"]["nuclear_ratio"] == pytest.approx(1)


def test_parameters_report_only_what_they_have():
    params, optimizer = make((12, 3), (40, 2), (5,), (3, 3), (0, 4), max_dim=40, precondition_vectors=False)
    params[3].requires_grad_(False)
    for p in params[:3]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    found = diagnostics(optimizer)
    assert set(found) - {"optimizer"} == {f"parameter {i} of shape {tuple(p.shape)}" for i, p in enumerate(params[:4])}
    keys = [set(found[f"parameter {i} of shape {tuple(p.shape)}"]) - {"weight_norm"} for i, p in enumerate(params[:4])]
    assert keys == [GRADIENT | FACTORS, GRADIENT, GRADIENT, FACTORS]


def test_before_the_first_step_there_are_no_factors():
    params, optimizer = make((4, 4))
    assert diagnostics(optimizer) == {
        "optimizer": {"steps": 0, "steps_skipped": 0, "roots_rescued": 0},
        "parameter 0 of shape (4, 4)": {"weight_norm": pytest.approx(params[0].norm().item())},
    }


def test_parameters_are_named_by_their_names_or_by_index():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    groups = [{"params": list(layer.parameters()), "weight_decay": i} for i, layer in enumerate(model)]
    shapes = ["(2, 3)", "(2,)", "(2, 2)", "(2,)"]
    expected = ["optimizer", *(f"parameter {i} of shape {shape}" for i, shape in enumerate(shapes))]
    assert list(diagnostics(AdamWShampoo(groups))) == expected
    groups = [
        {**group, "param_names": [f"{i}.{name}" for name, _ in layer.named_parameters()]}
        for i, (group, layer) in enumerate(zip(groups, model))
    ]
    assert list(diagnostics(AdamWShampoo(groups))) == ["optimizer", "0.weight", "0.bias", "1.weight", "1.bias"]


def test_the_update_norm_is_that_of_the_rounded_weights():
    params, optimizer = make((8, 8), dtype=torch.bfloat16, lr=1e-3, weight_decay=0.1)
    before = params[0].detach().double().numpy().copy()
    found = step(params, optimizer, 1)[0]["parameter 0 of shape (8, 8)"]
    moved = np.linalg.norm(params[0].detach().double().numpy() - before)
    assert 0 < moved < 1e-3 * 8  # rounding loses some elements of Adam's first step, 1e-3 each
    assert found["update_norm"] == pytest.approx(moved, rel=1e-12)
    assert found["update_ratio"] == pytest.approx(moved / np.linalg.norm(before), rel=1e-12)


def test_a_non_finite_gradient_is_reported_as_nan(caplog):
    params, optimizer = make((4, 4), (3,))
    step(params, optimizer, 1)
    params[0].grad[1, 2] = torch.nan
    before = weights(optimizer)
    with caplog.at_level(logging.ERROR, logger="shampoo"):
        optimizer.step()
    found = diagnostics(optimizer, before)
    assert found["optimizer"] == {"steps": 1, "steps_skipped": 1, "roots_rescued": 0}
    assert all(np.isnan(found["parameter 0 of shape (4, 4)"][figure]) for figure in GRADIENT)
    assert found["parameter 0 of shape (4, 4)"]["update_norm"] == 0
    assert found["parameter 1 of shape (3,)"]["nuclear_ratio"] == pytest.approx(1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_non_finite_factor_is_reported_as_nan(value):
    params, optimizer = make((8,))
    step(params, optimizer, 1)
    optimizer._buckets[0].preconditioners[0].factors[0][0, 2, 1] = value  # eigh reads the lower triangle
    found = diagnostics(optimizer)["parameter 0 of shape (8,)"]
    assert all(np.isnan(found[figure]) for figure in FACTORS - {"roots_missing"})
    assert found["roots_missing"] == 1


def test_bases_fit_until_the_factors_rotate():
    """Compare with the criterion of solver "qr" in numpy: new bases fit, and none fits after gradients in other directions."""
    (W,), optimizer = make((6, 5), solver="qr", qr_tolerance=0.3, precondition_frequency=50, start_preconditioning_step=2)
    shares = []
    for t in range(1, 12):
        W.grad = torch.zeros(6, 5, dtype=W.dtype)
        W.grad[t // 3, t // 3] = 10.0**t  # a single direction at first
        W.grad += 10.0**t * torch.outer(torch.arange(6) % (t + 1) - 1.0, torch.arange(5) % (t + 2) - 1.0) * (t > 4)
        optimizer.step()
        (preconditioner,) = optimizer._buckets[0].preconditioners
        fits = []
        for A, Q in zip(preconditioner.factors, preconditioner.eigvecs):
            B = Q[0].numpy().T @ A[0].numpy() @ Q[0].numpy()
            fits.append(t >= 2 and np.linalg.norm(B - np.diag(np.diag(B))) <= 0.3 * np.linalg.norm(B))
        shares.append(diagnostics(optimizer)["parameter 0 of shape (6, 5)"]["bases_fit"])
        assert shares[-1] == np.mean(fits)
    assert shares[0] == 0  # there are no bases yet
    assert shares[1] == 1
    assert shares[-1] == 0


def test_negative_eigenvalues_from_rounding_are_shifted_as_in_the_solvers():
    A = torch.tensor([[1.0, 0.0], [0.0, -5e-4]], dtype=torch.float64)
    condition, rank, _ = spectrum(A, torch.eye(2, dtype=torch.float64), 0.5, 1e-3, False)
    assert (condition, rank) == (pytest.approx(1.0015 / 0.001), pytest.approx(1))


def test_soap_has_bases_instead_of_roots():
    params, optimizer = make((6, 5), (4,), merge_dims=False, preconditioner="soap", precondition_frequency=4)
    (found,) = [x for name, x in step(params, optimizer, 1)[0].items() if "(6, 5)" in name]
    assert {"condition", "effective_rank"} <= found.keys()
    assert "root_residual" not in found
    assert (found["roots_missing"], found["bases_fit"]) == (0, 1)


def test_ratios_of_zeros_are_nan():
    params, optimizer = make((4, 4))
    params[0].data.zero_()
    params[0].grad = torch.zeros_like(params[0])
    before = weights(optimizer)
    optimizer.step()
    found = diagnostics(optimizer, before)["parameter 0 of shape (4, 4)"]
    assert {figure for figure, x in found.items() if np.isnan(x)} == {"nuclear_ratio", "update_ratio", "effective_rank"}
    assert found["condition"] == 1


def test_weights_that_do_not_match_the_parameters_are_refused():
    _, optimizer = make((4, 4), (3,))
    with pytest.raises(ValueError, match="the optimizer's 2 parameters from before the step"):
        diagnostics(optimizer, weights(optimizer)[:1])
    with pytest.raises(ValueError, match=r"\[\(3,\), \(4, 4\)\]"):
        diagnostics(optimizer, weights(optimizer)[::-1])


def test_a_call_has_no_side_effects():
    (params, optimizer), (others, other) = make((12, 7), (5,), momentum=0.5), make((12, 7), (5,), momentum=0.5)
    for t in range(1, 8):
        for of in (params, others):
            for p in of:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t), dtype=p.dtype)
        optimizer.step()
        other.step()
        state, grads = deepcopy(vars(optimizer)), [p.grad.clone() for p in params]
        diagnostics(optimizer, weights(optimizer))
        assert vars(optimizer).keys() == state.keys() == vars(other).keys()
        assert all(torch.equal(p.grad, G) for p, G in zip(params, grads))
        assert optimizer.events == {}
    assert all(torch.equal(p, q) for p, q in zip(params, others))
    for one, two in zip(optimizer.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_tensorboard_gets_scalars_and_histograms(tmp_path):
    model = torch.nn.Linear(6, 4)
    optimizer = AdamWShampoo([{"params": list(model.parameters()), "param_names": ["weight", "bias"]}], **OPTIONS)
    model.bias.data.zero_()  # makes the update ratio infinite
    with SummaryWriter(str(tmp_path)) as writer:
        for t in (1, 2):
            before = weights(optimizer)
            model(torch.ones(1, 6)).sum().backward()
            optimizer.step()
            found = log_diagnostics(optimizer, writer, 10 * t, before if t == 1 else None)
    assert found == diagnostics(optimizer)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(x.step, x.value) for x in events.Scalars("condition/weight")][1] == (
        20,
        pytest.approx(found["weight"]["condition"]),
    )
    assert [x.step for x in events.Scalars("update_ratio/weight")] == [10]
    assert "update_ratio/bias" not in events.Tags()["scalars"]
    assert events.Scalars("steps/optimizer")[-1].value == 2
    assert "log10_over_parameters/steps" not in events.Tags()["histograms"]
    logs = [np.log10(found[name]["gradient_norm"]) for name in ("weight", "bias")]
    histogram = events.Histograms("log10_over_parameters/gradient_norm")[-1].histogram_value
    assert (histogram.num, histogram.sum) == (2, pytest.approx(sum(logs)))


def test_a_wrapped_optimizer_is_unwrapped():
    params, optimizer = make((6, 5))
    wrapped = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
    set_gradients(params, seed=1)
    before = weights(wrapped)
    optimizer.step()
    assert diagnostics(wrapped, before) == diagnostics(optimizer, before)
    assert "update_norm" in diagnostics(wrapped, before)["parameter 0 of shape (6, 5)"]
