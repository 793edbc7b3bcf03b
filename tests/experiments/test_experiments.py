"""What the benchmark commands count and compute, on cases small enough to know."""

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.exponents import EXPONENTS, step_length, tabulate, variant
from experiments.step_time import OPTIMIZERS, Watch, measure
from experiments.variants import compare, steps_of


def test_operations_are_counted_without_views_and_lists_by_thirties():
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


def test_the_peak_is_what_lives_at_once():
    x = torch.zeros(1000)
    with Watch() as watch:
        y = x + 1
        del y
        a, b = x * 2, x * 3
        x.add_(1)
    assert (watch.bytes, watch.peak) == (8000, 8000)
    del a, b
    assert watch.bytes == 0


def test_products_are_those_of_the_step():
    A, G, X = torch.zeros(2, 3, 3), torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    with Watch() as watch:
        A.baddbmm_(G, G.mT)
        _ = G @ X
    before = A.clone()
    watch.multiply()
    assert len(watch.products) == 2
    assert torch.equal(A, before)


def test_the_table_of_step_times_knows_the_state():
    table = measure(["adamw", "shampoo"], [(8, 6), (5,)], frequency=2, block_size=1024, rounds=1, device=torch.device("cpu"))
    assert set(table.index) <= set(OPTIMIZERS)
    assert table.loc["shampoo", "state"] == pytest.approx(8 + 4 * 2 * (48**2 + 5**2) / 53)  # (8, 6) is merged into 48
    assert table.loc["shampoo", "syncs"] == 0
    assert table.loc["adamw", "state"] == pytest.approx(8, abs=0.2)  # and its step counts


def test_ratios_are_paired_by_seed_and_a_miss_counts():
    def trial(submission, study, steps, last):
        return {
            "submission": submission,
            "workload": "w",
            "study": study,
            "steps": steps,
            "evaluations": pd.DataFrame({"global_step": [1, last]}),
        }

    trials = [trial(name, s, steps * (s + 1), 900) for name, steps in (("eigh", 100.0), ("qr", 110.0)) for s in range(3)]
    trials += [trial("bad", s, np.inf, 100 * (s + 1) - 1) for s in range(3)]
    table = compare(steps_of(pd.DataFrame(trials)), "eigh")
    assert table.loc["qr"].to_list() == pytest.approx([1.1, 1.1, 1.1, 0])
    assert table.loc["bad"].to_list() == pytest.approx([1.0, 1.0, 1.0, 3])


def test_steps_are_as_long_as_adams_with_grafting_and_scale_with_the_gradients_without():
    gradients = [[torch.randn(7, 5), torch.randn(9)] for _ in range(11)]
    point = variant("adam", (0.25, 0.25))
    G = torch.stack([torch.cat([x.flatten() for x in step]) for step in gradients]).double()

    def adam(t):  # with nadam's look-ahead
        beta1, beta2, ages = 1 - point["one_minus_beta1"], 1 - point["one_minus_beta2"], torch.arange(t - 1, -1, -1).double()
        M, V = (((1 - beta) * beta**ages) @ x[:t] / (1 - beta**t) for beta, x in ((beta1, G), (beta2, G**2)))
        return (beta1 * M + (1 - beta1) / (1 - beta1**t) * G[t - 1]) / V.sqrt()

    larger = [[10 * x for x in step] for step in gradients]
    for exponents in EXPONENTS:
        grafted = variant("adam", exponents, block_size=7, precondition_frequency=2)  # the mean of two steps
        assert step_length(grafted, gradients) == pytest.approx((adam(10).norm() + adam(11).norm()).item() / 2, rel=1e-5)
        bare = variant("none", exponents, block_size=7, epsilon=1e-12)
        scale = step_length(bare, larger) / step_length(bare, gradients)
        assert scale == pytest.approx(10 ** (1 - 2 * sum(exponents)), rel=1e-4)


def test_the_table_of_exponents_has_the_ladder_and_the_other_seeds():
    def trial(seed, rate, steps):
        point = {"grafting": "none", "exponents": [0.5, 0.0], "learning_rate": rate}
        return {"workload": "w", "seed": seed, "point": point, "steps": steps, "best": 0.98765}

    table = tabulate(pd.DataFrame([trial(1, 0.1, 90.0), trial(1, 0.3, np.inf), trial(2, 0.1, 80.0), trial(3, 0.1, np.inf)]))
    assert table.loc["w", "none", "0.5, 0"].to_list() == ["0.1: 90; 0.3: - (0.988)", "0.1", "80", "- (0.988)"]
