"""The baseline submissions: AlgoPerf's functions, five points that differ in the learning rate alone, and training."""

import collections
import copy
import importlib
import json
from pathlib import Path

import pytest
from test_submission import FakeWorkload

FOLDERS = sorted(path.parent for path in (Path(__file__).parents[1] / "runner" / "baselines").glob("*/submission.py"))


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def baseline(request):
    points = json.loads((request.param / "tuning_search_space.json").read_text())
    return importlib.import_module(f"runner.baselines.{request.param.name}.submission"), points


def test_the_points_are_a_ladder_of_learning_rates(baseline):
    _, points = baseline
    rates = [point["learning_rate"] for point in points]
    assert len(rates) == 5
    assert rates == pytest.approx([rates[0] * 2**i for i in range(5)])
    assert len({json.dumps({**point, "learning_rate": 0}) for point in points}) == 1


def test_it_trains_and_resumes(baseline):
    module, points = baseline
    point = collections.namedtuple("Hyperparameters", points[0])(**{**points[0], "learning_rate": 0.02})

    def train(workload, state, steps):
        for t in steps:
            module.update_params(
                workload=workload,
                current_param_container=workload.model,
                current_params_types={},
                model_state=None,
                hyperparameters=point,
                batch=workload.batch(),
                loss_type=workload.loss_type,
                optimizer_state=state,
                eval_results=[],
                global_step=t,
                rng=[0, 0],
            )
        logits = workload.model.eval()(workload.batch()["inputs"])
        return workload.loss_fn(workload.batch()["targets"], logits, workload.batch()["weights"])["summed"].item()

    workload, other = FakeWorkload(), FakeWorkload()
    state, other_state = (module.init_optimizer_state(w, w.model, None, point, [0, 0]) for w in (workload, other))
    early = train(workload, state, range(5))
    other.model.load_state_dict(workload.model.state_dict())
    for key, value in state.items():
        other_state[key].load_state_dict(copy.deepcopy(value.state_dict()))
    late = train(workload, state, range(5, 40))
    assert late < 0.8 * early
    assert train(other, other_state, range(5, 40)) == late
