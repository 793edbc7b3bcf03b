"""What a refresh of the roots costs in real training: `python -m experiments.refresh_cost`; ten minutes.

A Transformer of imagenet_vit's sizes learns MNIST with exact roots. At each step all optimizers take the same gradients, the
others on weights of their own. Printed for each refresh: the seconds that it adds to an ordinary step, their ratio to those of
exact roots, and the ratio of all seconds since the last refresh. `solver="qr"` costs less the less eigenvectors turn, which
independent gradients, as `experiments.step_time` draws them, cannot show.
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
    """12 layers of width 384 over the 16 patches of an image: 21 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 384, 7, stride=7)
        layer = nn.TransformerEncoderLayer(384, 6, 1536, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 12, norm=nn.LayerNorm(384), enable_nested_tensor=False)
        self.places, self.output = nn.Parameter(0.02 * torch.randn(16, 384)), nn.Linear(384, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10)."""
        return self.output(self.layers(self.patches(images).flatten(2).mT + self.places).mean(dim=1))


def train(names: list[str], steps: int, frequency: int) -> pd.DataFrame:
    """Seconds of each step, a column for each optimizer; the first one's weights are trained."""
    torch.manual_seed(0)
    model, data = Transformer(), load_mnist()["train"]
    weights = {name: [nn.Parameter(p.detach().clone()) for p in model.parameters()] for name in names[1:]}
    weights[names[0]] = list(model.parameters())
    optimizers = {name: OPTIMIZERS[name](weights[name], frequency, 1024) for name in names}
    scheduler = warmup_cosine(optimizers[names[0]], 10 * steps, steps // 2)
    rows = []
    for t in range(1, steps + 1):
        chosen = torch.randint(len(data["targets"]), (32,))
        model.zero_grad()
        loss = F.cross_entropy(model(data["inputs"][chosen].float()), data["targets"][chosen].long())
        loss.backward()
        for name in names[1:]:
            for mine, p in zip(weights[name], model.parameters(), strict=True):
                mine.grad = p.grad
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
    """A row for each refresh."""
    rows = {}
    for t in range(2 * frequency, len(seconds) + 1, frequency):
        since = seconds.loc[t - frequency + 1 : t]
        added, total = since.loc[t] - since.iloc[:-1].median(), since.sum()
        rows[t] = {f"{name}, s": added[name] for name in seconds}
        rows[t] |= {f"{name}, ratio": added[name] / added[EXACT] for name in seconds if name != EXACT}
        rows[t] |= {f"{name}, all steps": total[name] / total[EXACT] for name in seconds if name != EXACT}
    return pd.DataFrame(rows).T


def main(_: Any) -> None:
    """Train and print."""
    torch.set_num_threads(FLAGS.threads)
    print(summary(train(FLAGS.optimizer, FLAGS.steps, FLAGS.frequency), FLAGS.frequency).round(2).to_string())


if __name__ == "__main__":
    flags.DEFINE_multi_enum("optimizer", [EXACT, "shampoo, qr"], list(OPTIMIZERS), f"which; {EXACT!r} first")
    flags.DEFINE_integer("steps", 100, "of training", lower_bound=1)
    flags.DEFINE_integer("frequency", 10, "steps between refreshes", lower_bound=2)
    flags.DEFINE_integer("threads", 2, "of the CPU", lower_bound=1)
    app.run(main)
