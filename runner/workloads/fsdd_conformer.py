"""fsdd_conformer, the laptop twin of librispeech_conformer: attention and convolution on sentences of spoken digits.

The target is a CTC loss in nats per example, set by `experiments.sensitivity`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .fsdd import SYMBOLS, Fsdd, Padded, Subsampling


def unpack(frames: Tensor, valid: Tensor) -> Tensor:
    """Scatter frames (valid frames, C) to (B, T, C) where `valid` (B, T) is True, with zeros elsewhere."""
    x = frames.new_zeros(*valid.shape, frames.shape[-1])
    x[valid] = frames
    return x


class FeedForward(nn.Module):
    """down(silu(up(norm(x))))."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(self.down(F.silu(self.up(self.norm(x)))))
        return y


class Attention(nn.Module):
    """out(attention(qkv(norm(x)))), where each frame attends to the valid frames of its example."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        q, k, v = (
            z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in unpack(self.qkv(self.norm(x)), valid).chunk(3, dim=-1)
        )
        attention = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None]).transpose(1, 2).flatten(2)
        y: Tensor = self.dropout(self.out(attention[valid]))
        return y


class Convolution(nn.Module):
    """contract(silu(bn(depthwise(glu(expand(norm(x)))))))."""

    def __init__(self, width: int, window: int):
        super().__init__()
        self.norm, self.expand, self.contract = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.depthwise = nn.Conv1d(width, width, window, padding="same", groups=width, bias=False)
        self.bn = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        y = unpack(F.glu(self.expand(self.norm(x)), dim=-1), valid)
        y = self.depthwise(y.mT).mT[valid]
        contracted: Tensor = self.dropout(self.contract(F.silu(self.bn(y))))
        return contracted


class ConformerBlock(nn.Module):
    """Half a feed-forward, attention, convolution, and half a feed-forward, each added to its input, then layer norm."""

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.before, self.after = FeedForward(width), FeedForward(width)
        self.attention, self.convolution = Attention(width, heads), Convolution(width, window)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        x = x + self.before(x) / 2
        x = x + self.attention(x, valid)
        x = x + self.convolution(x, valid)
        y: Tensor = self.norm(x + self.after(x) / 2)
        return y


class Conformer(nn.Module):
    """A strided convolution, then two blocks of width 64; positions are known from convolutions alone. 132k parameters.

    Only attention and convolution use padded examples, (B, T, width). Everything else runs on the valid frames alone,
    (valid frames, width), which is cheaper and keeps padding out of batch norm.
    """

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 2, window: int = 7):
        super().__init__()
        self.subsampling = Subsampling(width)
        self.blocks = nn.ModuleList(ConformerBlock(width, heads, window) for _ in range(layers))
        self.output = nn.Linear(width, len(SYMBOLS))

    def forward(self, inputs: Padded) -> Padded:  # (B, T, 13) and paddings -> (B, L/2, symbols) and paddings
        x, paddings = self.subsampling(*inputs)
        valid = paddings == 0
        x = x[valid]
        for block in self.blocks:
            x = block(x, valid)
        return unpack(self.output(x), valid), paddings


class FsddConformer(Fsdd):
    """Spoken digits with a Conformer."""

    validation_target_value = 1.168

    def build_model(self) -> nn.Module:
        return Conformer()
