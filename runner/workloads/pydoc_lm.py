"""pydoc_lm, the laptop twin of wmt and finewebedu_lm: a small Transformer on the characters of Python's help topics.

The target is in nats per character, set by `experiments.sensitivity`. For comparison: interpolated n-gram models that see the
last 1, 2, 3, and 4 characters have 2.53, 1.86, 1.43, and 1.29 (test: 2.56, 1.89, 1.52, and 1.42).
"""

import json
import lzma

import torch
import torch.nn.functional as F
from algoperf import spec
from torch import Tensor, nn

from ..data import workload_file
from .base import LaptopWorkload, Split
from .layers import TransformerLayer

CONTEXT = 64
# Many topics repeat passages of others; these share no 60 characters in a row with a topic of another split. About 5% each.
VALIDATION_TOPICS = ("binary", "dynamic-features", "exceptions", "execmodel", "naming", "nonlocal")
TEST_TOPICS = ("assignment", "augassign", "import", "slicings")


def load_topics() -> dict[str, str]:
    """Return the help topics of CPython 3.11.7 by name; 465,000 characters, 103 distinct."""
    path = workload_file("pydoc_topics.json.xz", "adadcd5c56f9a089a292d3aac03926662f9288ca8bb7d5f8ac61f11ef416bbdd")
    topics: dict[str, str] = json.loads(lzma.decompress(path.read_bytes()))
    return topics


def windows(text: str, alphabet: str) -> Split:
    """Return disjoint windows as {"inputs": (N, CONTEXT), "targets": (N, CONTEXT)}; targets are one character ahead."""
    index = {character: i for i, character in enumerate(alphabet)}
    codes = torch.tensor([index[character] for character in text])
    size = (len(codes) - 1) // CONTEXT * CONTEXT
    return {"inputs": codes[:size].view(-1, CONTEXT), "targets": codes[1 : size + 1].view(-1, CONTEXT)}


class Decoder(nn.Module):
    """A causal Transformer with two layers of width 64 and learned positions; 117k parameters."""

    def __init__(self, symbols: int, width: int = 64, layers: int = 2, heads: int = 4):
        super().__init__()
        self.characters, self.positions = nn.Embedding(symbols, width), nn.Embedding(CONTEXT, width)
        self.layers = nn.Sequential(*(TransformerLayer(width, heads, mlp_ratio=4, causal=True) for _ in range(layers)))
        self.norm, self.output = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, codes: Tensor) -> Tensor:  # (B, T) -> (B, T, symbols)
        indices = torch.arange(codes.shape[1], device=codes.device)
        logits: Tensor = self.output(self.norm(self.layers(self.characters(codes) + self.positions(indices))))
        return logits


class PydocLM(LaptopWorkload):
    """Predict the next character: cross entropy in nats per character."""

    loss_type = spec.LossType.SOFTMAX_CROSS_ENTROPY
    target_metric_name = "loss"
    higher_is_better = False
    validation_target_value = 1.684
    default_batch_size = 32
    step_hint = 500

    def load_splits(self) -> dict[str, Split]:
        topics = load_topics()
        alphabet = "".join(sorted(set("".join(topics.values()))))
        self.symbols = len(alphabet)
        held_out = {"validation": VALIDATION_TOPICS, "test": TEST_TOPICS}
        train = sorted(topics.keys() - {*VALIDATION_TOPICS, *TEST_TOPICS})
        splits = {"train": windows("".join(topics[name] for name in train), alphabet)}
        splits |= {split: windows("".join(topics[name] for name in names), alphabet) for split, names in held_out.items()}
        splits["eval_train"] = {key: x[: len(splits["validation"][key])] for key, x in splits["train"].items()}
        return splits

    def build_model(self) -> nn.Module:
        return Decoder(self.symbols)

    def per_example_loss(self, logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=label_smoothing)
        return losses.view(targets.shape).mean(dim=1)

    def metric_sums(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": self.per_example_loss(logits, targets, 0.0).sum()}
