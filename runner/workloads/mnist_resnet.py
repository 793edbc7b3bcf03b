"""mnist_resnet, the laptop twin of imagenet_resnet: a ResNet-8 with batch norm on 5,000 images of MNIST.

The target is a cross entropy in nats, set by `experiments.sensitivity`. For comparison, accuracies: logistic regression 0.908,
one nearest neighbor 0.934.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .mnist import MnistClassifier


class ResidualBlock(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + skip(x)); skip is a strided 1x1 convolution and batch norm if the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.skip: nn.Module = nn.Identity()
        if stride > 1:
            self.skip = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.skip(x))


class ResNet8(nn.Module):
    """A strided 3x3 convolution, then three residual blocks with 16, 32, and 64 channels; 78k parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(ResidualBlock(16, 16, 1), ResidualBlock(16, 32, 2), ResidualBlock(32, 64, 2))
        self.output = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.output(self.blocks(F.relu(self.bn(self.conv(x)))).mean(dim=(2, 3)))
        return logits


class MnistResNet(MnistClassifier):
    """MNIST digits with a ResNet."""

    validation_target_value = 0.06542
    step_hint = 500

    def build_model(self) -> nn.Module:
        return ResNet8()
