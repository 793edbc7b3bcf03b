"""The distribution of AlgoPerf's models over ranks."""

from experiments.balance import balance, load_shapes


def test_algoperfs_models_are_balanced():
    """Costs exceed the mean by at most 5% where blocks are small enough, and are never worse than a balance by bytes."""
    for name, shapes in load_shapes().items():
        row = balance(shapes, 8)
        assert row["max/mean cost"] <= max(1.0, row["by bytes"]) + 1e-9
        if name not in ("criteo1tb", "fastmri", "ogbg"):
            assert row["max/mean cost"] <= 1.05
            assert row["exchanged bytes per parameter"] <= 4.6
