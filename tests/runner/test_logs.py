"""Log files, event files, experiment folders and checkpoints."""

import pickle
from pathlib import Path

import pandas as pd
import pytest
import torch

from runner.logs import MetricLogger, append_row, drop_rows_after, experiment_folder, latest_checkpoint, save_checkpoint


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    for step in (1, 40, 50):
        append_row(tmp_path / "m.csv", {"global_step": step, "loss": 0.5})
    drop_rows_after(tmp_path / "m.csv", 40)
    assert list(pd.read_csv(tmp_path / "m.csv")["global_step"]) == [1, 40]


def test_rows_are_appended_with_new_columns_last(tmp_path):
    path = tmp_path / "m.csv"
    append_row(path, {"b": 1.0, "a": 2.0})
    append_row(path, {"c": 3.0, "a": 4.0})
    assert path.read_text() == "a,b,c\n2.0,1.0,\n4.0,,3.0\n"


def test_metrics_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = MetricLogger(tmp_path, first_step=0)
    logger.append_scalar_metrics({"loss": 2.0}, 0)
    logger.append_scalar_metrics({"loss": 1.5}, 50)
    logger.finish()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 2.0), (50, 1.5)]


@pytest.mark.parametrize("name", ["..", "../x", "/tmp/x", ".", ""])
def test_an_experiment_stays_inside_its_folder(tmp_path, name):
    with pytest.raises(ValueError, match="must name a folder inside"):
        experiment_folder(str(tmp_path / "a"), name, "w", resume=False, overwrite=True)


class Payload:
    """Creates a file when unpickled, which a checkpoint must not be able to do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_cannot_run_code(tmp_path):
    torch.save({"global_step": 1, "optimizer_state": Payload(tmp_path / "touched")}, tmp_path / "checkpoint_1")
    with pytest.raises(pickle.UnpicklingError):
        latest_checkpoint(tmp_path, torch.device("cpu"))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("keep_others", [False, True])
def test_a_save_that_fails_in_the_middle_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, keep_others):
    """Of the same step, as after a restart, and of an earlier one."""
    save_checkpoint(tmp_path, {"global_step": 10, "loss": 0.5}, keep_others)
    save = torch.save

    def fail(state, target):
        save({**state, "loss": None}, target)
        with Path(target).open("r+b") as file:
            file.truncate(100)
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    for step in (10, 20):
        with pytest.raises(OSError, match="no space left"):
            save_checkpoint(tmp_path, {"global_step": step, "loss": 0.25}, keep_others)
        assert latest_checkpoint(tmp_path, torch.device("cpu")) == {"global_step": 10, "loss": 0.5}
    monkeypatch.undo()
    save_checkpoint(tmp_path, {"global_step": 20, "loss": 0.25}, keep_others)
    assert latest_checkpoint(tmp_path, torch.device("cpu")) == {"global_step": 20, "loss": 0.25}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_10"] * keep_others + ["checkpoint_20"]


def test_other_checkpoints_are_removed_only_once_the_new_one_is_there(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, {"global_step": 10}, keep_others=False)
    replace = Path.replace

    def seen(path, target):
        assert (tmp_path / "checkpoint_10").exists()
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", seen)
    save_checkpoint(tmp_path, {"global_step": 20}, keep_others=False)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_20"]


def test_the_latest_checkpoint_is_the_one_with_the_most_steps(tmp_path):
    assert latest_checkpoint(tmp_path, torch.device("cpu")) is None
    for step in (9, 100, 20):
        save_checkpoint(tmp_path, {"global_step": step}, keep_others=True)
    assert latest_checkpoint(tmp_path, torch.device("cpu")) == {"global_step": 100}
