"""A workload that takes milliseconds: fit a random linear function of eight numbers."""

import torch
from algoperf import spec
from torch import nn

from runner.workloads.base import LaptopWorkload


class Toy(LaptopWorkload):
    """Mean squared error of a linear model."""

    loss_type = spec.LossType.MEAN_SQUARED_ERROR
    target_metric_name = "loss"
    higher_is_better = False
    validation_target_value = 0.05
    default_batch_size = 16
    step_hint = 60

    def load_splits(self):
        draw = torch.Generator().manual_seed(0)
        X, w = torch.randn(400, 8, generator=draw), torch.randn(8, generator=draw)
        examples = {"inputs": X, "targets": X @ w}
        chosen = {"train": slice(200), "eval_train": slice(50), "validation": slice(200, 300), "test": slice(300, 400)}
        return {name: {key: x[part] for key, x in examples.items()} for name, part in chosen.items()}

    def build_model(self):
        return nn.Sequential(nn.Linear(8, 1), nn.Flatten(0))

    def per_example_loss(self, logits, targets, label_smoothing):
        return (logits - targets) ** 2

    def metric_sums(self, logits, targets):
        return {"loss": self.per_example_loss(logits, targets, 0.0).sum()}
