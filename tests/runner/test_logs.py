"""Log files, event files, experiment folders and checkpoints."""

import pickle
from pathlib import Path

import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

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


@pytest.fixture
def events(tmp_path):
    """Return the events of a run that was resumed at step 50, after its first evaluations."""
    point = {"learning_rate": 0.00701, "exponents": [1, 2]}
    for first_step, accuracies in ((0, {1: 0.1, 50: 0.7}), (50, {60: 0.8, 70: 0.6})):
        logger = MetricLogger(tmp_path, first_step, "validation/accuracy", True, point)
        logger.append_scalar_metrics({"loss": 2.0}, first_step)
        for step, accuracy in accuracies.items():
            metrics = {"validation/accuracy": accuracy, "test/accuracy": 0.5, "accumulated_eval_time": 3.0}
            logger.append_scalar_metrics(metrics, step, 0, is_eval=True)
        logger.finish()
    return EventAccumulator(str(tmp_path / "lr 0.00701")).Reload()


def scalars(events, tag):
    return [(x.step, pytest.approx(x.value)) for x in events.Scalars(tag)]


def test_metrics_reach_tensorboard(events):
    assert scalars(events, "Training/loss") == [(0, 2.0), (50, 2.0)]
    assert scalars(events, "Target/validation accuracy") == [(1, 0.1), (60, 0.8), (70, 0.6)]


def test_tensorboard_opens_on_the_target(events):
    """It sorts tags by character codes, in which slashes and digits precede letters; none of these tags begins with a digit."""
    tags = sorted(events.Tags()["scalars"])
    assert tags[:2] == ["Target/validation accuracy", "Target/validation accuracy (best so far)"]
    assert list(dict.fromkeys(tag.split("/")[0] for tag in tags)) == ["Target", "Training", "clock", "test"]


def test_the_hparams_tab_has_the_hyperparameters_and_the_best_result(events):
    best = "Target/validation accuracy (best so far)"
    assert scalars(events, best)[-2:] == [(60, 0.8), (70, 0.8)]
    data = {
        tag: plugin_data_pb2.HParamsPluginData.FromString(content)
        for tag, content in events.PluginTagToContent("hparams").items()
    }
    assert [x.name.tag for x in data["_hparams_/experiment"].experiment.metric_infos] == [best]
    values = data["_hparams_/session_start_info"].session_start_info.hparams
    assert values["learning_rate"].number_value == 0.00701
    assert values["exponents"].string_value == "[1, 2]"
    assert data["_hparams_/session_end_info"].session_end_info.status == api_pb2.STATUS_SUCCESS


def test_a_run_without_a_learning_rate_and_a_lower_best(tmp_path):
    logger = MetricLogger(tmp_path, 0, "validation/loss", False, {"x": 1})
    for step, loss in ((1, 0.5), (2, 0.25), (3, 0.75)):
        logger.append_scalar_metrics({"validation/loss": loss}, step, 0, is_eval=True)
    logger.finish()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert scalars(events, "Target/validation loss (best so far)") == [(1, 0.5), (2, 0.25), (3, 0.25)]


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
