"""Compare optimizers at their defaults on three models that nothing was tuned for: `python -m experiments.out_of_the_box`.

Each optimizer runs with all options at their defaults, at a constant learning rate of 0.3, 1, and 3 times its default one, or
for ours, which replaces AdamW, AdamW's. The models, each trained on three seeds:

    gpt       a causal Transformer with 3 layers of width 96 on the bytes of Python's standard library, 300 steps
    resnet    a ResNet-8 with batch norm on MNIST-5k at half the resolution, 250 steps
    mlp       an MLP with two hidden layers of 128 on flights from New York, late or not, 300 steps

Print the mean validation loss, in nats, of each. SOAP is pytorch_optimizer's; Muon is torch's, with AdamW for parameters that
are not matrices.
"""

import itertools
import statistics
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from absl import app, flags
from torch import Tensor, nn
from torch.optim import Optimizer

from runner.workloads.flights_dlrm import CATEGORIES, NUMBERS, load_flights
from runner.workloads.layers import TransformerLayer
from runner.workloads.mnist import load_mnist
from runner.workloads.mnist_resnet import ResNet8
from shampoo import AdamWShampoo

CONTEXT = 64
MULTIPLES = (0.3, 1.0, 3.0)  # of the learning rate
FLAGS = flags.FLAGS


class Task(NamedTuple):
    """A model and its data: train and validation are inputs and targets."""

    build: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    steps: int
    batch_size: int


class GPT(nn.Module):
    """A causal Transformer on bytes with learned positions."""

    def __init__(self, width: int = 96, layers: int = 3, heads: int = 4):
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.layers = nn.Sequential(*(TransformerLayer(width, heads, mlp_ratio=4, causal=True) for _ in range(layers)))
        self.norm, self.output = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, codes: Tensor) -> Tensor:  # (B, CONTEXT) -> (B, 256, CONTEXT)
        x = self.bytes(codes) + self.positions.weight
        logits: Tensor = self.output(self.norm(self.layers(x)))
        return logits.mT


def text_task() -> Task:
    """Return the task of predicting the next byte of Python's own modules; every tenth one is for validation."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))

    def windows(chosen: list[Path]) -> tuple[Tensor, Tensor]:
        codes = torch.tensor(np.frombuffer(b"".join(file.read_bytes() for file in chosen), np.uint8)).long()
        size = (len(codes) - 1) // CONTEXT * CONTEXT
        return codes[:size].view(-1, CONTEXT), codes[1 : size + 1].view(-1, CONTEXT)

    inputs, targets = windows(files[::10])
    return Task(GPT, windows([file for i, file in enumerate(files) if i % 10]), (inputs[::8], targets[::8]), 300, 16)


def image_task() -> Task:
    """Return the task of classifying digits."""
    splits = load_mnist()
    data = {name: (F.avg_pool2d(split["inputs"].float(), 2), split["targets"]) for name, split in splits.items()}
    return Task(ResNet8, data["train"], data["validation"], 250, 64)


def table_task() -> Task:
    """Return the task of predicting which flights are late, from standardized numbers and categories as one-hot vectors."""
    tables = load_flights()
    kept = [name for name in CATEGORIES if name not in ("tailnum", "dest")]
    columns = pd.concat(tables)
    numbers = ((columns[NUMBERS] - columns[NUMBERS].mean()) / columns[NUMBERS].std()).fillna(0.0)
    inputs = numbers.join(pd.get_dummies(columns[kept].astype(str)))
    data = {
        name: (torch.tensor(inputs.loc[name].to_numpy(dtype=np.float32)), torch.tensor(table["late"].to_numpy()).long())
        for name, table in tables.items()
    }

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Linear(inputs.shape[1], 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2)
        )  # fmt: skip

    return Task(build, data["train"], data["validation"], 300, 256)


class Both(Optimizer):
    """Two optimizers as one."""

    def __init__(self, *optimizers: Optimizer):
        self.optimizers = optimizers
        super().__init__([p for each in optimizers for group in each.param_groups for p in group["params"]], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step of each."""
        for optimizer in self.optimizers:
            optimizer.step()


def muon(params: list[nn.Parameter], multiple: float) -> Optimizer:
    """Return Muon for matrices and AdamW for other parameters."""
    matrices = torch.optim.Muon([p for p in params if p.ndim == 2], lr=1e-3 * multiple)
    return Both(matrices, torch.optim.AdamW([p for p in params if p.ndim != 2], lr=1e-3 * multiple))


def soap(params: list[nn.Parameter], multiple: float) -> Optimizer:
    """Return pytorch_optimizer's SOAP."""
    from pytorch_optimizer import SOAP

    return SOAP(params, lr=3e-3 * multiple)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], float], Optimizer]] = {
    "adamw": lambda params, multiple: torch.optim.AdamW(params, lr=1e-3 * multiple),
    "shampoo": lambda params, multiple: AdamWShampoo(params, lr=1e-3 * multiple),
    "soap": soap,
    "muon": muon,
}
TASKS = {"gpt": text_task, "resnet": image_task, "mlp": table_task}


def batches(task: Task, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of one random order after another."""
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = task.train
    while True:
        for rows in torch.randperm(len(inputs), generator=generator).split(task.batch_size)[:-1]:
            yield inputs[rows], targets[rows]


def validation_loss(task: Task, make: Callable[[list[nn.Parameter], float], Optimizer], multiple: float, seed: int) -> float:
    """Train, and return the mean validation loss."""
    torch.manual_seed(seed)
    model = task.build()
    optimizer = make(list(model.parameters()), multiple)
    for inputs, targets in itertools.islice(batches(task, seed), task.steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        parts = zip(*(x.split(1000) for x in task.validation), strict=True)
        losses = [F.cross_entropy(model(inputs), targets, reduction="sum").item() for inputs, targets in parts]
    return sum(losses) / task.validation[1].numel()


def main(_: Any) -> None:
    """Print a row per model and optimizer."""
    torch.set_num_threads(1)
    rows = []
    for name in FLAGS.models:
        task = TASKS[name]()
        for optimizer in FLAGS.optimizers:
            means = [
                statistics.mean(validation_loss(task, OPTIMIZERS[optimizer], multiple, seed) for seed in range(FLAGS.seeds))
                for multiple in MULTIPLES
            ]
            columns = zip(map("lr x {:g}".format, MULTIPLES), means, strict=True)
            rows.append({"model": name, "optimizer": optimizer, **dict(columns), "best": min(means)})
            print(pd.DataFrame(rows[-1:]).round(4).to_string(index=False, header=len(rows) == 1), flush=True)
    table = pd.DataFrame(rows)
    print(
        f"\nmean over models and learning rates\n{table.groupby('optimizer')[[*table.columns[2:]]].mean().round(4).to_string()}"
    )


if __name__ == "__main__":
    flags.DEFINE_list("models", list(TASKS), "models to train")
    flags.DEFINE_list("optimizers", list(OPTIMIZERS), "optimizers to run")
    flags.DEFINE_integer("seeds", 3, "number of seeds")
    app.run(main)
