"""Log files, event files, experiment folders and checkpoints."""

import os
import pickle
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

from runner.logs import (
    LOGS,
    MetricLogger,
    append_row,
    checkpoints,
    count_rows,
    experiment_folder,
    keep_rows,
    read_checkpoint,
    save_checkpoint,
)

CPU = torch.device("cpu")


def test_rows_after_the_checkpoint_are_dropped_though_they_are_of_its_step(tmp_path):
    """A submission logs at the step of a checkpoint once more when it goes on from there."""
    for step in (1, 40, 40, 50):
        for name in LOGS:
            append_row(tmp_path / name, {"global_step": step, "loss": 0.5})
    keep_rows(tmp_path, {LOGS[0]: 2, LOGS[1]: 3})
    assert count_rows(tmp_path) == {LOGS[0]: 2, LOGS[1]: 3}
    assert list(pd.read_csv(tmp_path / LOGS[1])["global_step"]) == [1, 40, 40]


def test_rows_that_are_lost_are_an_error(tmp_path):
    append_row(tmp_path / LOGS[0], {"global_step": 1})
    with pytest.raises(ValueError, match=r"eval_measurements.csv has 0 rows, and had 1 at the last checkpoint; restore it, or"):
        keep_rows(tmp_path, {LOGS[0]: 1, LOGS[1]: 1})


def test_numbers_do_not_change_when_rows_are_added(tmp_path):
    """Each row is read and written again for every later one."""
    values = [float(f"0.{10**16 + 7 * i}") for i in range(60)]
    for value in values:
        append_row(tmp_path / "m.csv", {"global_step": 1, "loss": value})
    assert (tmp_path / "m.csv").read_text().splitlines()[1:] == [f"1,{value!r}" for value in values]


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
    assert scalars(events, "Target/validation accuracy") == [(1, 0.1), (50, 0.7), (60, 0.8), (70, 0.6)]


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
        experiment_folder(str(tmp_path / "a"), name, "w", overwrite=True)


class Payload:
    """Creates a file when unpickled, which a checkpoint must not be able to do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_checkpoint_cannot_run_code(tmp_path, new_format):
    state = {"global_step": 1, "optimizer_state": Payload(tmp_path / "touched")}
    torch.save(state, tmp_path / "checkpoint_1", _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match="checkpoint_1 is not a whole checkpoint") as caught:
        read_checkpoint(tmp_path / "checkpoint_1", CPU)
    assert isinstance(caught.value.__cause__, pickle.UnpicklingError if new_format else zipfile.BadZipFile)
    assert not (tmp_path / "touched").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    """Change one bit in the middle of the only tensor."""
    content = bytearray(path.read_bytes())
    content[content.index(b"\x00\x00\x80\x3f" * 100) + 200] ^= 1
    path.write_bytes(content)


def grow(path):
    """Make a file of a petabyte, if the disk can, and of the largest size that it can."""
    for exponent in range(50, 30, -1):
        try:
            os.truncate(path, 2**exponent)
            return
        except OSError:
            continue


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def folder(path):
    path.unlink()
    path.mkdir()


def bomb(path):
    """Write an archive whose content is far larger than the file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))


def of_another_kind(path):
    """Put what torch takes for a file of an old format before the archive."""
    path.write_bytes(b"\x80\x02." + path.read_bytes())


@pytest.mark.parametrize("damage", [cut, flip_a_bit, grow, fifo, folder, bomb, of_another_kind])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    save_checkpoint(tmp_path, {"global_step": 10, "model_params": torch.ones(1000)}, keep_others=False)
    assert read_checkpoint(tmp_path / "checkpoint_10", CPU)["model_params"].sum() == 1000
    damage(tmp_path / "checkpoint_10")
    with pytest.raises(ValueError, match="checkpoint_10 is not a whole checkpoint: "):
        read_checkpoint(tmp_path / "checkpoint_10", CPU)


@pytest.mark.parametrize("content", [{"global_step": 9}, {}, [10], "text"])
def test_another_content_is_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "checkpoint_10")
    with pytest.raises(ValueError, match="checkpoint_10 is not a whole checkpoint: "):
        read_checkpoint(tmp_path / "checkpoint_10", CPU)


def loss_of_latest(folder):
    return read_checkpoint(checkpoints(folder)[-1], CPU)["loss"]


@pytest.mark.parametrize("keep_others", [False, True])
def test_a_save_that_fails_in_the_middle_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, keep_others):
    """Of the same step, as after a restart, and of an earlier one."""
    save_checkpoint(tmp_path, {"global_step": 10, "loss": 0.5}, keep_others)
    write = Path.write_bytes

    def fail(path, content):
        write(path, content[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    for step in (10, 20):
        with pytest.raises(OSError, match="no space left"):
            save_checkpoint(tmp_path, {"global_step": step, "loss": 0.25}, keep_others)
        assert loss_of_latest(tmp_path) == 0.5
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_10"]
    monkeypatch.undo()
    save_checkpoint(tmp_path, {"global_step": 20, "loss": 0.25}, keep_others)
    assert loss_of_latest(tmp_path) == 0.25
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_10", "checkpoint_20"]


def test_two_checkpoints_are_kept_and_a_third_is_removed_only_once_the_new_one_is_there(tmp_path, monkeypatch):
    replace = Path.replace

    def seen(path, target):
        assert len(checkpoints(tmp_path)) == min(step // 10 - 1, 2)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", seen)
    for step in (10, 20, 30, 40):
        save_checkpoint(tmp_path, {"global_step": step}, keep_others=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_30", "checkpoint_40"]


def test_checkpoints_are_in_the_order_of_their_steps_and_others_files_are_none(tmp_path):
    assert checkpoints(tmp_path) == []
    for step in (9, 100, 20):
        save_checkpoint(tmp_path, {"global_step": step}, keep_others=True)
    for name in ("checkpoint_", "checkpoint_x", "checkpoint_200.bak", "checkpoint_-1", "checkpoint_1_000", "checkpoint_٣"):
        (tmp_path / name).touch()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint_9", "checkpoint_20", "checkpoint_100"]
