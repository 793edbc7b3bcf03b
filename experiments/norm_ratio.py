"""Measure whether gradients satisfy the paper's condition: `python -m experiments.norm_ratio --output_dir=DIR`; five minutes.

The paper's rate (arXiv 2601.07326) matches that of SGD if ||G||_* = Theta(sqrt(min(m, n))) ||G||_F. Train each laptop workload
with `submission.py` and compute the ratio ||G||_* / (sqrt(min(m, n)) ||G||_F) of each matrix every few steps, both for the
batch gradient that the optimizer sees and for the gradient over the split eval_train, which is closer to the paper's.

Write workloads.csv, layers.csv, norm_ratio.png, and steps.csv with all diagnostics to DIR, and TensorBoard events to
DIR/WORKLOAD/diagnostics.
"""

import collections
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from absl import app, flags
from algoperf import spec
from matplotlib.axes import Axes
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import submission
from runner.loop import Settings, run_trial
from runner.workloads import load_workload
from runner.workloads.base import LaptopWorkload
from shampoo import AdamWShampoo
from shampoo.blocks import merged_shape
from shampoo.diagnostics import gradient_figures, log_diagnostics, weights

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FLAGS = flags.FLAGS

ROOT = Path(__file__).resolve().parent.parent
SPACE = ROOT / "runner" / "tuning_search_space.json"
LEARNING_RATES = {  # at which Shampoo was fastest in the suite of early November 2026, which had airports, not flights
    "flights_dlrm": 0.014,
    "fsdd_conformer": 0.028,
    "fsdd_lstm": 0.014,
    "mnist_resnet": 0.007,
    "mnist_unet": 0.014,
    "mnist_vit": 0.007,
    "pydoc_lm": 0.028,
    "solubility_gnn": 0.014,
}
RATIOS = {"nuclear_ratio": "batch", "split_ratio": "eval_train"}  # column: source of the gradient


def with_diagnostics(every: int, writer: SummaryWriter, rows: list[dict[str, Any]]) -> Any:
    """Return `submission.py` with diagnostics: every `every` steps, log them and append one row per parameter to `rows`."""

    def init_optimizer_state(workload: Any, model: nn.Module, *rest: Any) -> dict[str, Any]:
        """Return the submission's optimizer state, with parameter names added."""
        state: dict[str, Any] = submission.init_optimizer_state(workload, model, *rest)
        state["optimizer"].param_groups[0]["param_names"] = [name for name, _ in model.named_parameters()]
        return state

    def update_params(**arguments: Any) -> Any:
        """Take the submission's step, with diagnostics if it is due."""
        optimizer, step = arguments["optimizer_state"]["optimizer"], arguments["global_step"] + 1
        if step % every:
            return submission.update_params(**arguments)
        before = weights(optimizer)
        result = submission.update_params(**arguments)
        found = log_diagnostics(optimizer, writer, step, before)
        ratios = split_ratios(arguments["workload"], arguments["current_param_container"], optimizer)
        rows.extend({"step": step, "parameter": name, **found[name], **ratios.get(name, {})} for name in found)
        return result

    return SimpleNamespace(**{**vars(submission), "init_optimizer_state": init_optimizer_state, "update_params": update_params})


