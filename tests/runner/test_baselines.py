"""The baseline submissions: AlgoPerf's functions, five points that differ only in the learning rate, and training."""

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


def assert_ladder(points):
    """Check that five points differ only in the learning rate, by factors of two, and that the middle one comes first."""
    rates = sorted(point["learning_rate"] for point in points)
    assert rates == pytest.approx([rates[0] * 2**i for i in range(5)])
    assert points[0]["learning_rate"] == rates[2]
    assert len({json.dumps({**point, "learning_rate": 0}) for point in points}) == 1


@pytest.fixture(params=[pytest.param(x.name, marks=needs_muon if x.name == "muon" else ()) for x in FOLDERS])
def baseline(request):
    return load(request.param)


def test_the_points_are_a_ladder_of_learning_rates(baseline):
    _, points = baseline
    assert_ladder(points)


def test_our_ladder_differs_from_the_competitions_first_point_as_documented():
    points = [json.loads((ROOT / folder / "tuning_search_space.json").read_text()) for folder in ("runner", ".")]
    assert_ladder(points[0])
    ours, theirs = (points[i][0] for i in (0, 1))
    differing = {key for key in theirs if ours[key] != theirs[key]}
    assert differing == {"learning_rate", "precondition_frequency", "block_size", "dropout_rate", "schedule_tail"}
    assert min(point["learning_rate"] for point in points[0]) == pytest.approx(theirs["learning_rate"], rel=1e-2)


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
