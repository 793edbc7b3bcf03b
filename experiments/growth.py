"""Measure how step time and memory grow with model size: `python -m experiments.growth --output_dir=DIR`; twenty minutes.

The model is eight square layers with biases, 1e5 to 1e8 parameters in total; block sizes are 128 to 2048. Write a table and a
figure. The column "refresh / ordinary" is the extra time of a step that refreshes all roots, in ordinary steps: with that many
steps between refreshes, refreshes take as much time as everything else.
"""

from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import torch
from absl import app, flags

from .step_time import measure

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FLAGS = flags.FLAGS

LAYERS = 8


def shapes(numel: float) -> list[tuple[int, ...]]:
    """Return the shapes of eight square matrices of about `numel` elements in total, each with a bias vector."""
    width = round((numel / LAYERS) ** 0.5)
    return [(width, width), (width,)] * LAYERS


def grow(numels: list[float], block_sizes: list[int], frequency: int, rounds: int) -> pd.DataFrame:
    """Return one row per model size and block size."""
    rows = []
    for numel in numels:
        width = round((numel / LAYERS) ** 0.5)
        for block_size in block_sizes:
            if block_size > block_sizes[0] and block_size >= 2 * width:
                continue  # same blocks as with the previous size
            table = measure(["shampoo"], shapes(numel), frequency, block_size, rounds, torch.device("cpu"))
            found = table.loc["shampoo", ["ordinary", "refresh", "products", "state", "peak"]]
            rows.append({"parameters": numel, "block_size": block_size, **found})
            print(pd.Series(rows[-1]).to_frame().T.to_string(index=False, header=len(rows) == 1), flush=True)
    table = pd.DataFrame(rows)
    table["refresh / ordinary"] = table["refresh"] / table["ordinary"] - 1
    return table


def draw(table: pd.DataFrame, path: Path) -> None:
    """Plot step times against parameters, one line per block size, and state against block size, one line per model."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for axes, column, title in (
        (left, "ordinary", "an ordinary step"),
        (middle, "refresh", "a step that refreshes all roots"),
    ):
        for block_size, rows in table.groupby("block_size"):
            axes.loglog(rows["parameters"], rows[column], marker="o", label=f"blocks of {block_size}")
        axes.set(title=title, xlabel="parameters", ylabel="ms")
        axes.grid(alpha=0.3)
    left.legend()
    for numel, rows in table.groupby("parameters"):
        right.semilogx(rows["block_size"], rows["state"], marker="o", base=2, label=f"{numel:.0e} parameters")
    right.set(title="state", xlabel="block size", ylabel="bytes per parameter", ylim=(0, None))
    right.grid(alpha=0.3)
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(_: Any) -> None:
    """Measure, plot and print."""
    torch.set_num_threads(FLAGS.threads)
    output = Path(FLAGS.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    table = grow([float(n) for n in FLAGS.parameters], [int(b) for b in FLAGS.block_sizes], FLAGS.frequency, FLAGS.rounds)
    table.to_csv(output / "growth.csv", index=False, float_format="%.4g")
    draw(table, output / "growth.png")
    print(table.to_markdown(index=False, floatfmt=".3g"))


if __name__ == "__main__":
    flags.DEFINE_list("parameters", ["1e5", "1e6", "1e7", "1e8"], "numbers of parameters of the model")
    flags.DEFINE_list("block_sizes", ["128", "256", "512", "1024", "2048"], "block sizes, ascending")
    flags.DEFINE_integer("frequency", 3, "precondition_frequency while measuring", lower_bound=2)
    flags.DEFINE_integer("rounds", 1, "measured rounds of `frequency` steps", lower_bound=1)
    flags.DEFINE_integer("threads", 2, "number of CPU threads", lower_bound=1)
    flags.DEFINE_string("output_dir", None, "folder for the table and the figure", required=True)
    app.run(main)