def split_ratios(workload: LaptopWorkload, model: nn.Module, optimizer: AdamWShampoo) -> dict[str, dict[str, float]]:
    """Return m, n, and the norm ratio of the gradient over eval_train for each parameter that the optimizer treats as a matrix.

    Overwrites the gradients of the model.
    """
    model.zero_grad()
    for batch in workload._build_input_queue([0, 0], "eval_train", "", workload.default_batch_size):
        logits, _ = workload.model_fn(model, batch, None, spec.ForwardPassMode.TRAIN, [0, 0], update_batch_norm=False)
        workload.loss_fn(batch["targets"], logits)["summed"].backward()
    group: Any = optimizer.param_groups[0]
    found = {}
    for name, p in model.named_parameters():
        shape = merged_shape(tuple(p.shape), group)
        if len(shape) > 1 and p.grad is not None:
            ratio = gradient_figures(p.grad, shape)["nuclear_ratio"]
            found[name] = {"m": shape[0], "n": p.numel() // shape[0], "split_ratio": ratio}
    return found


def train(name: str, learning_rate: float, steps: int, every: int, folder: Path) -> pd.DataFrame:
    """Train at the first point of the search space with this learning rate and return the rows of `with_diagnostics`.

    The learning-rate schedule is that of the workload's full length. Raises FileExistsError if the folder exists.
    """
    folder.mkdir(parents=True)
    workload, rows = load_workload(name), list[dict[str, Any]]()
    workload.max_allowed_runtime_sec = float("inf")  # diagnostics take time too
    point = {**json.loads(SPACE.read_text())[0], "learning_rate": learning_rate}
    settings = Settings(batch_size=workload.default_batch_size, max_global_steps=steps, eval_every_steps=steps)
    with SummaryWriter(str(folder / "diagnostics")) as writer, tqdm(total=steps, desc=folder.name, disable=None) as bar:
        run_trial(
            workload,
            with_diagnostics(every, writer, rows),
            collections.namedtuple("Hyperparameters", point)(**point),
            rng_seed=1,
            folder=folder,
            settings=settings,
            progress=lambda step, *_: bar.update(step - bar.n) and None,
        )
    return pd.DataFrame(rows)


def layer_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the median and range over steps of the ratio of each matrix, and the least possible ratio 1 / sqrt(min(m, n))."""
    found = rows.dropna(subset="m").astype({"m": int, "n": int}).groupby(["workload", "parameter", "m", "n"], sort=False)
    table = found[list(RATIOS)].agg(["median", "min", "max"])
    table.columns = [f"{RATIOS[column]} {statistic}" for column, statistic in table.columns]
    table = table.reset_index()
    table.insert(4, "least possible", table[["m", "n"]].min(axis=1) ** -0.5)
    return table


def workload_table(layers: pd.DataFrame) -> pd.DataFrame:
    """Return, per workload and for all of them, the number of matrices, the median and range of their medians, and slopes."""
    groups = [*layers.groupby("workload", sort=False), ("all", layers)]
    found = {
        workload: {"matrices": len(table)}
        | {f"{source} {s}": table[f"{source} median"].agg(s) for source in RATIOS.values() for s in ("median", "min", "max")}
        | {"slope, batch": slope(table, "batch"), "slope, eval_train": slope(table, "eval_train")}
        for workload, table in groups
    }
    return pd.DataFrame.from_dict(found, orient="index").rename_axis("workload").reset_index()


def slope(layers: pd.DataFrame, source: str) -> float:
    """Return the least-squares slope of log ratio against log min(m, n): 0 if the condition holds, -1/2 at a fixed rank."""
    sizes = np.log(layers[["m", "n"]].min(axis=1))
    return float(np.polyfit(sizes, np.log(layers[f"{source} median"]), 1)[0]) if sizes.nunique() > 1 else float("nan")


def draw_range(axes: Axes, rows: pd.DataFrame, column: str, **style: Any) -> None:
    """Plot the median over parameters at each step, and shade the range."""
    values = rows.replace([np.inf, -np.inf], np.nan).groupby("step")[column].agg(["median", "min", "max"])
    (line,) = axes.plot(values.index, values["median"], **style)
    axes.fill_between(values.index, values["min"], values["max"], color=line.get_color(), alpha=0.2, linewidth=0)


def draw(rows: pd.DataFrame, layers: pd.DataFrame, path: Path) -> None:
    """Plot the ratio against steps, one panel per workload, and the medians of all matrices against min(m, n)."""
    names = list(rows["workload"].unique())
    height = -(-(len(names) + 1) // 3)
    figure, panels = plt.subplots(height, 3, figsize=(13, 3.4 * height), layout="constrained", squeeze=False)
    for axes in panels.flat[len(names) + 1 :]:
        axes.remove()
    for axes, name in zip(panels.flat, names, strict=False):
        matrices = rows[(rows["workload"] == name) & rows["m"].notna()]
        for column, source in RATIOS.items():
            draw_range(axes, matrices, column, label=f"gradient of {source}")
        axes.axhline(1, color="black", linestyle="--", linewidth=1)
        axes.set(title=f"{name}, {matrices['parameter'].nunique()} matrices", xlabel="step", ylim=(0, 1.05))
        axes.grid(alpha=0.3)
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, title="median and range")
    axes, sizes = panels.flat[len(names)], layers[["m", "n"]].min(axis=1)
    for source in RATIOS.values():
        axes.plot(sizes, layers[f"{source} median"], "o", markersize=4, alpha=0.6)
    ends = np.array([sizes.min(), sizes.max()])
    axes.plot(ends, [1, 1], color="black", linestyle="--", linewidth=1)
    axes.plot(ends, ends**-0.5, color="black", linestyle=":", label="rank one")
    axes.set(title="all matrices, medians over steps", xlabel="min(m, n)", xscale="log", yscale="log")
    axes.set_xticks(ticks := [2**k for k in range(1, 9) if ends[0] <= 2**k <= ends[1]], map(str, ticks))
    axes.set_yticks(ticks := [1, 0.5, 0.2, 0.1], map(str, ticks))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.supylabel("||G||_* / (sqrt(min(m, n)) ||G||_F)")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(_: Any) -> None:
    """Train, write the tables and the figure, and print the summary."""
    torch.set_num_threads(1)
    output = Path(FLAGS.output_dir)
    found = [
        train(name, LEARNING_RATES[name], FLAGS.steps, FLAGS.every, output / name).assign(workload=name)
        for name in FLAGS.workload
    ]
    rows = pd.concat(found, ignore_index=True)
    rows.to_csv(output / "steps.csv", index=False, float_format="%.5g")
    layers = layer_table(rows)
    table = workload_table(layers)
    layers.to_csv(output / "layers.csv", index=False, float_format="%.3f")
    table.to_csv(output / "workloads.csv", index=False, float_format="%.3f")
    draw(rows, layers, output / "norm_ratio.png")
    print(table.to_markdown(index=False, floatfmt=".2f"))


if __name__ == "__main__":
    flags.DEFINE_multi_enum("workload", list(LEARNING_RATES), list(LEARNING_RATES), "workloads to train")
    flags.DEFINE_integer("steps", 400, "steps per workload", lower_bound=1)
    flags.DEFINE_integer("every", 10, "measure every this many steps", lower_bound=1)
    flags.DEFINE_string("output_dir", None, "folder for tables, figure, and TensorBoard events", required=True)
    app.run(main)
