import pytest
import torch

from experiments.exponents import EXPONENTS, LADDERS, entries, step_length, variant


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


def test_every_variant_has_a_ladder_of_learning_rates(tmp_path):
    found = entries("mnist_vit", ["adam"], tmp_path)
    assert [len(entry.points) for entry in found] == [len(LADDERS["adam"])] * len(EXPONENTS)
    assert {entry.name for entry in found} >= {"adam_0.25_0.25", "adam_0.5_0.0"}
    assert [point["learning_rate"] for point in found[0].points] == [0.0035, 0.007, 0.014]
