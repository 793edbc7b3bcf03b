"""Train a Transformer of GPT-2's size beside AdamW, Muon, and SOAP: `python -m experiments.gpt --compile --minutes=8`.

The model has 124 million parameters and predicts the next token of the Python files of the interpreter's library and packages;
one of fifty files is for validation. All optimizers start from the same weights and get the same batches and schedule: warmup
for a tenth of the steps, then a cosine to a tenth of the learning rate. Matrices decay by 0.1, vectors do not. On a GPU, the
model runs in bfloat16; weights and optimizer states are float32.

Write a CSV with losses, in nats per token, over steps and seconds of training, which exclude validation, compilation, and
preparation of the text. In the table, "optimizer ms" is the median, and "mean" the mean, of every eleventh `optimizer.step`,
with the device idle before and after; that stride meets refreshes every 5 or 10 steps as often as they are. An optimizer that
has used its share of `--minutes` stops in mid-schedule: "ended" is then "clock", and its loss compares only over seconds.
"""

import gc
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import pandas as pd
import torch
import torch.nn.functional as F
from absl import app, flags
from torch import Tensor, nn
from torch.optim import Optimizer

from runner.workloads.layers import TransformerLayer
from shampoo import AdamWShampoo
from shampoo.schedule import cosine_shape, schedule

from .python_files import batches, epoch, read_texts, tokenize
from .step_time import milliseconds, synchronize

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FLAGS = flags.FLAGS

DECAY, BETAS = 0.1, (0.9, 0.95)
VALIDATION_BATCHES = 40
TIMED = 11  # every so many steps, the optimizer is timed


class GPT(nn.Module):
    """A causal Transformer with learned positions, and the embedding of tokens as its output layer."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.layers = nn.Sequential(*(TransformerLayer(width, heads, mlp_ratio=4, causal=True) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * layers) ** 0.5 if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, codes: Tensor, targets: Tensor) -> Tensor:  # (B, context) twice -> mean loss
        x = self.norm(self.layers(self.tokens(codes) + self.positions.weight))
        return F.cross_entropy(F.linear(x, self.tokens.weight).flatten(0, 1), targets.flatten())


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Return the matrices, which decay, and the other parameters, which do not."""
    matrices, others = ([p for p in params if (p.ndim >= 2) == wanted] for wanted in (True, False))
    return [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]


def adamw(params: list[nn.Parameter], lr: float) -> Optimizer:
    """Return torch's AdamW."""
    return torch.optim.AdamW(groups(params), lr, BETAS, fused=params[0].is_cuda)


