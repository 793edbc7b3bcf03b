import numpy as np
import pandas as pd
import pytest

from runner import report
from runner.workloads import load_workload


def test_the_table_says_what_ended_a_trial(tmp_path):
    for number, content in enumerate(['{"ended": "time"}', "{}"], start=1):
        trial = tmp_path / f"trial_{number}"
        trial.mkdir()
        (trial / "hparams.json").write_text("{}")
        (trial / "meta_data_0.json").write_text('{"ended": "target"}')  # of a run that was interrupted later
        (trial / "meta_data_10.json").write_text(content)
        pd.DataFrame({"global_step": [1], "score": [0.1], "validation/loss": [4.0]}).to_csv(trial / "eval_measurements.csv")
    trials, problems = report.read_trials(tmp_path, "validation/loss")
    table = report.trial_table(load_workload("pydoc_lm"), trials)
    assert problems == []
    assert table.loc["ended by"].tolist() == ["time", "-"]


def test_codes_for_the_terminal_are_shown_not_sent():
    evaluations = pd.DataFrame({"global_step": [1], "score": [0.1], "validation/loss": [4.0]})
    trials = {i: ({"a\x1b[2J": f"{i}\r\n", "same\x07": 1}, evaluations, "time") for i in (1, 2)}
    text = report.trial_table(load_workload("pydoc_lm"), trials).to_string()
    assert r"'a\x1b[2J'" in text
    assert r"'1\r\n'" in text
    assert not {"\x1b", "\r", "\x07"} & set(text)
    assert "same" not in text


@pytest.mark.parametrize("values", [[4.0, np.inf, np.inf], [np.nan, np.nan]])
def test_a_diverged_trial_can_be_plotted(tmp_path, values):
    evaluations = pd.DataFrame({"score": np.arange(len(values)), "validation/loss": values})
    report.plot_trials(load_workload("pydoc_lm"), "pydoc_lm", {1: ({}, evaluations, "time")}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("hparams.json", b"", "trial_2/hparams.json cannot be read"),
        ("hparams.json", None, "trial_2/hparams.json"),
        ("meta_data_0.json", b"[]", "trial_2/meta_data_0.json cannot be read"),
        ("meta_data_0.json", b"\xff", "trial_2/meta_data_0.json cannot be read"),
        ("eval_measurements.csv", b"\0\0", "trial_2/eval_measurements.csv lacks the columns"),
        ("eval_measurements.csv", b"", "trial_2/eval_measurements.csv cannot be read"),
        ("eval_measurements.csv", b"global_step,score,validation/loss\n1,x,2\n", "must have numbers in the columns ['score']"),
        ("error.txt", b"\xff\0", None),
        ("error.txt", b"", None),
        ("meta_data_x.json", b"", None),
        ("meta_data_0.json", None, None),
        ("eval_measurements.csv", None, None),
        ("eval_measurements.csv", b"global_step,score,validation/loss\n", None),
    ],
)
def test_what_cannot_be_read_is_named_and_the_rest_is_reported(tmp_path, name, content, message):
    """Without its evaluations, a trial was not evaluated; other files and folders are no trials."""
    for folder in ("trial_1", "trial_2", "trial_", "trial_x", "trial_3_old"):
        (tmp_path / folder).mkdir()
    for number in (1, 2):
        trial = tmp_path / f"trial_{number}"
        (trial / "hparams.json").write_text("{}")
        (trial / "meta_data_0.json").write_text('{"ended": "target"}')
        (trial / "eval_measurements.csv").write_text("global_step,score,validation/loss\n1,0.5,4.0\n")
    (tmp_path / "trial_2" / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / "trial_2" / name).write_bytes(content)
    trials, problems = report.read_trials(tmp_path, "validation/loss")
    stays = message is None and name != "eval_measurements.csv"
    assert list(trials) == ([1, 2] if stays else [1])
    assert len(problems) == (message is not None)
    if message is not None:
        assert problems[0].startswith("trial_2 is left out of the table: ")
        assert message in problems[0]
    assert "trial 1" in report.trial_table(load_workload("pydoc_lm"), trials)
