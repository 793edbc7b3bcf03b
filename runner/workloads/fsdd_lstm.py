"""fsdd_lstm, the laptop twin of librispeech_deepspeech: a bidirectional LSTM with batch norm on sentences of spoken digits.

Targets, set by `experiments.targets`, are word error rates.
"""

import torch
from torch import Tensor, nn

from .fsdd import SYMBOLS, Fsdd, Padded, Subsampling, lengths


def reverse(x: Tensor, paddings: Tensor) -> Tensor:
    """(B, T, C) with the valid frames of each row in reverse order; what is padding stays in its place."""
    places = torch.arange(x.shape[1], device=x.device)
    mirrored = lengths(paddings)[:, None] - 1 - places
    return x.take_along_dim(mirrored.where(mirrored >= 0, places)[..., None], dim=1)


class LSTMLayer(nn.Module):
    """bn(lstm(x)) in both directions: (B, T, width) -> (B, T, 2 units)."""

    def __init__(self, width: int, units: int):
        super().__init__()
        # Not one bidirectional LSTM: packed sequences, which keep it from padding, make a step on a CPU five times as long.
        self.forwards, self.backwards = nn.LSTM(width, units, batch_first=True), nn.LSTM(width, units, batch_first=True)
        self.bn = nn.BatchNorm1d(2 * units)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, paddings: Tensor) -> Tensor:
        ahead, _ = self.forwards(x)
        back, _ = self.backwards(reverse(x, paddings))
        y = torch.cat([ahead, reverse(back, paddings)], dim=-1)
        valid = paddings == 0  # batch norm sees no padding
        y[valid] = self.bn(y[valid])
        return self.dropout(y)


class DeepSpeech(nn.Module):
    """Two LSTM layers of 64 units in each direction behind a strided convolution; 173k parameters."""

    def __init__(self, width: int = 64, units: int = 64, layers: int = 2):
        super().__init__()
        self.subsampling = Subsampling(width)
        self.layers = nn.ModuleList(LSTMLayer(2 * units if i else width, units) for i in range(layers))
        self.output = nn.Linear(2 * units, len(SYMBOLS))

    def forward(self, inputs: Padded) -> Padded:  # (B, T, 13) and paddings -> (B, L/2, symbols) and paddings
        x, paddings = self.subsampling(*inputs)
        for layer in self.layers:
            x = layer(x, paddings)
        return self.output(x), paddings


class FsddLSTM(Fsdd):
    """Word error rate of spoken digits, CTC loss."""

    validation_target_value = 0.0534
    test_target_value = 0.0517

    def build_model(self) -> nn.Module:
        return DeepSpeech()
