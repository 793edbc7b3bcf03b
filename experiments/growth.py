"""How step time and memory grow: `python -m experiments.growth --output_dir=DIR`; twenty minutes.

Eight square layers and their biases, of 1e5 to 1e8 parameters together, and blocks of 128 to 2048. A table, a picture, and for
each case how many ordinary steps a refresh of all roots costs: at that frequency refreshes cost as much as all else.
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
    """Eight square matrices of about this many numbers together, and a vector for each."""
    width = round((numel / LAYERS) ** 0.5)
    return [(width, width), (width,)] * LAYERS


def grow(numels: list[float], block_sizes: list[int], frequency: int, rounds: int) -> pd.DataFrame:
    """A row for each size of the model and of blocks."""
    rows = []
    for numel in numels:
        widest = round((numel / LAYERS) ** 0.5)
        for block_size in block_sizes:
            if block_size > block_sizes[0] and block_size >= 2 * widest:
                continue  # as the size before
            table = measure(["shampoo"], shapes(numel), frequency, block_size, rounds, torch.device("cpu"))
            found = table.loc["shampoo", ["ordinary", "refresh", "products", "state", "peak"]]
            rows.append({"parameters": numel, "block_size": block_size, **found})
            print(pd.Series(rows[-1]).to_frame().T.to_string(index=False, header=len(rows) == 1), flush=True)
    table = pd.DataFrame(rows)
    table["refresh / ordinary"] = table["refresh"] / table["ordinary"] - 1
    return table


def draw(table: pd.DataFrame, path: Path) -> None:
    """Step times over parameters, a line for each block size, and what is kept over block size, a line for each model."""
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
    """Measure, print and draw."""
    torch.set_num_threads(FLAGS.threads)
    output = Path(FLAGS.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    table = grow([float(n) for n in FLAGS.parameters], [int(b) for b in FLAGS.block_sizes], FLAGS.frequency, FLAGS.rounds)
    table.to_csv(output / "growth.csv", index=False, float_format="%.4g")
    draw(table, output / "growth.png")
    print(table.to_markdown(index=False, floatfmt=".3g"))


if __name__ == "__main__":
    flags.DEFINE_list("parameters", ["1e5", "1e6", "1e7", "1e8"], "sizes of the model")
    flags.DEFINE_list("block_sizes", ["128", "256", "512", "1024", "2048"], "sizes of blocks, ascending")
    flags.DEFINE_integer("frequency", 3, "steps between refreshes while measuring", lower_bound=2)
    flags.DEFINE_integer("rounds", 1, "of `frequency` steps", lower_bound=1)
    flags.DEFINE_integer("threads", 2, "of the CPU", lower_bound=1)
    flags.DEFINE_string("output_dir", None, "where table and picture go", required=True)
    app.run(main)
