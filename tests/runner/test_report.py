import numpy as np
import pandas as pd
import pytest

from runner import report
from runner.workloads import load_workload


@pytest.mark.parametrize("values", [[4.0, np.inf, np.inf], [np.nan, np.nan]])
def test_a_diverged_trial_can_be_plotted(tmp_path, values):
    evaluations = pd.DataFrame({"score": np.arange(len(values)), "validation/loss": values})
    report.plot_trials(load_workload("pydoc_lm"), "pydoc_lm", {1: ({}, evaluations)}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()
