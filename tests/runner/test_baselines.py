"""The baseline submissions: AlgoPerf's functions, five points of learning rate and horizon, and training."""

import runner  # noqa: F401  makes algoperf.spec importable

# isort: split

import collections
import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from algoperf import spec
from fake_workload import FakeWorkload
from schedulefree import AdamWScheduleFree
from torch import nn

from runner.workloads import load_workload
from shampoo.schedule import trapezoid, warmup_cosine

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path.parent for path in (ROOT / "runner" / "baselines").glob("*/submission.py"))
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon needs torch 2.9")


class TypedWorkload(FakeWorkload):
    """A workload with the two properties by which Muon's parameters are chosen."""

    @property
    def model_params_types(self):
        return {name: spec.ParameterType.WEIGHT for name, _ in self.model.named_parameters()}

    def is_output_params(self, name):
        return name.startswith("3.")


def load(name):
    """Return a baseline's module and its points."""
    points = json.loads((FOLDERS[0].parent / name / "tuning_search_space.json").read_text())
    return importlib.import_module(f"runner.baselines.{name}.submission"), points


def as_point(values, **changes):
    return collections.namedtuple("Hyperparameters", values)(**{**values, **changes})


def arguments(workload, point, state, t):
    """Return the arguments that AlgoPerf passes to both `update_params` and `prepare_for_eval`."""
    return {
        "workload": workload,
        "current_param_container": workload.model,
        "current_params_types": {},
        "model_state": None,
        "hyperparameters": point,
        "loss_type": workload.loss_type,
        "optimizer_state": state,
        "eval_results": [],
        "global_step": t,
        "rng": [0, 0],
    }


def weights(workload):
    return [p.detach() for p in workload.model.parameters()]


def assert_design(points):
    """Check that five points differ only in learning rate and horizon, in the same way in all spaces."""
    lr = points[0]["learning_rate"]
    assert [point["learning_rate"] / lr for point in points] == pytest.approx([1, 2, 0.5, 4, 2])
    assert [point["step_hint_factor"] for point in points] == [1.0, 1.0, 1.0, 1.0, 0.6]
    assert len({json.dumps({**point, "learning_rate": 0, "step_hint_factor": 0}) for point in points}) == 1


@pytest.fixture(params=[pytest.param(x.name, marks=needs_muon if x.name == "muon" else ()) for x in FOLDERS])
def baseline(request):
    return load(request.param)


@pytest.mark.parametrize("name", [path.name for path in FOLDERS if path.name != "schedule_free_adamw"])
def test_five_points_of_learning_rate_and_horizon(name):
    assert_design(load(name)[1])


def test_schedule_free_has_five_learning_rates():
    points = load("schedule_free_adamw")[1]
    assert [point["learning_rate"] for point in points] == pytest.approx([0.01, 0.005, 0.02, 0.0025, 0.04])
    assert len({json.dumps({**point, "learning_rate": 0}) for point in points}) == 1


def test_our_points_differ_from_the_competitions_first_as_documented():
    points = [json.loads((ROOT / folder / "tuning_search_space.json").read_text()) for folder in ("runner", ".")]
    assert_design(points[0])
    ours, theirs = (points[i][0] for i in (0, 1))
    differing = {key for key in theirs if ours[key] != theirs[key]}
    assert differing == {"learning_rate", "precondition_frequency", "block_size", "dropout_rate", "schedule_tail"}
    assert ours["learning_rate"] == pytest.approx(4 * theirs["learning_rate"], rel=1e-2)


@pytest.mark.parametrize(("name", "shape"), [("adamw", warmup_cosine), ("nadamw_averaged", trapezoid)])
def test_the_schedule_ends_at_the_points_horizon(name, shape):
    module, points = load(name)
    point, workload = as_point(points[4]), FakeWorkload()
    scheduler = module.init_optimizer_state(workload, workload.model, None, point, [0, 0])["scheduler"]
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=point.learning_rate)
    horizon = 0.6 * workload.step_hint
    expected = shape(plain, horizon, int(0.05 * horizon))
    for step in range(workload.step_hint):
        assert scheduler.get_last_lr()[0] == expected.get_last_lr()[0]
        assert (scheduler.get_last_lr()[0] == 0) == (step >= horizon)
        scheduler.optimizer.step()
        scheduler.step()
        plain.step()
        expected.step()


