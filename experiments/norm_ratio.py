"""Whether gradients meet the paper's condition: `python -m experiments.norm_ratio --output_dir=DIR`; five minutes.

The paper's rate (arXiv 2601.07326) is that of SGD where ||G||_* = Theta(sqrt(min(m, n))) ||G||_F. Each laptop workload trains
through `submission.py`, and every few steps the ratio ||G||_* / (sqrt(min(m, n)) ||G||_F) of each matrix is taken, of the
batch's gradient, which the optimizer sees, and of the gradient over the split eval_train, which is nearer to the paper's.

DIR gets workloads.csv, layers.csv, a picture, and steps.csv with all diagnostics; DIR/WORKLOAD has them for TensorBoard.
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
from shampoo.blocking import merged_shape
from shampoo.diagnostics import gradient_figures, log_diagnostics, weights

from .variants import LEARNING_RATES, SPACE

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FLAGS = flags.FLAGS

RATIOS = {"nuclear_ratio": "batch", "split_ratio": "eval_train"}  # a column, and whose gradient it is


def watched(every: int, writer: SummaryWriter, rows: list[dict[str, Any]]) -> Any:
    """`submission.py`, of which one step in `every` logs its diagnostics and adds them to the rows, one for each parameter."""

    def init_optimizer_state(workload: Any, model: nn.Module, *rest: Any) -> dict[str, Any]:
        """The submission's, with names for the parameters."""
        state = submission.init_optimizer_state(workload, model, *rest)
        state["optimizer"].param_groups[0]["param_names"] = [name for name, _ in model.named_parameters()]
        return state

    def update_params(**arguments: Any) -> Any:
        """The submission's step."""
        optimizer, step = arguments["optimizer_state"]["optimizer"], arguments["global_step"] + 1
        if step % every:
            return submission.update_params(**arguments)
        before = weights(optimizer)
        result = submission.update_params(**arguments)
        found = log_diagnostics(optimizer, writer, step, before)
        more = of_matrices(arguments["workload"], arguments["current_param_container"], optimizer)
        rows.extend({"step": step, "parameter": name, **found[name], **more.get(name, {})} for name in found)
        return result

    return SimpleNamespace(**{**vars(submission), "init_optimizer_state": init_optimizer_state, "update_params": update_params})


