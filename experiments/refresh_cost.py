"""Time refreshes of the roots in real training: `python -m experiments.refresh_cost`; ten minutes.

Train a Transformer with imagenet_vit's layer sizes on MNIST, with exact roots. At each step, all other optimizers apply the
same gradients to their own copies of the weights. Columns, for each refresh and optimizer:

    s            seconds that the refresh adds to an ordinary step
    ratio        the same over that of exact roots
    all steps    seconds of all steps since the last refresh over those with exact roots

`solver="qr"` is the cheaper the less the eigenvectors rotate between refreshes. The independent gradients of
`experiments.step_time` cannot show that.
"""

import time
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from absl import app, flags
from torch import Tensor, nn

from runner.workloads.mnist import load_mnist
from shampoo.schedule import warmup_cosine

from .step_time import OPTIMIZERS

FLAGS = flags.FLAGS

EXACT = "shampoo"


class Transformer(nn.Module):
    """12 layers of width 384 over the 16 patches of an image; 21 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 384, 7, stride=7)
        layer = nn.TransformerEncoderLayer(384, 6, 1536, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 12, norm=nn.LayerNorm(384), enable_nested_tensor=False)
        self.positions, self.output = nn.Parameter(0.02 * torch.randn(16, 384)), nn.Linear(384, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of shape (B, 10)."""
        logits: Tensor = self.output(self.layers(self.patches(images).flatten(2).mT + self.positions).mean(dim=1))
        return logits


def train(names: list[str], steps: int, frequency: int) -> pd.DataFrame:
    """Train with the first optimizer and return the seconds of each step, one column per optimizer."""
    torch.manual_seed(0)
    model, data = Transformer(), load_mnist()["train"]
    weights = {name: [nn.Parameter(p.detach().clone()) for p in model.parameters()] for name in names[1:]}
    weights[names[0]] = list(model.parameters())
    optimizers = {name: OPTIMIZERS[name](weights[name], frequency, 1024) for name in names}
    scheduler = warmup_cosine(optimizers[names[0]], 10 * steps, steps // 2)
    rows = []
    for t in range(1, steps + 1):
        batch = torch.randint(len(data["targets"]), (32,))
        model.zero_grad()
        loss = F.cross_entropy(model(data["inputs"][batch].float()), data["targets"][batch].long())
        loss.backward()
        for name in names[1:]:
            for W, p in zip(weights[name], model.parameters(), strict=True):
                W.grad = p.grad
        row: dict[str, Any] = {}
        for name in names:
            start = time.perf_counter()
            optimizers[name].step()
            row[name] = time.perf_counter() - start
        scheduler.step()
        rows.append(row)
        if t % frequency == 0:
            print(f"step {t}: loss {loss.item():.3f}", flush=True)
    return pd.DataFrame(rows, index=range(1, steps + 1))


def summary(seconds: pd.DataFrame, frequency: int) -> pd.DataFrame:
    """Return one row per refresh, from the second one on."""
    rows = {}
    for t in range(2 * frequency, len(seconds) + 1, frequency):
        since = seconds.loc[t - frequency + 1 : t]
        added, total = since.loc[t] - since.iloc[:-1].median(), since.sum()
        rows[t] = {f"{name}, s": added[name] for name in seconds}
        rows[t] |= {f"{name}, ratio": added[name] / added[EXACT] for name in seconds if name != EXACT}
        rows[t] |= {f"{name}, all steps": total[name] / total[EXACT] for name in seconds if name != EXACT}
    return pd.DataFrame(rows).T


def main(_: Any) -> None:
    """Train and print the table."""
    torch.set_num_threads(FLAGS.threads)
    print(summary(train(FLAGS.optimizer, FLAGS.steps, FLAGS.frequency), FLAGS.frequency).round(2).to_string())


if __name__ == "__main__":
    flags.DEFINE_multi_enum("optimizer", [EXACT, "shampoo, qr"], list(OPTIMIZERS), f"optimizers to time, {EXACT!r} first")
    flags.DEFINE_integer("steps", 100, "training steps", lower_bound=1)
    flags.DEFINE_integer("frequency", 10, "precondition_frequency", lower_bound=2)
    flags.DEFINE_integer("threads", 2, "number of CPU threads", lower_bound=1)
    app.run(main)
