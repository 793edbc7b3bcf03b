"""What AlgoPerf requires of a submission: checked against its package if that is installed, else against the stand-in."""

import runner  # noqa: F401  makes algoperf.spec importable

# isort: split

import collections
import inspect
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from algoperf import spec
from fake_workload import FakeWorkload, as_point, start, step
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import submission
from runner import spec as stand_in
from runner.search_space import read_points

ROOT = Path(__file__).parents[1]
REAL = spec is not stand_in
needs_algoperf = pytest.mark.skipif(not REAL, reason="AlgoPerf's package is not installed")
SPACES = [ROOT / "tuning_search_space.json", ROOT / "tuning_search_space_2026.json"]

SIGNATURES = {  # from AlgoPerf 0.6
    "init_optimizer_state": ["workload", "model_params", "model_state", "hyperparameters", "rng"],
    "update_params": [
        "workload", "current_param_container", "current_params_types", "model_state", "hyperparameters", "batch", "loss_type",
        "optimizer_state", "eval_results", "global_step", "rng", "train_state",
    ],
    "prepare_for_eval": [
        "workload", "current_param_container", "current_params_types", "model_state", "hyperparameters", "loss_type",
        "optimizer_state", "eval_results", "global_step", "rng",
    ],
    "data_selection": [
        "workload", "input_queue", "optimizer_state", "current_param_container", "model_state", "hyperparameters",
        "global_step", "rng",
    ],
    "get_batch_size": ["workload_name"],
}  # fmt: skip


def parameters(function):
    """Return the default of each parameter by name."""
    return {p.name: p.default for p in inspect.signature(function).parameters.values()}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_algoperfs(name):
    ours = parameters(getattr(submission, name))
    assert list(ours) == SIGNATURES[name]
    if REAL:
        assert ours == parameters(getattr(spec, name))
    assert not hasattr(submission, "get_eval_batch_size")


def public(module):
    """Return the public names that a module and its classes define, with the parameters of functions and methods."""
    found = {}
    for name, value in vars(module).items():
        if inspect.isclass(value) and value.__module__ == module.__name__:
            members = {
                f"{name}.{member}": parameters(x) if inspect.isfunction(x) else None
                for member, x in vars(value).items()
                if not member.startswith("__")
            }
            found |= {name: None, **members}
        elif not name.startswith("_") and not inspect.ismodule(value):
            found[name] = parameters(value) if inspect.isfunction(value) else None
    return found


@needs_algoperf
def test_the_stand_in_differs_from_algoperfs_spec_as_its_docstring_says():
    ours, theirs = public(stand_in), public(spec)
    assert {name for name, found in ours.items() if name in theirs and found != theirs[name]} == set()
    imported = {"Any", "Callable", "Iterator", "Dict", "List", "Optional", "Tuple", "Union"}
    lacking = {name for name in theirs if name not in ours and not name.startswith("_")} - imported
    assert all(f"`{name}`" in stand_in.__doc__ for name in lacking)
    assert {name for name in ours if name not in theirs} - imported == set()
    for enum in ("LossType", "ForwardPassMode", "ParameterType"):
        assert {x.name: x.value for x in getattr(stand_in, enum)} == {x.name: x.value for x in getattr(spec, enum)}


def algoperfs_points(space):
    """Return the points of a file as AlgoPerf's search-space code reads them if it is installed, else as the runner does."""
    if not REAL:
        return read_points(space, 5, 0)
    from algoperf import halton

    return halton.generate_search(json.loads(space.read_text()), 5)


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("space", SPACES, ids=lambda space: space.stem)
def test_every_point_trains(space, number):
    point, workload = algoperfs_points(space)[number], FakeWorkload()
    assert type(point).__name__ == "Hyperparameters"
    state = start(workload, point)
    for t in range(3):
        state, model, _ = step(workload, state, point, workload.batch(t), t, train_state={})
    assert all(torch.isfinite(p).all() for p in model.parameters())