def of_matrices(workload: LaptopWorkload, model: nn.Module, optimizer: AdamWShampoo) -> dict[str, dict[str, float]]:
    """For each parameter that the optimizer takes as a matrix m, n, and the ratio of its gradient over eval_train, which takes
    the place of the gradient.
    """
    model.zero_grad()
    for batch in workload._build_input_queue([0, 0], "eval_train", "", workload.default_batch_size):
        logits, _ = workload.model_fn(model, batch, None, spec.ForwardPassMode.TRAIN, [0, 0], update_batch_norm=False)
        workload.loss_fn(batch["targets"], logits)["summed"].backward()
    group, found = optimizer.param_groups[0], {}
    for name, p in model.named_parameters():
        shape = merged_shape(tuple(p.shape), group["block_size"], group["merge_dims"])
        if len(shape) > 1 and p.grad is not None:
            ratio = gradient_figures(p.grad, shape)["nuclear_ratio"]
            found[name] = {"m": shape[0], "n": p.numel() // shape[0], "split_ratio": ratio}
    return found


def train(name: str, learning_rate: float, steps: int, every: int, folder: Path) -> pd.DataFrame:
    """The rows of `watched`, of training at the first point of the search space with this learning rate; the schedule is that
    of the workload's whole length. Raises FileExistsError if there is the folder.
    """
    folder.mkdir(parents=True)
    workload, rows = load_workload(name), list[dict[str, Any]]()
    workload.max_allowed_runtime_sec = float("inf")  # diagnostics take time too
    point = {**json.loads(SPACE.read_text())[0], "learning_rate": learning_rate}
    settings = Settings(
        batch_size=workload.default_batch_size,
        max_global_steps=steps,
        eval_every_steps=steps,
        save_checkpoints=False,
        save_intermediate_checkpoints=False,
        torch_compile=False,
        flags={},
    )
    with SummaryWriter(str(folder / "diagnostics")) as writer, tqdm(total=steps, desc=folder.name, disable=None) as line:
        run_trial(
            workload,
            watched(every, writer, rows),
            collections.namedtuple("Hyperparameters", point)(**point),
            rng_seed=1,
            folder=folder,
            settings=settings,
            progress=lambda step, *_: line.update(step - line.n) and None,
        )
    return pd.DataFrame(rows)


def layer_table(rows: pd.DataFrame) -> pd.DataFrame:
    """For each matrix of each workload the ratio's median and range over steps, and the least that it can be."""
    found = rows.dropna(subset="m").astype({"m": int, "n": int}).groupby(["workload", "parameter", "m", "n"], sort=False)
    table = found[list(RATIOS)].agg(["median", "min", "max"])
    table.columns = [f"{RATIOS[column]} {statistic}" for column, statistic in table.columns]
    table = table.reset_index()
    table.insert(4, "least possible", table[["m", "n"]].min(axis=1) ** -0.5)
    return table


def workload_table(layers: pd.DataFrame) -> pd.DataFrame:
    """For each workload, and all, how many matrices there are, and median, smallest and largest of their medians."""
    groups = [*layers.groupby("workload", sort=False), ("all", layers)]
    found = {
        workload: {"matrices": len(of)}
        | {f"{whose} {s}": of[f"{whose} median"].agg(s) for whose in RATIOS.values() for s in ("median", "min", "max")}
        | {"slope, batch": slope(of, "batch"), "slope, eval_train": slope(of, "eval_train")}
        for workload, of in groups
    }
    return pd.DataFrame.from_dict(found, orient="index").rename_axis("workload").reset_index()


def slope(layers: pd.DataFrame, whose: str) -> float:
    """Of log ratio over log min(m, n), least squares: 0 where the condition holds, -1/2 for gradients of a fixed rank."""
    sizes = np.log(layers[["m", "n"]].min(axis=1))
    return float(np.polyfit(sizes, np.log(layers[f"{whose} median"]), 1)[0]) if sizes.nunique() > 1 else float("nan")


def draw_range(axes: Axes, rows: pd.DataFrame, column: str, **style: Any) -> None:
    """Draw the median over parameters at each step, and shade from the smallest to the largest."""
    values = rows.replace([np.inf, -np.inf], np.nan).groupby("step")[column].agg(["median", "min", "max"])
    (line,) = axes.plot(values.index, values["median"], **style)
    axes.fill_between(values.index, values["min"], values["max"], color=line.get_color(), alpha=0.2, linewidth=0)


def draw(rows: pd.DataFrame, layers: pd.DataFrame, path: Path) -> None:
    """A panel for each workload, the ratio over steps, and one with all layers over min(m, n)."""
    names = list(rows["workload"].unique())
    lines = -(-(len(names) + 1) // 3)
    figure, panels = plt.subplots(lines, 3, figsize=(13, 3.4 * lines), layout="constrained", squeeze=False)
    for axes in panels.flat[len(names) + 1 :]:
        axes.remove()
    for axes, name in zip(panels.flat, names, strict=False):
        of = rows[(rows["workload"] == name) & rows["m"].notna()]
        for column, whose in RATIOS.items():
            draw_range(axes, of, column, label=f"gradient of {whose}")
        axes.axhline(1, color="black", linestyle="--", linewidth=1)
        axes.set(title=f"{name}, {of['parameter'].nunique()} matrices", xlabel="step", ylim=(0, 1.05))
        axes.grid(alpha=0.3)
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, title="median and range")
    axes, sizes = panels.flat[len(names)], layers[["m", "n"]].min(axis=1)
    for whose in RATIOS.values():
        axes.plot(sizes, layers[f"{whose} median"], "o", markersize=4, alpha=0.6)
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
    """Train, write, draw and print."""
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
    flags.DEFINE_multi_enum("workload", list(LEARNING_RATES), list(LEARNING_RATES), "which")
    flags.DEFINE_integer("steps", 400, "of each run", lower_bound=1)
    flags.DEFINE_integer("every", 10, "steps from one measurement to the next", lower_bound=1)
    flags.DEFINE_string("output_dir", None, "where tables, picture and events go", required=True)
    app.run(main)
