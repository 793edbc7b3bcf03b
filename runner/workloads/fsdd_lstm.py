"""fsdd_lstm, the laptop twin of librispeech_deepspeech: a bidirectional LSTM with batch norm on sentences of spoken digits.

The target is a CTC loss in nats per example, set by `experiments.sensitivity`.
"""

import torch
from torch import Tensor, nn

from .fsdd import SYMBOLS, Fsdd, Padded, Subsampling, lengths


def reverse(x: Tensor, paddings: Tensor) -> Tensor:
    """Reverse the valid frames of each row of x (B, T, C); padding stays in place."""
    indices = torch.arange(x.shape[1], device=x.device)
    mirrored = lengths(paddings)[:, None] - 1 - indices
    return x.take_along_dim(mirrored.where(mirrored >= 0, indices)[..., None], dim=1)


class LSTMLayer(nn.Module):
    """bn(lstm(x)) in both directions: (B, T, width) -> (B, T, 2 * units)."""

    def __init__(self, width: int, units: int):
        super().__init__()
        # A bidirectional LSTM would need packed sequences to skip padding, which makes a step five times as slow on a CPU.
        self.forwards, self.backwards = nn.LSTM(width, units, batch_first=True), nn.LSTM(width, units, batch_first=True)
        self.bn = nn.BatchNorm1d(2 * units)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, paddings: Tensor) -> Tensor:
        ahead, _ = self.forwards(x)
        back, _ = self.backwards(reverse(x, paddings))
        both = torch.cat([ahead, reverse(back, paddings)], dim=-1)
        valid = paddings == 0  # keep padding out of batch norm
        both[valid] = self.bn(both[valid])
        y: Tensor = self.dropout(both)
        return y


class DeepSpeech(nn.Module):
    """A strided convolution, then two LSTM layers with 64 units in each direction; 173k parameters."""

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
    """Spoken digits with LSTMs."""

    validation_target_value = 1.024

    def build_model(self) -> nn.Module:
        return DeepSpeech()
