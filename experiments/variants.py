"""Measure whether an option costs steps: `python -m experiments.variants --experiment_dir=DIR`.

Train variants of the first point of `runner/tuning_search_space.json` on the same seeds, each workload at its tuned learning
rate, as trials of `runner.suite`. Divide the steps to target of each trial by those of the exact solver with the same seed;
a missed target counts as one step more than the trial took. Print the geometric mean of these ratios, its 95 % bootstrap
interval over seeds within workloads, and the number of misses. The same command resumes an interrupted run.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from absl import app, flags

from runner.report import read_suite

FLAGS = flags.FLAGS

ROOT = Path(__file__).resolve().parent.parent
SPACE = ROOT / "runner" / "tuning_search_space.json"
BASE = "eigh"
VARIANTS: dict[str, dict[str, Any]] = {
    BASE: {},
    "qr": {"solver": "qr"},
    "newton": {"solver": "newton"},
    "staggered": {"stagger": True},
    "factors of every fifth step": {"factor_frequency": 5},
    "relative eps": {"relative_eps": True, "epsilon": 1e-4},
    "vectors without factors": {"precondition_vectors": False},
    "small": {"precondition_vectors": False, "bf16_roots": True, "block_size": 64},
}
DRAWS = 10_000

# The learning rate at which exact roots were fastest in `results/laptop_suite`.
LEARNING_RATES = {
    "airports_dlrm": 0.014,
    "fsdd_conformer": 0.028,
    "fsdd_lstm": 0.014,
    "mnist_resnet": 0.007,
    "mnist_unet": 0.014,
    "mnist_vit": 0.007,
    "pydoc_lm": 0.028,
    "solubility_gnn": 0.014,
}


def write_spaces(folder: Path, names: list[str], learning_rate: float) -> list[str]:
    """Write a one-point search space per variant. Return the entries for the suite's flag --submissions."""
    folder.mkdir(parents=True, exist_ok=True)
    point = {**json.loads(SPACE.read_text())[0], "learning_rate": learning_rate}
    entries = []
    for name in names:
        path = folder / f"{name.replace(' ', '_')}.json"
        path.write_text(json.dumps([{**point, **VARIANTS[name]}]))
        entries.append(f"{path.stem}={ROOT / 'submission.py'}:{path}")
    return entries


def steps_of(trials: pd.DataFrame) -> pd.DataFrame:
    """Return steps to target (last step + 1 for a miss) and misses, one row per workload and study, one column per variant."""
    last = trials["evaluations"].map(lambda evaluations: evaluations["global_step"].iloc[-1] + 1)
    trials = trials.assign(steps=trials["steps"].where(np.isfinite(trials["steps"]), last), missed=np.isinf(trials["steps"]))
    return trials.pivot(index=["workload", "study"], columns="submission", values=["steps", "missed"])


def compare(steps: pd.DataFrame, base: str) -> pd.DataFrame:
    """Return, per variant, the geometric mean of its ratios to `base`, the 95 % interval, and the number of misses."""
    logs = steps["steps"].astype(float).map(math.log)
    ratios = logs.sub(logs[base], axis=0)
    rng, by_workload = np.random.default_rng(0), ratios.groupby("workload")
    resampled = [rows.to_numpy()[rng.integers(len(rows), size=(DRAWS, len(rows)))] for _, rows in by_workload]
    means = np.mean([rows.mean(axis=1) for rows in resampled], axis=0)
    low, high = np.exp(np.percentile(means, [2.5, 97.5], axis=0))
    found = {"ratio": np.exp(by_workload.mean().mean()), "low": low, "high": high, "misses": steps["missed"].sum()}
    return pd.DataFrame(found, index=ratios.columns)


def main(_: Any) -> None:
    """Run the missing trials and print the tables."""
    root = Path(FLAGS.experiment_dir).resolve()
    for workload in FLAGS.workload:
        entries = write_spaces(root / "spaces" / workload, FLAGS.variants, LEARNING_RATES[workload])
        suite = [sys.executable, "-m", "runner.suite", f"--submissions={','.join(entries)}", f"--workloads={workload}"]
        suite += ["--num_tuning_trials=1", f"--num_studies={FLAGS.num_studies}", f"--experiment_dir={root}"]
        subprocess.run([*suite, f"--eval_every_steps={FLAGS.eval_every_steps}"], cwd=ROOT, check=True)
    steps = steps_of(read_suite(root))
    print(steps["steps"].astype(int).to_string(), "\n")
    print(compare(steps, BASE).round(3).to_string())


if __name__ == "__main__":
    flags.DEFINE_list("variants", list(VARIANTS), "variants to train")
    flags.DEFINE_multi_enum(
        "workload", ["mnist_vit", "solubility_gnn", "fsdd_lstm"], list(LEARNING_RATES), "workloads to train"
    )
    flags.DEFINE_integer("num_studies", 5, "number of seeds", lower_bound=2)
    flags.DEFINE_integer("eval_every_steps", 10, "evaluate every this many steps", lower_bound=1)
    flags.DEFINE_string(
        "experiment_dir", None, "folder for trials; existing trials are kept and only missing ones run", required=True
    )
    app.run(main)
