import pytest

from experiments.soak import soak


@pytest.mark.slow
def test_a_long_run_with_saving_and_loading_equals_one_without():
    """Run 450 of the 20,000 steps of `experiments/soak.py`."""
    skipped, _ = soak(steps=450, save_every=45)
    assert skipped > 0
