import pytest
import torch

from experiments.step_time import OPTIMIZERS, Watch, measure


def test_operations_are_counted_without_views_and_list_operations_per_thirty_tensors():
    x, many = torch.zeros(4, 6), [torch.zeros(2) for _ in range(61)]
    with Watch() as watch:
        x.add_(1).view(-1)[2:].mul_(2)
        torch._foreach_add_(many, 1.0)
        x.T.reshape(4, 6)  # a copy
    assert watch.operations == 1 + 1 + 3 + 1
    assert watch.syncs == 0
    with Watch() as watch:
        float(x.sum())
    assert (watch.operations, watch.syncs) == (2, 1)


def test_the_peak_is_the_most_memory_in_use_at_once():
    x = torch.zeros(1000)
    with Watch() as watch:
        y = x + 1
        del y
        a, b = x * 2, x * 3
        x.add_(1)
    assert (watch.bytes, watch.peak) == (8000, 8000)
    del a, b
    assert watch.bytes == 0


def test_matrix_products_are_recorded_and_can_be_repeated():
    A, G, X = torch.zeros(2, 3, 3), torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    with Watch() as watch:
        A.baddbmm_(G, G.mT)
        _ = G @ X
    before = A.clone()
    watch.multiply()
    assert len(watch.products) == 2
    assert torch.equal(A, before)


@pytest.mark.slow
def test_the_table_of_step_times_has_the_size_of_the_state():
    table = measure(["adamw", "shampoo"], [(8, 6), (5,)], frequency=2, block_size=1024, rounds=1, device=torch.device("cpu"))
    assert set(table.index) <= set(OPTIMIZERS)
    assert table.loc["shampoo", "state"] == pytest.approx(8 + 4 * 2 * (48**2 + 5**2) / 53)  # (8, 6) is merged to (48,)
    assert table.loc["shampoo", "syncs"] == 0
    assert table.loc["adamw", "state"] == pytest.approx(8, abs=0.2)  # plus its step counts
