"""The examples that need no framework, with few steps."""

import pytest
import torch
from example_runs import assert_identical, interrupted, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.mark.slow
def test_the_plain_example_learns_and_logs(tmp_path):
    line = run("plain", tmp_path, "--steps", 100)
    assert float(line.split("accuracy ")[1].split(",")[0]) > 0.9
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"loss", "accuracy", "steps/optimizer"} <= set(events.Tags()["scalars"])


@pytest.mark.slow
def test_the_ddp_example_is_killed_and_resumes_bit_for_bit(tmp_path):
    line = interrupted("ddp", tmp_path, "--steps", 50, processes=2, kill_at=33)
    assert line.startswith("ddp: 2 processes, steps 21 to 50, ")

    def saved(folder):
        return torch.load(folder / "checkpoint.pt", weights_only=True)

    assert_identical(tmp_path, lambda folder: saved(folder)["model"], lambda folder: saved(folder)["optimizer"])
