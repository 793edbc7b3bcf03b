"""Each optimizer at its defaults learns each model a little in a few steps."""

import math

import pytest
import torch

from experiments.out_of_the_box import OPTIMIZERS, TASKS, validation_loss

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon needs torch 2.9")


@pytest.mark.parametrize("optimizer", [pytest.param(name, marks=needs_muon if name == "muon" else ()) for name in OPTIMIZERS])
def test_it_learns(optimizer):
    task = TASKS["resnet"]()._replace(steps=40)
    losses = [validation_loss(task, OPTIMIZERS[optimizer], 3.0, seed) for seed in (0, 0)]
    assert losses[0] == losses[1] < math.log(10) - 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "chance"), [("gpt", math.log(256)), ("mlp", math.log(2))])
def test_other_models_learn_too(name, chance):
    assert validation_loss(TASKS[name]()._replace(steps=30), OPTIMIZERS["adamw"], 1.0, 0) < chance
