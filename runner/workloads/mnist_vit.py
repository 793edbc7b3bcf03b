"""mnist_vit, the laptop twin of imagenet_vit: a vision Transformer over 7x7 patches of 5,000 images of MNIST.

The target is a cross entropy in nats, set by `experiments.sensitivity`. For comparison, accuracies: logistic regression 0.908,
one nearest neighbor 0.934.
"""

import torch
from torch import Tensor, nn

from .layers import TransformerLayer
from .mnist import MnistClassifier

PATCH = 7


class VisionTransformer(nn.Module):
    """Three layers of width 64 on 16 patches with learned positions, averaged and classified; 105k parameters."""

    def __init__(self, width: int = 64, layers: int = 3, heads: int = 4):
        super().__init__()
        self.patches = nn.Conv2d(1, width, PATCH, stride=PATCH)
        self.positions = nn.Embedding((28 // PATCH) ** 2, width)
        self.layers = nn.Sequential(*(TransformerLayer(width, heads, mlp_ratio=2, causal=False) for _ in range(layers)))
        self.norm, self.output = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:  # (B, 1, 28, 28) -> (B, 10)
        x = self.patches(images).flatten(2).mT  # (B, patches, width)
        indices = torch.arange(x.shape[1], device=x.device)
        logits: Tensor = self.output(self.norm(self.layers(x + self.positions(indices))).mean(dim=1))
        return logits


class MnistViT(MnistClassifier):
    """MNIST digits with a vision Transformer."""

    validation_target_value = 0.248
    default_batch_size = 128
    step_hint = 400

    def build_model(self) -> nn.Module:
        return VisionTransformer()
