"""Compare exponents other than (1/4, 1/4): `python -m experiments.exponents --output_dir=DIR`.

A study (see `runner.study`) of the first point of `runner/tuning_search_space.json` with other powers (1/p, 1/q) of L and R,
with Adam grafting and without grafting, each at its own best learning rate. With grafting, the rates are 1/2, 1, and 2 times
the workload's in LEARNING_RATES. Without, the step length depends on the exponents, so they are 1/9, 1/3, 1, and 3 times the
one that matches the step length of Adam (`matched_rate`), and roots are recomputed at every step, since nothing else bounds a
step. Print steps to target, and ratios to those of (1/4, 1/4) with grafting.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from absl import app, flags
from torch import Tensor

import submission
from runner.compare import print_comparison
from runner.loop import split
from runner.search_space import read_points
from runner.study import Entry, run_studies
from runner.workloads import load_workload
from shampoo import AdamWShampoo
from shampoo.hyperparameters import optimizer_options

from .norm_ratio import LEARNING_RATES, ROOT, SPACE

FLAGS = flags.FLAGS

EXPONENTS = [(0.125, 0.125), (0.25, 0.25), (0.375, 0.375), (0.5, 0.5), (0.5, 0.0), (0.0, 0.5)]  # (1/p, 1/q)
LADDERS = {"adam": (0.5, 1.0, 2.0), "none": (1 / 9, 1 / 3, 1.0, 3.0)}
BASE = "adam_0.25_0.25"
PROBE_STEPS = 30


def variant(grafting: str, exponents: tuple[float, float], **others: Any) -> dict[str, Any]:
    """Return a point of the search space. Without grafting, refresh roots at every step: old roots do not bound a step."""
    point = {**json.loads(SPACE.read_text())[0], "grafting": grafting, "exponents": list(exponents)}
    return point | ({"precondition_frequency": 1} if grafting == "none" else {}) | others


def variant_name(point: dict[str, Any]) -> str:
    """Return the name of a variant: its grafting and exponents, as in "adam_0.25_0.25"."""
    return "_".join([point["grafting"], *map(str, point["exponents"])])


def record_gradients(workload_name: str, folder: Path) -> list[list[Tensor]]:
    """Return the gradients of the first PROBE_STEPS steps with Adam grafting, powers 1/4, and the workload's learning rate."""
    path = folder / "probe.json"
    path.write_text(json.dumps([variant("adam", (0.25, 0.25), learning_rate=LEARNING_RATES[workload_name])]))
    point, workload = read_points(path, 1, 0)[0], load_workload(workload_name)
    data_rng, optimizer_rng, model_rng, step_rng = split(np.array([0, 0]), 4)
    model, state = workload.init_model_fn(model_rng)
    queue = workload._build_input_queue(data_rng, "train", "", workload.default_batch_size)
    optimizer_state, gradients = submission.init_optimizer_state(workload, model, state, point, optimizer_rng), []
    fixed = (workload.model_params_types, state, point)
    for step, batch in zip(range(PROBE_STEPS), queue, strict=False):
        submission.update_params(workload, model, *fixed, batch, workload.loss_type, optimizer_state, [], step, step_rng)
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()])
    return gradients


def step_length(point: dict[str, Any], gradients: list[list[Tensor]]) -> float:
    """Return ||P||_F over all weights, where P is the direction of a step without weight decay.

    The norm is averaged over the last `precondition_frequency` gradients, since P grows with the age of the roots.
    """
    weights = [torch.nn.Parameter(torch.zeros_like(G)) for G in gradients[0]]
    optimizer = AdamWShampoo(weights, **{**optimizer_options(point), "lr": 1.0, "weight_decay": 0.0})
    lengths = []
    for step in gradients:
        for W, G in zip(weights, step, strict=True):
            W.data.zero_()  # so that W is the step
            W.grad = G.clone()
        optimizer.step()
        lengths.append(torch.cat([W.detach().flatten() for W in weights]).norm().item())
    return float(np.mean(lengths[-point["precondition_frequency"] :]))


def matched_rate(workload: str, exponents: tuple[float, float], gradients: list[list[Tensor]]) -> float:
    """Return the learning rate at which the step after these gradients is as long without grafting as with it."""
    grafted, bare = (step_length(variant(name, exponents), gradients) for name in ("adam", "none"))
    return float(f"{LEARNING_RATES[workload] * grafted / bare:.2g}")


def entries(workload: str, graftings: list[str], folder: Path) -> list[Entry]:
    """Return a study's entries for a workload: one for each grafting and exponents, with a ladder of learning rates."""
    gradients = record_gradients(workload, folder) if "none" in graftings else []
    found = []
    for grafting in graftings:
        for exponents in EXPONENTS:
            middle = LEARNING_RATES[workload] if grafting == "adam" else matched_rate(workload, exponents, gradients)
            rates = [float(f"{middle * factor:.2g}") for factor in LADDERS[grafting]]
            points = tuple(variant(grafting, exponents, learning_rate=rate) for rate in rates)
            found.append(Entry(variant_name(points[0]), ROOT / "submission.py", points))
    return found


def main(_: Any) -> None:
    """Run what is missing and print the tables, workload by workload."""
    root = Path(FLAGS.output_dir).resolve()
    failures = []
    for workload in FLAGS.workload:
        folder = root / workload
        folder.mkdir(parents=True, exist_ok=True)
        variants = entries(workload, FLAGS.grafting, folder)
        failures += run_studies(folder / "runs.csv", variants, [workload], FLAGS.seeds, FLAGS.max_workers)
        base = BASE if "adam" in FLAGS.grafting else variants[0].name
        print_comparison(folder / "runs.csv", base, variants, [workload], FLAGS.seeds)
    if failures:
        sys.exit(f"error: {len(failures)} runs failed")


if __name__ == "__main__":
    flags.DEFINE_multi_enum("workload", ["solubility_gnn", "mnist_vit"], list(LEARNING_RATES), "workloads to train")
    flags.DEFINE_multi_enum(
        "grafting", ["adam", "none"], ["adam", "none"], "grafting methods; runs without grafting take three times as long"
    )
    flags.DEFINE_integer("seeds", 5, "number of seeds", lower_bound=2)
    flags.DEFINE_integer("max_workers", os.cpu_count() or 1, "number of single-threaded processes", lower_bound=1)
    flags.DEFINE_string("output_dir", None, "folder for the tables of runs, which are completed", required=True)
    app.run(main)