def test_it_trains_and_resumes(baseline, tmp_path):
    """Write the checkpoint after an evaluation, as AlgoPerf does."""
    module, points = baseline
    point = as_point(points[0], learning_rate=0.02)

    def train(workload, state, steps):
        for t in steps:
            module.update_params(**arguments(workload, point, state, t), batch=workload.batch())
        module.prepare_for_eval(**arguments(workload, point, state, steps[-1]))
        logits = workload.model.eval()(workload.batch()["inputs"])
        return workload.loss_fn(workload.batch()["targets"], logits, workload.batch()["weights"])["summed"].item()

    workload, other = TypedWorkload(), TypedWorkload()
    state, other_state = (module.init_optimizer_state(w, w.model, None, point, [0, 0]) for w in (workload, other))
    early = train(workload, state, range(5))
    saved = {"model": workload.model.state_dict(), **{key: value.state_dict() for key, value in state.items()}}
    torch.save(saved, tmp_path / "checkpoint")
    loaded = torch.load(tmp_path / "checkpoint", weights_only=True)
    other.model.load_state_dict(loaded.pop("model"))
    for key, value in loaded.items():
        other_state[key].load_state_dict(value)
    late = train(workload, state, range(5, 40))
    assert late < 0.8 * early
    assert train(other, other_state, range(5, 40)) == late
    assert all(torch.equal(p, q) for p, q in zip(weights(workload), weights(other)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist_vit", "solubility_gnn"])
def test_it_learns(baseline, name):
    module, points = baseline
    workload = load_workload(name)
    workload.step_hint = 40
    point = as_point(points[0])
    workload.model, _ = workload.init_model_fn([1, 0])
    state = module.init_optimizer_state(workload, workload.model, None, point, [0, 0])
    batches = workload._build_input_queue([1], "train", "", workload.default_batch_size)
    metric = "loss" if name == "mnist_vit" else workload.target_metric_name
    losses = []
    for t in range(41):
        kwargs = arguments(workload, point, state, t)
        if t % 40 == 0:
            module.prepare_for_eval(**kwargs)
            losses.append(workload.eval_model(1024, workload.model, None, [0, 0], "", None, t)[f"train/{metric}"])
        module.update_params(**kwargs, batch=next(batches))
    assert losses[1] < 0.98 * losses[0]


def test_schedule_free_evaluates_the_average_without_affecting_training():
    """Compare with the package's loop without evaluations. At a constant learning rate the average is the mean of all z."""
    module, points = load("schedule_free_adamw")
    point = as_point(points[-1], warmup_factor=0.0)
    workload, plain = FakeWorkload(), FakeWorkload()
    for w in (workload, plain):
        del w.model[1]  # before batch norm, a bias's gradient is rounding noise, which Adam would amplify
    state = module.init_optimizer_state(workload, workload.model, None, point, [0, 0])
    options = {"lr": point.learning_rate, "betas": (point.beta1, point.beta2), "weight_decay": point.weight_decay}
    optimizer = AdamWScheduleFree(plain.model.parameters(), **options)
    optimizer.train()
    iterates = []
    for t in range(10):
        module.update_params(**arguments(workload, point, state, t), batch=workload.batch(t))
        batch = plain.batch(t)
        losses = plain.loss_fn(batch["targets"], plain.model(batch["inputs"]), batch["weights"])
        optimizer.zero_grad()
        (losses["summed"] / losses["n_valid_examples"]).backward()
        optimizer.step()
        iterates.append([optimizer.state[p]["z"].clone() for p in plain.model.parameters()])
        torch.testing.assert_close(weights(workload), weights(plain))
        module.prepare_for_eval(**arguments(workload, point, state, t))
        means = [torch.stack(z).mean(dim=0) for z in zip(*iterates)]
        torch.testing.assert_close(weights(workload), means)
    assert not torch.allclose(means[0], weights(plain)[0])


def test_averages_are_evaluated_without_affecting_training():
    """Compare with a loop of torch's NAdam, and the recursion by hand in float64."""
    module, points = load("nadamw_averaged")
    point = as_point(points[0])
    workload, plain = FakeWorkload(), FakeWorkload()
    state = module.init_optimizer_state(workload, workload.model, None, point, [0, 0])
    other = load("nadamw")[0].make_optimizer(plain.model, point)
    scheduler = trapezoid(other, plain.step_hint, 2)
    averages = [w.double() for w in weights(plain)]
    for t in range(12):
        module.update_params(**arguments(workload, point, state, t), batch=workload.batch(t))
        batch = plain.batch(t)
        losses = plain.loss_fn(batch["targets"], plain.model(batch["inputs"]), batch["weights"])
        other.zero_grad()
        (losses["summed"] / losses["n_valid_examples"]).backward()
        other.step()
        scheduler.step()
        assert all(map(torch.equal, weights(workload), weights(plain)))
        share = 1 - (1 - 1 / (t + 1)) ** 7.94
        averages = [e + share * (w - e) for e, w in zip(averages, weights(plain))]
        if t % 3 == 2:
            module.prepare_for_eval(**arguments(workload, point, state, t))
            torch.testing.assert_close(weights(workload), [e.float() for e in averages], rtol=1e-5, atol=1e-7)
    assert not torch.allclose(weights(workload)[0], weights(plain)[0], rtol=1e-3)


@pytest.mark.parametrize("wrapped", [False, True])
def test_muon_gets_the_hidden_matrices(wrapped):
    module, _ = load("muon")
    workload = load_workload("mnist_vit")
    model, _ = workload.init_model_fn([0, 0])
    names = {p: name for name, p in model.named_parameters()}
    hidden, others = module.split(workload, nn.ModuleDict({"module": model}) if wrapped else model)
    expected = {name for name in names.values() if re.fullmatch(r"layers\.\d+\.(qkv|out|up|down)\.weight", name)}
    assert {names[p] for p in hidden} == expected
    assert {names[p] for p in others} == set(names.values()) - expected
    assert {"patches.weight", "positions.weight", "norm.weight", "output.weight"} <= {names[p] for p in others}


@pytest.mark.parametrize("shape", [(8, 3, 2, 2), (4, 30), (20, 1, 5)])
def test_muon_takes_convolutions_as_matrices(shape):
    """Compare two steps with the formulas in float64; the package's iteration is in bfloat16."""
    module, points = load("muon_conv")
    point = as_point(points[0], warmup_factor=0.0)
    workload = TypedWorkload()
    torch.manual_seed(1)
    workload.model = nn.ParameterDict({"weight": torch.randn(shape)})
    optimizer = module.init_optimizer_state(workload, workload.model, None, point, [0, 0])["optimizer"]
    W = weights(workload)[0].double().flatten(1)
    B = torch.zeros_like(W)
    for _ in range(2):
        G = torch.randn(shape)
        workload.model["weight"].grad = G.clone()
        before = weights(workload)[0].clone()
        optimizer.step()
        B = 0.95 * B + 0.05 * G.double().flatten(1)
        X = 0.05 * G.double().flatten(1) + 0.95 * B
        X = X / X.norm()
        for _ in range(5):
            A = X @ X.mT
            X = 3.4445 * X - 4.7750 * A @ X + 2.0315 * A @ A @ X
        change = -point.learning_rate * (0.2 * max(W.shape) ** 0.5 * X + 0.1 * before.double().flatten(1))
        error = (weights(workload)[0] - before).double().flatten(1) - change
        assert error.norm() < 0.04 * change.norm()


def test_the_lookahead_of_soap_uses_the_gradient_of_the_step():
    """Compare with Adam's formulas in the eigenbases of the first gradient, which initializes them and takes no step."""
    module, points = load("soap_lookahead")
    point = as_point(points[0], warmup_factor=0.0, precondition_frequency=1000, weight_decay=0.0, learning_rate=0.01)
    workload = TypedWorkload()
    workload.step_hint = 10**9  # a constant rate
    workload.model = nn.ParameterDict({"weight": torch.randn(4, 4)})
    optimizer = module.init_optimizer_state(workload, workload.model, None, point, [0, 0])["optimizer"]
    gradients = torch.randn(5, 4, 4)
    before = weights(workload)[0].clone()
    for G in gradients:
        workload.model["weight"].grad = G.clone()
        optimizer.step()
    first = gradients[0].double()
    L, R = (torch.linalg.eigh(x).eigenvectors for x in (first @ first.mT, first.mT @ first))
    M, V, W = torch.zeros(3, 4, 4, dtype=torch.float64)
    for t, G in enumerate(gradients[1:].double(), start=1):
        G = L.mT @ G @ R
        M, V = 0.95 * M + 0.05 * G, 0.95 * V + 0.05 * G**2
        N = 0.05 * G / (1 - 0.95**t) + 0.95 * M / (1 - 0.95 ** (t + 1))
        W = W - 0.01 * L @ (N / (V / (1 - 0.95**t)).sqrt()) @ R.mT
    torch.testing.assert_close((weights(workload)[0] - before).double(), W, rtol=1e-3, atol=1e-5)


@needs_muon
def test_muon_without_hidden_matrices_is_adamw():
    point = as_point(load("muon")[1][0], warmup_factor=0.0)
    ends = []
    for name in ("muon", "adamw"):
        module, _ = load(name)
        workload = TypedWorkload()
        workload.model = nn.Sequential(collections.OrderedDict({"3": nn.Linear(6, 5)}))
        state = module.init_optimizer_state(workload, workload.model, None, point, [0, 0])
        for t in range(3):
            module.update_params(**arguments(workload, point, state, t), batch=workload.batch(t))
        ends.append(weights(workload)[0])
    assert torch.equal(*ends)


def test_muon_names_the_torch_it_needs(monkeypatch):
    module, points = load("muon")
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match=r"torch is .*; for torch\.optim\.Muon it must be 2\.9 or newer"):
        module.init_optimizer_state(None, None, None, as_point(points[0]), [0, 0])
