"""Layers shared by several models."""

import torch.nn.functional as F
from torch import Tensor, nn


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), (B, T, width) -> (B, T, width). If `causal`, mask later positions."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, mlp_ratio * width), nn.Linear(mlp_ratio * width, width)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, width)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(attention))
        mlp: Tensor = self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))
        return x + mlp
