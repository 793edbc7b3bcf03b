"""Compare exponents other than (1/4, 1/4): `python -m experiments.exponents --experiment_dir=DIR`; about a minute per run.

Train at the first point of `runner/tuning_search_space.json` with other powers (1/p, 1/q) of L and R, with Adam grafting and
without grafting, as trials of `runner.suite`. With grafting, the learning rate is `variants.LEARNING_RATES[workload]`. Without,
the step length depends on the exponents, so each variant runs at four learning rates on the first seed: one that matches the
step length of Adam (`matched_rate`), and 1/9, 1/3, and 3 times that. The remaining seeds use the best of the four. Roots are
then recomputed at every step, since nothing else bounds a step. The same command resumes an interrupted run. At the end, print
a table of all trials in DIR and write it to DIR/exponents.md, and the trials to DIR/exponents.csv.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from absl import app, flags
from torch import Tensor

import submission
from runner.loop import split
from runner.report import best_trial, read_suite
from runner.search_space import read_points
from runner.workloads import load_workload
from shampoo import AdamWShampoo
from shampoo.hyperparameters import optimizer_options

from .variants import LEARNING_RATES, ROOT, SPACE

FLAGS = flags.FLAGS

EXPONENTS = [(0.125, 0.125), (0.25, 0.25), (0.375, 0.375), (0.5, 0.5), (0.5, 0.0), (0.0, 0.5)]  # (1/p, 1/q)
LADDER = [1.0, 1 / 3, 3.0, 1 / 9]
PROBE_STEPS = 30


def variant(grafting: str, exponents: tuple[float, float], **others: Any) -> dict[str, Any]:
    """Return a point of the search space. Without grafting, refresh roots at every step: old roots do not bound a step."""
    point = {**json.loads(SPACE.read_text())[0], "grafting": grafting, "exponents": list(exponents)}
    return point | ({"precondition_frequency": 1} if grafting == "none" else {}) | others


def variant_name(point: dict[str, Any]) -> str:
    """Return the folder name of a variant: its grafting and exponents, as in "adam_0.25_0.25"."""
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


def write_ladders(folder: Path, workload: str) -> dict[str, Path]:
    """Write a search space per variant, with one learning rate if grafted, else the ladder. Existing files are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        variant_name(variant(g, e)): folder / f"{variant_name(variant(g, e))}.json" for e in EXPONENTS for g in ("adam", "none")
    }
    if all(path.exists() for path in paths.values()):
        return paths
    gradients = record_gradients(workload, folder)
    for exponents in EXPONENTS:
        rate = matched_rate(workload, exponents, gradients)
        for grafting, rates in (("adam", [LEARNING_RATES[workload]]), ("none", [rate * factor for factor in LADDER])):
            points = [variant(grafting, exponents, learning_rate=float(f"{r:.2g}")) for r in rates]
            if not (path := paths[variant_name(points[0])]).exists():
                path.write_text(json.dumps(points))
    return paths


def run_suite(folder: Path, workload: str, spaces: dict[str, Path], trials: int, seeds: range) -> pd.DataFrame:
    """Run the missing trials of these variants and return all trials."""
    entries = ",".join(f"{name}={ROOT / 'submission.py'}:{path}" for name, path in spaces.items())
    suite = [sys.executable, "-m", "runner.suite", f"--submissions={entries}", f"--workloads={workload}"]
    suite += [f"--num_tuning_trials={trials}", f"--num_studies={len(seeds)}", f"--rng_seed={seeds[0] - 1}"]
    subprocess.run([*suite, f"--experiment_dir={folder}", "--eval_every_steps=10"], cwd=ROOT, check=True)
    return read_suite(folder)


def run(root: Path, workload: str, grafting: str, seeds: int) -> None:
    """Run a workload: the first seed at every learning rate of each variant, the other seeds at the best one."""
    spaces = write_ladders(root / "spaces" / workload, workload)
    chosen = {name: path for name, path in spaces.items() if name.startswith(grafting)}
    points = len(LADDER) if grafting == "none" else 1
    first = run_suite(root / workload / f"{grafting}_1", workload, chosen, points, range(1, 2))
    if seeds > 1:
        best = {name: root / "spaces" / workload / f"best_{name}.json" for name in chosen}
        for name, path in best.items():
            path.write_text(json.dumps([best_trial(first[first["submission"] == name])["point"]]))
        run_suite(root / workload / f"{grafting}_2", workload, best, 1, range(2, seeds + 1))


def read_all(root: Path) -> pd.DataFrame:
    """Return all evaluated trials below `root` with their seeds. A folder name ends in the seed of its first study."""
    parts = []
    for folder in sorted(root.glob("*/*_[12]")):
        trials = read_suite(folder)
        parts.append(trials.assign(seed=trials["study"].str.removeprefix("study_").astype(int) + int(folder.name[-1]) - 1))
    return pd.concat(parts)


def tabulate(trials: pd.DataFrame) -> pd.DataFrame:
    """Return one row per workload, grafting, and exponents: steps to target for the first seed at each learning rate, and for
    each other seed at the best one. A dash marks a missed target and is followed by the best metric.
    """
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for trial in trials.itertuples():
        point = trial.point
        cell = f"{trial.steps:.0f}" if np.isfinite(trial.steps) else f"- ({trial.best:.3g})"
        row = rows.setdefault((trial.workload, point["grafting"], "{:g}, {:g}".format(*point["exponents"])), {})
        if trial.seed == 1:
            ladder = row.get("seed 1: steps at each learning rate", "")
            row["seed 1: steps at each learning rate"] = f"{ladder}{'; ' * bool(ladder)}{point['learning_rate']:g}: {cell}"
        else:
            row["best rate"] = f"{point['learning_rate']:g}"
            row[f"seed {trial.seed}"] = cell
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["workload", "grafting", "1/p, 1/q"])


def main(_: Any) -> None:
    """Run the missing trials, then write and print the tables."""
    root = Path(FLAGS.experiment_dir).resolve()
    for workload in FLAGS.workload:
        for grafting in FLAGS.grafting:
            run(root, workload, grafting, FLAGS.num_seeds)
    trials = read_all(root)
    table = tabulate(trials)
    points = pd.json_normalize(trials["point"].to_list())[["grafting", "exponents", "learning_rate"]]
    runs = pd.concat([trials[["workload", "seed", "steps", "best"]].reset_index(drop=True), points], axis=1)
    runs.to_csv(root / "exponents.csv", index=False)
    (root / "exponents.md").write_text(table.reset_index().fillna("").to_markdown(index=False, disable_numparse=True) + "\n")
    print(table.to_string())


if __name__ == "__main__":
    flags.DEFINE_multi_enum("workload", ["solubility_gnn", "mnist_vit"], list(LEARNING_RATES), "workloads to train")
    flags.DEFINE_multi_enum(
        "grafting", ["adam", "none"], ["adam", "none"], "grafting methods; runs without grafting take three times as long"
    )
    flags.DEFINE_integer("num_seeds", 2, "number of seeds; the first one selects the learning rate", lower_bound=1)
    flags.DEFINE_string(
        "experiment_dir", None, "folder for trials; existing trials are kept and only missing ones run", required=True
    )
    app.run(main)
