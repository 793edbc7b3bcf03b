"""The submission on multiple ranks, in processes connected by gloo."""

import pytest
import torch
import torch.distributed as dist
from absl import flags
from fake_workload import FakeWorkload, as_point, evaluate, start, step
from torch import nn

pytestmark = pytest.mark.slow


def submitted(rank, size, wrapped, averaging=False):
    """Take six steps on this rank's part of each batch, with the model in DDP or bare. Return the weights to evaluate."""
    workload, point = FakeWorkload(), as_point(precondition_frequency=2, epsilon=1e-3, averaging=averaging)
    workload.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    model = nn.parallel.DistributedDataParallel(workload.model) if wrapped else workload.model
    state = start(workload, point, model)
    for t in range(6):
        part = {key: x.chunk(size)[rank] for key, x in workload.batch(t).items()}
        step(workload, state, point, part, t, model)
        if t % 2:
            evaluate(workload, state, point)
    return [p.detach().clone() for p in workload.model.parameters()]


def saved_state(rank, size):
    """Return the keys of rank 0's state_dict with checkpoints on and off, and the error of loading the latter."""
    if "save_checkpoints" not in flags.FLAGS:
        flags.DEFINE_boolean("save_checkpoints", True, "as the runner defines it")
    flags.FLAGS.mark_as_parsed()
    found = []
    for saves in (True, False):
        flags.FLAGS.save_checkpoints = saves
        workload, point = FakeWorkload(), as_point()
        state = start(workload, point)
        step(workload, state, point, workload.batch())
        evaluate(workload, state, point)
        found.append(sorted(state["optimizer"].state_dict()) if rank == 0 else None)
    try:
        state["optimizer"].load_state_dict({"not_resumable": "why"})
    except ValueError as error:
        found.append(str(error))
    return found


def saved_again(rank, size):
    """Resume an evaluated trial on all ranks from rank 0's state_dict; return that, and rank 0's state_dict without a step."""
    workload, point = FakeWorkload(), as_point(precondition_frequency=1)
    state = start(workload, point)
    step(workload, state, point, workload.batch())
    state["optimizer"].consolidate_state_dict()
    saved = [state["optimizer"].state_dict() if rank == 0 else None]
    dist.broadcast_object_list(saved)
    resumed = start(FakeWorkload(), point)["optimizer"]
    resumed.load_state_dict(saved[0])
    return saved[0], resumed.state_dict() if rank == 0 else None


@pytest.mark.parametrize("averaging", [False, True])
@pytest.mark.parametrize("wrapped", [True, False])
def test_ranks_take_the_step_of_the_full_batch(pools, wrapped, averaging):
    """All padding is on rank 1, so a mean of per-rank means would differ. AlgoPerf resumes with a bare model."""
    weights = pools(2).run(submitted, wrapped=wrapped, averaging=averaging)
    assert all(map(torch.equal, *weights))
    torch.testing.assert_close(weights[0], submitted(0, 1, False, averaging), rtol=0, atol=1e-5)


def test_state_is_gathered_only_for_checkpoints_and_is_not_resumable_otherwise(pools):
    gathered, lacking, error = pools(2).run(saved_state)[0]
    assert gathered == ["param_groups", "state", "version"]
    assert lacking == ["not_resumable"]
    assert error == "this checkpoint cannot be resumed from: why"


def test_a_trial_that_had_ended_can_be_resumed_again(pools):
    """AlgoPerf resumes each trial of a study, and saves those that had ended again, without another step or evaluation."""
    saved, again = pools(2).run(saved_again)[0]
    assert again["param_groups"] == saved["param_groups"]
    torch.testing.assert_close(again["state"], saved["state"], rtol=0, atol=0)
