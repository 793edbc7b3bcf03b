import os
import signal
import sys

import hypothesis
import pytest
import torch
from rank_pool import RankPool

# Two test workers share two cores.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
# A shell's background jobs ignore Ctrl-C, and so would the processes that tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)

# No limits on wall-clock time, which a loaded machine would exceed.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _same_start(monkeypatch):
    """Seed torch, and undo changes of sys.path: folders of submissions that a test loads would stay on it."""
    torch.manual_seed(0)
    monkeypatch.setattr(sys, "path", [*sys.path])


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request):
    return torch.device(request.param)


@pytest.fixture(scope="module")
def pools():
    """A function from a number of ranks to a pool of that size, started on first use and restarted after a failure."""
    started = {}

    def pool(size):
        if size not in started or started[size].closed:
            started[size] = RankPool(size)
        return started[size]

    yield pool
    for pool in started.values():
        pool.close()
