"""The paper's condition on norms, by the width of a model: `python -m experiments.paper.widths --output_dir=DIR`; 7 minutes.

Train the vision Transformer of mnist_vit at several widths w, on ten seeds, with `AdamWShampoo`, whose learning rate is in
proportion to 1 / w. Every few steps, compute the ratio ||G||_* / (sqrt(min(m, n)) ||G||_F) for the matrices of its layers, all
with min(m, n) = w, both for the batch gradient that the optimizer sees and for the gradient over a larger, fixed batch. For
each kind of matrix, the slope of log ratio against log w is 0 if ||G||_* = Theta(sqrt(min(m, n))) ||G||_F, and -1/2 at a fixed
rank.

Write steps.csv, from which the same command resumes, widths.csv, and widths.png to DIR, and print the table.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
import torch
from absl import app, flags
from torch import Tensor, nn

from runner.workloads import load_workload
from runner.workloads.base import Split
from runner.workloads.mnist_vit import VisionTransformer
from shampoo import AdamWShampoo
from shampoo.diagnostics import gradient_figures
from shampoo.schedule import warmup_cosine

from .problems import SEEDS, fit_slope, format_fit, measure

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FLAGS = flags.FLAGS

WIDTHS = (32, 64, 128, 256)
STEPS, EVERY = 200, 40
BATCH, LARGE = 32, 256  # examples
RATE = 0.007 * 64  # learning rate times width
KINDS = ("qkv", "out", "up", "down")  # (3 w, w), (w, w), (2 w, w), (w, 2 w)
SOURCES = {"batch": f"batch of {BATCH}", "large": f"batch of {LARGE}"}


class Cell(NamedTuple):
    """One training run."""

    width: int
    seed: int


def kind(name: str) -> str | None:
    """Return the kind of a parameter, or None if it is no matrix of a layer."""
    *_, module, tensor = name.split(".")
    return module if module in KINDS and tensor == "weight" else None


def mean_loss(workload: Any, model: nn.Module, batch: Split) -> Tensor:
    """Return the mean training loss of a batch."""
    loss: Tensor = workload.per_example_loss(model(batch["inputs"]), batch["targets"], 0.0).mean()
    return loss


def run(width: int, seed: int) -> pd.DataFrame:
    """Return one row per measured step and matrix: its kind, m, n, and ratios; and the loss of the large batch."""
    workload = load_workload("mnist_vit")
    torch.manual_seed(seed)
    model = VisionTransformer(width)
    optimizer = AdamWShampoo(model.parameters(), RATE / width)
    scheduler = warmup_cosine(optimizer, STEPS, STEPS // 20)
    large = next(workload._build_input_queue([1, seed], "train", "", LARGE))
    queue, rows = workload._build_input_queue([0, seed], "train", "", BATCH), []
    matrices = {name: W for name, W in model.named_parameters() if kind(name)}
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        mean_loss(workload, model, next(queue)).backward()
        if step % EVERY == 0:
            loss = mean_loss(workload, model, large)
            gradients = torch.autograd.grad(loss, list(matrices.values()))
            for (name, W), G in zip(matrices.items(), gradients, strict=True):
                row = {"step": step, "parameter": name, "kind": kind(name), "m": W.shape[0], "n": W.shape[1]}
                ratios = {source: figures(x) for source, x in zip(SOURCES, (W.grad, G), strict=True)}
                rows.append({**row, **ratios, "loss": loss.item()})
        optimizer.step()
        scheduler.step()
    return pd.DataFrame(rows)


def figures(G: Tensor | None) -> float:
    """Return the ratio of norms of a matrix."""
    assert G is not None
    return gradient_figures(G, tuple(G.shape))["nuclear_ratio"]


def by_kind(rows: pd.DataFrame, source: str) -> dict[str, pd.DataFrame]:
    """Return, per kind and for all, the ratio by seed (rows) and width (columns): the median over steps, then the geometric
    mean over matrices."""
    medians = rows.groupby(["kind", "width", "seed", "parameter"])[source].median().map(np.log)
    kinds = {name: medians.loc[name] for name in KINDS} | {"all": medians.droplevel("kind")}
    return {name: np.exp(x.groupby(["seed", "width"]).mean().unstack("width")) for name, x in kinds.items()}


def width_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row per source of the gradient and kind: the mean ratio at each width, and slopes of the log ratio over all
    steps, at the first and the last that were measured, and over all steps between the two largest widths."""
    first, last = (rows[rows["step"] == step] for step in (rows["step"].min(), rows["step"].max()))
    found = []
    for source, title in SOURCES.items():
        parts = {"all steps": rows, f"step {first['step'].iloc[0]}": first, f"step {last['step'].iloc[0]}": last}
        ratios = {part: by_kind(some, source) for part, some in parts.items()}
        for name, wide in ratios["all steps"].items():
            means = {f"w = {width}": value for width, value in wide.mean().items()}
            widths = wide.columns.to_numpy(dtype=float)
            slopes = {f"slope, {part}": format_fit(fit_slope(x[name].to_numpy(), widths)) for part, x in ratios.items()}
            end = format_fit(fit_slope(wide.to_numpy()[:, -2:], widths[-2:]))
            slopes[f"slope, {widths[-2]:.0f} to {widths[-1]:.0f}"] = end
            found.append({"gradient": title, "matrices": name, **means, **slopes})
    return pd.DataFrame(found)


def figure(rows: pd.DataFrame, path: Path) -> None:
    """Plot the ratio of each kind against the width, mean and standard deviation over seeds, a panel per source."""
    canvas, panels = plt.subplots(1, len(SOURCES), sharey=True, figsize=(11, 4.4), layout="constrained")
    for axes, (source, title) in zip(panels, SOURCES.items(), strict=True):
        for name, wide in by_kind(rows, source).items():
            style: dict[str, Any] = {"color": "black", "linewidth": 2} if name == "all" else {}
            deviations = wide.std()
            axes.errorbar(wide.columns, wide.mean(), deviations, fmt="-o", markersize=4, capsize=2, label=name, **style)
        ends = np.array([WIDTHS[0], WIDTHS[-1]], dtype=float)
        axes.plot(ends, [8 / (3 * np.pi)] * 2, "k--", linewidth=1, label="white noise")
        axes.plot(ends, ends**-0.5, "k:", label="rank one")
        axes.set(title=f"gradient over a {title}", xlabel="width w = min(m, n)", xscale="log", yscale="log")
        axes.set_xticks(WIDTHS, map(str, WIDTHS))
        axes.set_yticks(ticks := [0.05, 0.1, 0.2, 0.5, 1], map(str, ticks))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("||G||_* / (sqrt(w) ||G||_F)")
    canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    canvas.savefig(path, dpi=90)
    plt.close(canvas)


def main(_: Any) -> None:
    """Train the missing runs, and write the table and the figure."""
    output = Path(FLAGS.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    cells = [Cell(width, seed) for seed in range(SEEDS) for width in WIDTHS]
    rows = measure(cells, output / "steps.csv", run, FLAGS.max_workers)
    table = width_table(rows)
    table.to_csv(output / "widths.csv", index=False, float_format="%.4g")
    figure(rows, output / "widths.png")
    print(table.to_markdown(index=False, floatfmt=".3f"), "\n")
    print(rows.groupby(["width", "step"])["loss"].mean().unstack("width").to_markdown(floatfmt=".3f"))


if __name__ == "__main__":
    flags.DEFINE_integer("max_workers", os.cpu_count() or 1, "number of single-threaded processes", lower_bound=1)
    flags.DEFINE_string("output_dir", None, "folder for results; only missing cells run", required=True)
    app.run(main)