def muon(model: GPT, lr: float) -> list[Optimizer]:
    """Return torch's Muon for the matrices of layers, and AdamW for embeddings and vectors."""
    inner = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is q for q in inner)]
    return [torch.optim.Muon(inner, lr, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"), adamw(others, lr)]


OPTIMIZERS: dict[str, Callable[[GPT, float], list[Optimizer]]] = {
    "adamw": lambda model, lr: [adamw(list(model.parameters()), lr)],
    "shampoo": lambda model, lr: [AdamWShampoo(groups(list(model.parameters())), lr)],
    "muon": muon,
    "soap": lambda model, lr: [import_module("pytorch_optimizer").SOAP(groups(list(model.parameters())), lr)],
    "shampoo_newton": lambda model, lr: [AdamWShampoo(groups(list(model.parameters())), lr, solver="newton")],
}


class Task(NamedTuple):
    """What all runs share: the model, its first weights, its (compiled) loss, and the data."""

    model: GPT
    first: dict[str, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    training: Tensor
    validation: list[tuple[Tensor, Tensor]]


def prepare(device: torch.device) -> Task:
    """Return the task, with the model compiled, if wanted, and run once."""
    texts = read_texts(FLAGS.folders, FLAGS.megabytes * 1e6, FLAGS.seed)
    training, held_out = (part.to(device) for part in tokenize(texts, FLAGS.vocabulary))
    print(f"{len(training):,} training tokens of {len(texts[0]):,} files, {len(held_out):,} validation tokens", flush=True)
    validation = list(islice(epoch(held_out, FLAGS.context, FLAGS.batch, FLAGS.seed), VALIDATION_BATCHES))
    torch.manual_seed(FLAGS.seed)
    model = GPT(FLAGS.vocabulary, FLAGS.context, FLAGS.width, FLAGS.layers, FLAGS.heads).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    call = torch.compile(model) if FLAGS.compile else model

    def loss(codes: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            result: Tensor = call(codes, targets)
        return result

    task = Task(model, {name: x.clone() for name, x in model.state_dict().items()}, loss, training, validation)
    loss(*validation[0]).backward()
    evaluate(task)
    return task


@torch.no_grad()
def evaluate(task: Task) -> float:
    """Return the mean validation loss."""
    return torch.stack([task.loss(*batch) for batch in task.validation]).mean().item()


def train(task: Task, name: str, lr: float, share: float) -> Iterator[dict[str, Any]]:
    """Train from the first weights for `share` seconds at most, and yield a row at each evaluation."""
    task.model.load_state_dict(task.first)
    device, began, seconds = task.training.device, time.perf_counter(), 0.0
    optimizers = OPTIMIZERS[name](task.model, lr)
    warmup = -(-FLAGS.steps // 10)
    schedulers = [schedule(x, FLAGS.steps, warmup, lambda s: 0.1 + 0.9 * cosine_shape(s), "zero") for x in optimizers]
    losses: list[Tensor] = []
    step_ms: list[float] = []
    yield {"optimizer": name, "step": 0, "seconds": 0.0, "train loss": float("nan"), "validation loss": evaluate(task)}
    start = time.perf_counter()
    for step, batch in enumerate(batches(task.training, FLAGS.context, FLAGS.batch, FLAGS.seed), 1):
        task.model.zero_grad()
        loss = task.loss(*batch)
        loss.backward()
        losses.append(loss.detach())
        if step % TIMED == 0:
            step_ms.append(milliseconds(lambda: [x.step() for x in optimizers], device))
        else:
            for optimizer in optimizers:
                optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        ended = "steps" if step == FLAGS.steps else "clock" if time.perf_counter() - began > share else ""
        if step % 10 == 0 or step % FLAGS.evaluate_every == 0 or ended:
            synchronize(device)  # so that the host runs at most 10 steps ahead of the clock
        if step % FLAGS.evaluate_every == 0 or ended:
            seconds += time.perf_counter() - start
            row = {"optimizer": name, "step": step, "seconds": seconds, "train loss": torch.stack(losses).mean().item()}
            yield row | {"validation loss": evaluate(task), "ended": ended, "step ms": step_ms}
            losses.clear()
            start = time.perf_counter()
        if ended:
            return


def summary(last: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the table row of a run from the row of its last evaluation."""
    step_ms = last["step ms"] or [float("nan")]
    return {
        "optimizer": last["optimizer"],
        "steps": last["step"],
        "tokens": f"{last['step'] * FLAGS.batch * FLAGS.context:,}",
        "validation loss": round(last["validation loss"], 4),
        "ended": last["ended"],
        "seconds": round(last["seconds"], 1),
        "ms per step": round(1e3 * last["seconds"] / last["step"], 1),
        "optimizer ms": round(statistics.median(step_ms), 2),
        "mean": round(statistics.mean(step_ms), 2),
        "peak GB": round(torch.cuda.max_memory_allocated(device) / 1e9, 2) if device.type == "cuda" else float("nan"),
    }


def draw(rows: pd.DataFrame, path: str) -> None:
    """Plot validation losses over steps and over seconds."""
    figure, both = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", sharey=True)
    for axes, x in zip(both, ("step", "seconds"), strict=True):
        for name, run in rows[rows["step"] > 0].groupby("optimizer"):
            axes.plot(run[x], run["validation loss"], marker=".", color=f"C{list(OPTIMIZERS).index(str(name))}", label=name)
        axes.set(xlabel={"step": "steps", "seconds": "seconds of training"}[x], ylabel="validation loss, nats per token")
        axes.grid(alpha=0.3)
    both[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def available(name: str) -> bool:
    """Return whether the optimizer is installed."""
    return {"soap": find_spec("pytorch_optimizer") is not None, "muon": hasattr(torch.optim, "Muon")}.get(name, True)


def main(_: Any) -> None:
    """Run the optimizers that are installed; after each, print the table and draw the plot again."""
    deadline = time.perf_counter() + 60 * FLAGS.minutes
    rates = dict.fromkeys(OPTIMIZERS, 1e-3) | {name: float(rate) for name, rate in (change.split("=") for change in FLAGS.lr)}
    if unknown := {*FLAGS.optimizers, *rates} - set(OPTIMIZERS):
        raise ValueError(f"--optimizers or --lr has {', '.join(sorted(unknown))}; known are {', '.join(OPTIMIZERS)}")
    names = [name for name in FLAGS.optimizers if available(name)]
    print(f"not installed: {', '.join(sorted(set(FLAGS.optimizers) - set(names))) or 'none'}", flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task, table, rows = prepare(device), [], []
    Path(FLAGS.output).parent.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        gc.collect()  # the last optimizer's state
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        for row in train(task, name, rates[name], (deadline - time.perf_counter()) / (len(names) - i)):
            rows.append(row)
            pd.DataFrame(rows).iloc[:, :5].to_csv(FLAGS.output, index=False)
            print("{optimizer} {step} {seconds:.1f} s: {train loss:.4f}, {validation loss:.4f}".format(**row), flush=True)
        table.append(summary(rows[-1], device))
        print(pd.DataFrame(table).to_string(index=False), flush=True)
        if FLAGS.plot:
            draw(pd.DataFrame(rows), FLAGS.plot)


if __name__ == "__main__":
    paths = [sysconfig.get_paths()["purelib"], sysconfig.get_paths()["stdlib"]]
    flags.DEFINE_list("folders", paths, "folders whose Python files are the text")
    flags.DEFINE_float("megabytes", 100.0, "size of the text")
    flags.DEFINE_list("optimizers", list(OPTIMIZERS)[:4], f"optimizers to run, in order, of {', '.join(OPTIMIZERS)}")
    flags.DEFINE_list("lr", [], "learning rates other than 1e-3, as in adamw=6e-4,soap=3e-3")
    flags.DEFINE_integer("layers", 12, "number of layers", lower_bound=1)
    flags.DEFINE_integer("width", 768, "width", lower_bound=1)
    flags.DEFINE_integer("heads", 12, "number of heads", lower_bound=1)
    flags.DEFINE_integer("context", 1024, "tokens per sequence", lower_bound=1)
    flags.DEFINE_integer("vocabulary", 50304, "number of tokens", lower_bound=257)
    flags.DEFINE_integer("batch", 32, "sequences per batch", lower_bound=1)
    flags.DEFINE_integer("steps", 400, "steps of each optimizer", lower_bound=1)
    flags.DEFINE_integer("evaluate_every", 50, "steps between evaluations", lower_bound=1)
    flags.DEFINE_float("minutes", 60.0, "the command ends about then: each optimizer gets an equal share of what is left")
    flags.DEFINE_integer("seed", 0, "seed of the order of files, weights, and batches")
    flags.DEFINE_bool("compile", False, "compile the model")
    flags.DEFINE_string("output", "experiments_out/gpt.csv", "CSV of losses")
    flags.DEFINE_string("plot", None, "PNG of losses")
    app.run(main)
