"""What a run came to: a table of its trials and a picture of their validation metric."""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from .workloads.base import LaptopWorkload

Trials = dict[int, tuple[dict[str, Any], pd.DataFrame]]  # number -> hyperparameters, evaluations


def read_trials(folder: Path) -> Trials:
    """Hyperparameters and evaluations of each trial of a run that was evaluated at least once."""
    numbers = sorted(int(path.name.removeprefix("trial_")) for path in folder.glob("trial_*"))
    trials = {}
    for number in numbers:
        path = folder / f"trial_{number}" / "eval_measurements.csv"
        if path.exists():
            trials[number] = (json.loads((path.parent / "hparams.json").read_text()), pd.read_csv(path))
    return trials


def to_target(workload: LaptopWorkload, evaluations: pd.DataFrame) -> pd.Series | None:
    """The first evaluation that reached the validation target, or None."""
    reached = [workload.has_reached_validation_target(row.to_dict()) for _, row in evaluations.iterrows()]
    return evaluations.iloc[reached.index(True)] if True in reached else None


def trial_table(workload: LaptopWorkload, trials: Trials) -> pd.DataFrame:
    """A column for each trial: the hyperparameters in which trials differ, what the target took, the best metric."""
    metric = f"validation/{workload.target_metric_name}"
    columns = {}
    for number, (point, evaluations) in trials.items():
        hit = to_target(workload, evaluations)
        best = evaluations[metric].max() if workload.higher_is_better else evaluations[metric].min()
        columns[f"trial {number}"] = {
            **{name: brief(value) for name, value in point.items()},
            "steps to target": "-" if hit is None else str(int(hit["global_step"])),
            "seconds to target": "-" if hit is None else f"{hit['score']:.1f}",
            f"best {metric}": f"{best:.4f}",
            "steps at the last evaluation": str(int(evaluations["global_step"].iloc[-1])),
        }
    table = pd.DataFrame(columns)
    points = [point for point, _ in trials.values()]
    same = [name for name in points[0] if all(point.get(name) == points[0][name] for point in points)]
    return table.drop(index=same)


def brief(value: Any) -> str:
    """Four digits of a float; else the value itself."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot_trials(workload: LaptopWorkload, name: str, trials: Trials, path: Path) -> None:
    """Draw the validation metric of each trial over its submission time, with the target, as a PNG.

    The axis shows the target and the better nine tenths of all values; first evaluations and diverging trials may leave it.
    """
    metric, target = f"validation/{workload.target_metric_name}", workload.validation_target_value
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (_, evaluations) in trials.items():
        axes.plot(evaluations["score"], evaluations[metric], marker="o", markersize=3, label=f"trial {number}")
    axes.axhline(target, color="black", linestyle="--", linewidth=1, label="target")
    values = pd.concat([pd.Series([target]), *(evaluations[metric] for _, evaluations in trials.values())])
    low, high = values.replace([math.inf, -math.inf], math.nan).quantile(
        [0.1, 1.0] if workload.higher_is_better else [0.0, 0.9]
    )
    axes.set_ylim(low - 0.1 * (high - low) - 1e-3, high + 0.1 * (high - low) + 1e-3)
    axes.set(xlabel="submission time in seconds", ylabel=metric, title=name)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
