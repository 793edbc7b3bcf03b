"""Set the targets of the laptop workloads by AlgoPerf's protocol (Dahl et al. 2023).

For each workload, AdamW, NadamW, and heavy-ball momentum run at eight to ten points each, for `step_hint` steps. The point with
the best validation result is repeated with five seeds. The validation target is the median of their best validation results;
the test target is the worst of their test results, each taken at the step of the best validation result.

`python -m experiments.targets` adds the missing runs to `experiments/targets.csv`, one row per run, and prints the resulting
targets. With two single-threaded processes, all runs take about an hour.
"""

import collections
import importlib
import math
import multiprocessing
import tempfile
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from absl import app, flags
from algoperf import spec
from torch import Tensor
from tqdm import tqdm

from runner.logs import latest_checkpoint
from runner.loop import Settings, run_trial
from runner.workloads import WORKLOADS, load_workload, workload_class
from runner.workloads.base import DEVICE, LaptopWorkload

TABLE = Path(__file__).with_name("targets.csv")
SUBMISSIONS = {
    "adamw": "runner.baselines.adamw.submission",
    "nadamw": "runner.baselines.nadamw.submission",
    "heavy_ball": "experiments.heavy_ball",
}
GRID = {  # learning rates, weight decays; SGD's decays are smaller since they are scaled by its larger learning rates
    "adamw": ((0.002, 0.004, 0.008, 0.016, 0.032), (0.01, 0.1)),
    "nadamw": ((0.002, 0.004, 0.008, 0.016, 0.032), (0.01, 0.1)),
    "heavy_ball": ((0.01, 0.03, 0.1, 0.3), (0.0001, 0.001)),
}
COMMON = {"beta1": 0.9, "beta2": 0.999, "warmup_factor": 0.05, "label_smoothing": 0.0, "dropout_rate": 0.0}
TUNING_SEED, SEEDS = 1, (11, 12, 13, 14, 15)
EVAL_EVERY_STEPS = 25
RUN = ["workload", "method", "learning_rate", "weight_decay", "seed"]  # identifies a run

FLAGS = flags.FLAGS


def run(workload_name: str, method: str, learning_rate: float, weight_decay: float, seed: int) -> dict[str, Any]:
    """Train for `step_hint` steps and return the remaining columns of the run's row."""
    torch.set_num_threads(1)
    workload = load_workload(workload_name)
    sign = metric_sign(workload_name)
    # Unreachable targets and no time limit, so that the run takes all `step_hint` steps.
    workload.validation_target_value = workload.test_target_value = sign * math.inf
    workload.max_allowed_runtime_sec = math.inf
    point = {"learning_rate": learning_rate, "weight_decay": weight_decay, **COMMON}
    hyperparameters = collections.namedtuple("Hyperparameters", point)(**point)
    settings = Settings(
        batch_size=workload.default_batch_size,
        max_global_steps=workload.step_hint,
        eval_every_steps=EVAL_EVERY_STEPS,
        save_checkpoints=seed in SEEDS,
        save_intermediate_checkpoints=False,
        torch_compile=False,
        flags={},
    )
    submission = importlib.import_module(SUBMISSIONS[method])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_trial(workload, submission, hyperparameters, seed, folder, settings, progress=lambda *_: None)
        evaluations = pd.read_csv(folder / "eval_measurements.csv")
        checkpoint = latest_checkpoint(folder, DEVICE)
    metric = evaluations[f"validation/{workload.target_metric_name}"]
    best = (sign * metric).fillna(-math.inf).idxmax()
    return {
        "best_validation": metric[best],
        "test_there": evaluations[f"test/{workload.target_metric_name}"][best],
        "step_of_best": int(evaluations["global_step"][best]),
        "seconds": evaluations["accumulated_submission_time"].iloc[-1],
        "standard_error": standard_error(workload, checkpoint["model_params"]) if checkpoint else math.nan,
    }


def standard_error(workload: LaptopWorkload, weights: dict[str, Tensor]) -> float:
    """Return the bootstrap standard error of the validation metric, over 1,000 resamples of the validation examples."""
    model, _ = workload.init_model_fn([0, 0])
    model.load_state_dict(weights)
    batches = workload._build_input_queue([0, 0], "validation", "", 1)
    sums = []
    for batch in batches:
        logits, _ = workload.model_fn(model, batch, None, spec.ForwardPassMode.EVAL, [0, 0], update_batch_norm=False)
        sums.append({name: value.item() for name, value in workload.metric_sums(logits, batch["targets"]).items()})
    examples = pd.DataFrame(sums)
    rng = np.random.default_rng(0)
    totals = (examples.iloc[rng.integers(len(examples), size=len(examples))].sum() for _ in range(1000))
    metrics = [workload.metrics(total.to_dict(), len(examples))[workload.target_metric_name] for total in totals]
    return float(np.std(metrics))


