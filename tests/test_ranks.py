"""Several ranks: every check runs in real processes that gloo connects, one pool of them for each number of ranks."""

import pytest
import rank_checks
import torch
from rank_checks import Pool, single_process


@pytest.fixture(scope="module")
def pools():
    """A pool for each number of ranks, started when first asked for."""
    started = {}

    def pool(size):
        if size not in started:
            started[size] = Pool(size)
        return started[size]

    yield pool
    for pool in started.values():
        pool.close()


def largest_difference(weights, others):
    return max((x - y).abs().max().item() for x, y in zip(weights, others, strict=True))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9, "nesterov": True, "nadam": True}, {"grafting": "sgd", "normalized_grafting": True, "lr": 1e-4}],
    ids=["adam", "momentum", "sgd"],
)
def test_all_ranks_have_the_weights_of_one(pools, size, options):
    weights = pools(size).run(rank_checks.weights_after, **options)
    for other in weights[1:]:
        assert all(map(torch.equal, weights[0], other))
    assert largest_difference(weights[0], single_process(**options)) <= 1e-6
