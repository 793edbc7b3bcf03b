"""Show the diagnostics of a healthy and a sick run: `python -m experiments.sick_run --output_dir=DIR`; two minutes.

Train one workload at its tuned learning rate and at one far too high, and plot the loss and the diagnostics of both runs.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from absl import app, flags
from matplotlib import pyplot as plt

from .norm_ratio import LEARNING_RATES, draw_range, train

FLAGS = flags.FLAGS

SHOWN = {
    "gradient_norm": "||G||_F",
    "update_ratio": "||step|| / ||W||",
    "condition": "condition of factors",
    "effective_rank": "effective rank of factors",
    "root_residual": "root residual",
}


def draw(runs: dict[str, Path], path: Path) -> None:
    """Plot one column per run, given as title: folder, with the loss and the median and range of each diagnostic."""
    figure, panels = plt.subplots(
        1 + len(SHOWN), len(runs), figsize=(12, 14.5), layout="constrained", sharex=True, sharey="row"
    )
    for column, (title, folder) in zip(panels.T, runs.items(), strict=True):
        losses, rows = (pd.read_csv(folder / name) for name in ("measurements.csv", "steps.csv"))
        losses = losses.dropna(subset="loss")
        column[0].plot(losses["global_step"], losses["loss"], marker="o", markersize=3, color="black")
        column[0].set(title=title, ylabel="loss of the batch")
        for axes, (name, label) in zip(column[1:], SHOWN.items(), strict=True):
            draw_range(axes, rows[rows["parameter"] != "optimizer"], name)
            axes.set(ylabel=label)
        column[-1].set(xlabel="step")
        for axes in column:
            axes.set_yscale("linear" if axes is column[0] else "log")
            axes.yaxis.set_tick_params(labelleft=True)
            axes.grid(alpha=0.3)
    figure.suptitle("lines: medians over parameters; shaded: their range")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(_: Any) -> None:
    """Train twice, plot, and print medians over parameters at about ten steps of each run."""
    torch.set_num_threads(1)
    output, rate = Path(FLAGS.output_dir), LEARNING_RATES[FLAGS.workload]
    runs = {}
    for kind, learning_rate in (("healthy", rate), ("sick", rate * FLAGS.times)):
        folder = output / kind
        rows = train(FLAGS.workload, learning_rate, FLAGS.steps, FLAGS.every, folder)
        rows.to_csv(folder / "steps.csv", index=False, float_format="%.5g")
        runs[f"{kind}: {FLAGS.workload}, learning rate {learning_rate:g}"] = folder
        medians = rows.groupby("step")[list(SHOWN)].median()
        print(f"\n{kind}\n{medians[:: -(-len(medians) // 10)].to_markdown(floatfmt='.3g')}", flush=True)
    draw(runs, output / "sick_run.png")


if __name__ == "__main__":
    flags.DEFINE_enum("workload", "mnist_vit", list(LEARNING_RATES), "workload to train")
    flags.DEFINE_float("times", 100.0, "learning rate of the sick run over that of the healthy one", lower_bound=1.0)
    flags.DEFINE_integer("steps", 300, "steps per run", lower_bound=1)
    flags.DEFINE_integer("every", 5, "measure every this many steps", lower_bound=1)
    flags.DEFINE_string("output_dir", None, "folder for the figure, diagnostics, and TensorBoard events", required=True)
    app.run(main)
