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
    table = report.trial_table(load_workload("pydoc_lm"), report.read_trials(tmp_path))
    assert table.loc["ended by"].tolist() == ["time", "-"]


@pytest.mark.parametrize("values", [[4.0, np.inf, np.inf], [np.nan, np.nan]])
def test_a_diverged_trial_can_be_plotted(tmp_path, values):
    evaluations = pd.DataFrame({"score": np.arange(len(values)), "validation/loss": values})
    report.plot_trials(load_workload("pydoc_lm"), "pydoc_lm", {1: ({}, evaluations, "time")}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()
