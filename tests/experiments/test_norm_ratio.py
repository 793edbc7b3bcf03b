"""The experiment on ratios of norms: its training runs and its tables."""

import pandas as pd
import pytest

from experiments.norm_ratio import LEARNING_RATES, layer_table, train, workload_table


@pytest.mark.slow
def test_a_watched_run_equals_an_unwatched_one(tmp_path):
    runs = [
        train("flights_dlrm", LEARNING_RATES["flights_dlrm"], steps=6, every=every, folder=tmp_path / str(every))
        for every in (2, 100)
    ]
    assert runs[1].empty
    assert list(runs[0]["step"].unique()) == [2, 4, 6]
    assert runs[0].query("parameter == 'output.weight'")["update_norm"].gt(0).all()
    assert runs[0]["split_ratio"].dropna().between(0, 1.000001).all()
    evaluations = [pd.read_csv(tmp_path / str(every) / "eval_measurements.csv") for every in (2, 100)]
    losses = [table.filter(like="/loss") for table in evaluations]
    assert losses[0].shape == (2, 3)
    assert losses[0].equals(losses[1])


def test_tables_have_medians_over_steps_and_slopes_over_layers():
    shapes = {"a": (4, 8), "b": (64, 16)}
    rows = [
        {
            "workload": "w",
            "parameter": name,
            "step": t,
            "m": m,
            "n": n,
            "nuclear_ratio": min(m, n) ** -0.5 * x,
            "split_ratio": 0.5,
        }
        for name, (m, n) in shapes.items()
        for t, x in enumerate((1.0, 1.5, 1.1))
    ]
    layers = layer_table(pd.DataFrame([*rows, {"workload": "w", "parameter": "bias", "step": 0, "nuclear_ratio": 1.0}]))
    assert layers["least possible"].to_list() == [0.5, 0.25]
    assert layers["batch median"].to_list() == pytest.approx([0.55, 0.275])
    table = workload_table(layers).set_index("workload")
    assert table.index.to_list() == ["w", "all"]
    assert table.loc["w", ["matrices", "batch max", "slope, batch", "slope, eval_train"]].to_list() == pytest.approx(
        [2, 0.55, -0.5, 0], abs=1e-9
    )