@needs_algoperf
def test_algoperfs_checkpoints_resume_bit_for_bit(tmp_path):
    from algoperf import checkpoint_utils

    point, runs = as_point(precondition_frequency=3, learning_rate=0.1), []
    for resumed in (False, True):
        workload = FakeWorkload()
        state = start(workload, point)
        for t in range(7 if resumed else 14):
            step(workload, state, point, workload.batch(t), t)
        if resumed:
            rest = (workload.model, None, {"x": 1}, [({}, 7)], 7, 0, str(tmp_path))
            checkpoint_utils.save_checkpoint("pytorch", state, *rest, save_intermediate_checkpoints=False)
            workload = FakeWorkload()
            rest = (workload.model, None, {}, [], 0, 0, str(tmp_path))
            state, *_, first, preemptions = checkpoint_utils.maybe_restore_checkpoint("pytorch", start(workload, point), *rest)
            assert (first, preemptions) == (7, 1)
            for t in range(first, 14):
                step(workload, state, point, workload.batch(t), t)
        runs.append(workload.model)
    assert all(torch.equal(p, q) for p, q in zip(*(model.parameters() for model in runs)))


@pytest.fixture
def one_rank():
    """Start a process group that holds this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_wrapped_models_train_like_the_bare_one(one_rank, compiled, parallel):
    weights = []
    for wrapped in (False, True):
        workload, point = FakeWorkload(), as_point(precondition_frequency=2, warmup_factor=0.0)
        model = DistributedDataParallel(workload.model) if wrapped and parallel else workload.model
        model = torch.compile(model, backend="eager") if wrapped and compiled else model
        state = start(workload, point, model)
        for t in range(5):
            step(workload, state, point, workload.batch(t), t, model)
        weights.append([p.detach() for p in workload.model.parameters()])
    assert all(map(torch.equal, *weights))


class TiedLanguageModel(nn.Module):
    """The tied 50257 x 1024 embedding of AlgoPerf's language model, with one block of RMSNorm and an MLP, and a 0-d scale."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50257, 1024)
        self.norm, self.up, self.down = nn.RMSNorm(1024), nn.Linear(1024, 64, bias=False), nn.Linear(64, 1024, bias=False)
        self.head = nn.Linear(1024, 50257, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, tokens):
        with torch.autocast("cpu", torch.bfloat16):
            x = self.embedding(tokens)
            return self.head(self.norm(x + self.scale * self.down(F.silu(self.up(self.norm(x)))))).float()


@pytest.mark.slow
def test_the_language_model_trains():
    assert submission.get_batch_size("finewebedu_lm") == 64
    torch.manual_seed(0)
    workload, point = FakeWorkload(), as_point(warmup_factor=0.0)
    workload.model = TiedLanguageModel()
    state = start(workload, point)
    tokens = torch.randint(50257, (8,))
    before = workload.model.embedding.weight.detach().clone()
    step(workload, state, point, {"inputs": tokens, "targets": tokens.roll(1), "weights": None})
    names = [name for name, _ in workload.model.named_parameters()]
    saved = dict(zip(names, state["optimizer"].state_dict()["state"].values(), strict=True))
    factors = {name: tuple(of_parameter["factors.0.0"].shape) for name, of_parameter in saved.items() if name != "scale"}
    assert factors == {
        "embedding.weight": (49, 1024, 1024),
        "norm.weight": (1, 1024, 1024),
        "up.weight": (1, 64, 64),
        "down.weight": (1, 1024, 1024),
    }
    assert tuple(saved["embedding.weight"]["factors.1.0"].shape) == (1, 81, 81)
    assert workload.model.scale.item() != 1
    moved = workload.model.embedding.weight.detach() - before
    assert moved.isfinite().all()
    assert (moved != 0).any(dim=1).all()
    assert all(x.dtype == torch.float32 for of_parameter in saved.values() for x in of_parameter.values())


@pytest.mark.parametrize("space", SPACES, ids=lambda space: space.stem)
def test_all_points_have_the_same_keys(space):
    """AlgoPerf makes a namedtuple type from the first point's keys."""
    points = json.loads(space.read_text())
    assert len(points) == 5
    assert collections.Counter(tuple(point) for point in points).most_common() == [(tuple(points[0]), 5)]
