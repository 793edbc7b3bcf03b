"""mnist_unet, the laptop twin of fastmri: a U-Net that restores images of MNIST from a quarter of their k-space columns.

The target is a structural similarity, set by `experiments.sensitivity`. Zero-filled images have about 0.42.
"""

import numpy as np
import torch
import torch.nn.functional as F
from algoperf import spec
from torch import Tensor, nn

from .base import LaptopWorkload, Split, rows
from .mnist import load_mnist

SIZE = 24  # pixels per side: MNIST without its margin
ACCELERATION, CENTER = 4, 0.08  # one in 4 columns is measured, always including the central 8% of all columns
WINDOW = 7  # pixels per side, for structural similarity


def undersampled(images: Tensor, draw: np.random.Generator) -> Tensor:
    """Return zero-filled reconstructions (N, 1, SIZE, SIZE) of images from random columns of k-space, drawn for each image."""
    columns, center = SIZE // ACCELERATION, round(CENTER * SIZE)
    priority = draw.random((len(images), SIZE))
    first = (SIZE - center) // 2
    priority[:, first : first + center] = 2.0
    kept = torch.from_numpy(np.argsort(np.argsort(-priority)) < columns)[:, None, None, :].to(images.device)
    k_space = torch.fft.fftshift(torch.fft.fft2(images), dim=(-2, -1))
    reconstructed: Tensor = torch.fft.ifft2(torch.fft.ifftshift(k_space * kept, dim=(-2, -1))).abs()
    return reconstructed


def structural_similarity(X: Tensor, Y: Tensor) -> Tensor:
    """Return the mean structural similarity (N,) of images (N, 1, H, W) in [0, 1] over 7x7 windows (Wang et al. 2004)."""
    c1, c2 = 0.01**2, 0.03**2
    mean = torch.nn.AvgPool2d(WINDOW, stride=1)
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    mx, my = mean(X), mean(Y)
    vx, vy = unbiased * (mean(X * X) - mx * mx), unbiased * (mean(Y * Y) - my * my)
    covariance = unbiased * (mean(X * Y) - mx * my)
    similarity: Tensor = (2 * mx * my + c1) * (2 * covariance + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return similarity.mean(dim=(1, 2, 3))


def double_convolution(channels_in: int, channels: int) -> nn.Sequential:
    """Return two layers, each 3x3 convolution, instance norm, leaky ReLU, and dropout."""
    layers: list[nn.Module] = []
    for inputs in (channels_in, channels):
        layers += [nn.Conv2d(inputs, channels, 3, padding=1, bias=False), nn.InstanceNorm2d(channels)]
        layers += [nn.LeakyReLU(0.2), nn.Dropout(0.0)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """A U-Net with 8, 16, and 32 channels at three resolutions, whose output is added to its input; 29k parameters."""

    def __init__(self, channels: int = 8):
        super().__init__()
        c = channels
        self.down1, self.down2, self.bottom = (
            double_convolution(1, c),
            double_convolution(c, 2 * c),
            double_convolution(2 * c, 4 * c),
        )
        self.up2, self.up1 = nn.ConvTranspose2d(4 * c, 2 * c, 2, stride=2), nn.ConvTranspose2d(2 * c, c, 2, stride=2)
        self.merge2, self.merge1 = double_convolution(4 * c, 2 * c), double_convolution(2 * c, c)
        self.output = nn.Conv2d(c, 1, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, 1, SIZE, SIZE) -> (B, 1, SIZE, SIZE)
        first = self.down1(x)
        second = self.down2(F.avg_pool2d(first, 2))
        y = self.up2(self.bottom(F.avg_pool2d(second, 2)))
        y = self.up1(self.merge2(torch.cat([y, second], dim=1)))
        correction: Tensor = self.output(self.merge1(torch.cat([y, first], dim=1)))
        return x + correction


class MnistUNet(LaptopWorkload):
    """Restore undersampled images: structural similarity, mean absolute error."""

    loss_type = spec.LossType.MEAN_ABSOLUTE_ERROR
    target_metric_name = "ssim"
    higher_is_better = True
    validation_target_value = 0.788
    default_batch_size = 32
    eval_batch_size = 50
    step_hint = 450

    def load_splits(self) -> dict[str, Split]:
        splits = {}
        for seed, (name, digits) in enumerate(load_mnist().items()):
            images = F.pad(digits["inputs"].float(), [(SIZE - 28) // 2] * 4)
            splits[name] = {"inputs": undersampled(images, np.random.default_rng(seed)), "targets": images}
        splits["validation"] = rows(splits["validation"], slice(None, None, 2))  # of 1,250 images, whose similarity takes long
        splits["eval_train"] = rows(splits["train"], slice(150))
        return splits

    def augment(self, batch: Split, draw: np.random.Generator) -> Split:
        """Draw new columns of k-space, as fastMRI does at every step."""
        return {**batch, "inputs": undersampled(batch["targets"], draw)}

    def build_model(self) -> nn.Module:
        return UNet()

    def per_example_loss(self, logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        return (logits - targets).abs().mean(dim=(1, 2, 3))

    def metric_sums(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {
            "ssim": structural_similarity(logits, targets).sum(),
            "loss": self.per_example_loss(logits, targets, 0.0).sum(),
        }