def missing(table: pd.DataFrame, workload: str) -> list[tuple[Any, ...]]:
    """Return the runs missing from the table: those of the grids or, once these are complete, the seeds of the best point."""
    done = set(table[RUN].itertuples(index=False, name=None))
    wanted = [
        (workload, method, *point, TUNING_SEED) for method, (rates, decays) in GRID.items() for point in product(rates, decays)
    ]
    if done.issuperset(wanted):
        best = best_point(table[table["workload"] == workload], workload)
        point = float(best["learning_rate"]), float(best["weight_decay"])
        wanted = [(workload, best["method"], *point, seed) for seed in SEEDS]
    return [run for run in wanted if run not in done]


def best_point(runs: pd.DataFrame, workload: str) -> pd.Series:
    """Return the grid run with the best validation result; on a tie, the first one."""
    tuning = runs[runs["seed"] == TUNING_SEED].reset_index(drop=True)
    return tuning.loc[(metric_sign(workload) * tuning["best_validation"].astype(float)).fillna(-math.inf).idxmax()]


def metric_sign(workload: str) -> int:
    """Return 1 if a higher metric is better, else -1."""
    return 1 if workload_class(workload).higher_is_better else -1


def targets(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row per finished workload: the best point, its targets, and how they compare with noise.

    `se` is the bootstrap standard error of the validation result. `typical` is how far the median result of the winning
    method's grid falls short of the target, in standard errors. `reached_by` counts the grid runs that reach the target.
    """
    rows = {}
    for workload, runs in table.groupby("workload"):
        best, sign = best_point(runs, workload), metric_sign(workload)
        columns = ["method", "learning_rate", "weight_decay"]
        at_best = (runs[columns] == best[columns]).all(axis=1)
        repeats = runs[at_best & runs["seed"].isin(SEEDS)]
        if len(repeats) < len(SEEDS):
            continue
        target, error = repeats["best_validation"].median(), repeats["standard_error"].median()
        tuning = runs[runs["seed"] == TUNING_SEED]
        typical = tuning[tuning["method"] == best["method"]]["best_validation"].median()
        rows[workload] = {
            "best point": f"{best['method']} lr {best['learning_rate']:g} wd {best['weight_decay']:g}",
            "validation target": loosen_target(target, sign),
            "seeds": f"{repeats['best_validation'].min():.4f} to {repeats['best_validation'].max():.4f}",
            "test target": loosen_target((sign * repeats["test_there"]).min() * sign, sign),
            "se": error,
            "typical": sign * (target - typical) / error,
            "reached_by": f"{(sign * tuning['best_validation'] >= sign * target).sum()} of {len(tuning)}",
            "seconds": repeats["seconds"].median(),
            "longest": runs["seconds"].max(),
        }
    return pd.DataFrame(rows).T


def loosen_target(value: float, sign: int) -> float:
    """Return the closest value of four decimals that `value` strictly beats: a target must be exceeded, not just met."""
    return sign * (math.ceil(sign * value * 1e4) - 1) / 1e4


def main(_: Any) -> None:
    """Run the missing runs in parallel, then print the targets."""
    table = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame(columns=RUN)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(FLAGS.max_workers, spawn) as pool, tqdm(unit="run") as progress:
        queued = [run for name in FLAGS.workloads for run in missing(table, name)]
        progress.total = len(queued) + len(SEEDS) * len({name for name, *_ in queued})
        running = {pool.submit(run, *arguments): arguments for arguments in queued}
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name, *_ = arguments = running.pop(future)
                    row = dict(zip(RUN, arguments, strict=True)) | future.result()
                    table = pd.concat([table, pd.DataFrame([row])], ignore_index=True)
                    table.to_csv(TABLE, index=False, float_format="%.6g")
                    progress.update()
                    if name not in {other for other, *_ in running.values()}:
                        running |= {pool.submit(run, *more): more for more in missing(table, name)}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    print(targets(table).to_string())


if __name__ == "__main__":
    flags.DEFINE_list("workloads", list(WORKLOADS), "workloads to set targets for")
    flags.DEFINE_integer("max_workers", 2, "number of single-threaded processes", lower_bound=1)
    app.run(main)
