import numpy as np
import pandas as pd
import pytest
import torch

from experiments.exponents import EXPONENTS, step_length, tabulate, variant


def test_steps_have_adams_length_with_grafting_and_scale_with_gradients_without():
    gradients = [[torch.randn(7, 5), torch.randn(9)] for _ in range(11)]
    point = variant("adam", (0.25, 0.25))
    G = torch.stack([torch.cat([x.flatten() for x in step]) for step in gradients]).double()

    def adam(t):  # with Nesterov momentum
        beta1, beta2, ages = 1 - point["one_minus_beta1"], 1 - point["one_minus_beta2"], torch.arange(t - 1, -1, -1).double()
        M, V = (((1 - beta) * beta**ages) @ x[:t] / (1 - beta**t) for beta, x in ((beta1, G), (beta2, G**2)))
        return (beta1 * M + (1 - beta1) / (1 - beta1**t) * G[t - 1]) / V.sqrt()

    larger = [[10 * x for x in step] for step in gradients]
    for exponents in EXPONENTS:
        grafted = variant("adam", exponents, block_size=7, precondition_frequency=2)  # step_length is the mean of two steps
        assert step_length(grafted, gradients) == pytest.approx((adam(10).norm() + adam(11).norm()).item() / 2, rel=1e-5)
        bare = variant("none", exponents, block_size=7, epsilon=1e-12)
        scale = step_length(bare, larger) / step_length(bare, gradients)
        assert scale == pytest.approx(10 ** (1 - 2 * sum(exponents)), rel=1e-4)


def test_the_table_has_all_learning_rates_and_the_other_seeds():
    def trial(seed, rate, steps):
        point = {"grafting": "none", "exponents": [0.5, 0.0], "learning_rate": rate}
        return {"workload": "w", "seed": seed, "point": point, "steps": steps, "best": 0.98765}

    table = tabulate(pd.DataFrame([trial(1, 0.1, 90.0), trial(1, 0.3, np.inf), trial(2, 0.1, 80.0), trial(3, 0.1, np.inf)]))
    assert table.loc["w", "none", "0.5, 0"].to_list() == ["0.1: 90; 0.3: - (0.988)", "0.1", "80", "- (0.988)"]
