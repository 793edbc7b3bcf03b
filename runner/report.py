"""The table and the picture of a run's trials."""

from pathlib import Path
from typing import Any

import pandas as pd

from .files import read_json
from .logs import LOGS, ended, numbered, read_rows
from .plots import Workload, colors, plot_curves
from .workloads.base import LaptopWorkload

Trials = dict[int, tuple[dict[str, Any], pd.DataFrame, str]]  # number -> hyperparameters, evaluations, what ended it


def read_trials(folder: Path, metric: str) -> tuple[Trials, list[str]]:
    """Return the trials of a run that were evaluated at least once, in order of their numbers, and what cannot be read."""
    trials, problems = {}, []
    for trial in numbered(folder, "trial_"):
        if not (trial / LOGS[1]).exists():
            continue
        try:
            evaluations = read_rows(trial / LOGS[1], ("global_step", "score", metric))
            content = read_json(trial / "hparams.json"), evaluations, ended(trial)
        except (OSError, ValueError) as error:
            problems.append(f"{trial.name} is left out of the table: {error}; correct the file")
            continue
        if len(evaluations):
            trials[int(trial.name.removeprefix("trial_"))] = content
    return trials, problems


def first_reaching_target(workload: Workload, evaluations: pd.DataFrame) -> pd.Series | None:
    """Return the first evaluation that reached the validation target, or None."""
    metric, target = evaluations[f"validation/{workload.target_metric_name}"], workload.validation_target_value
    reached = metric > target if workload.higher_is_better else metric < target
    return evaluations.loc[reached.idxmax()] if reached.any() else None


def trial_table(workload: LaptopWorkload, trials: Trials) -> pd.DataFrame:
    """Return a table with one column per trial: the hyperparameters that differ between trials, steps and seconds to the
    target, the best validation metric, the step of the last evaluation, and what ended the trial ("-" if it has not ended).
    """
    metric = f"validation/{workload.target_metric_name}"
    columns = {}
    for number, (point, evaluations, reason) in trials.items():
        hit = first_reaching_target(workload, evaluations)
        best = evaluations[metric].max() if workload.higher_is_better else evaluations[metric].min()
        columns[f"trial {number}"] = {
            **{format_value(name): format_value(value) for name, value in point.items()},
            "steps to target": "-" if hit is None else str(int(hit["global_step"])),
            "seconds to target": "-" if hit is None else f"{hit['score']:.1f}",
            f"best {metric}": f"{best:.4f}",
            "steps at the last evaluation": str(int(evaluations["global_step"].iloc[-1])),
            "ended by": reason,
        }
    table = pd.DataFrame(columns)
    points = [point for point, *_ in trials.values()]
    same = [format_value(name) for name in points[0] if all(point.get(name) == points[0][name] for point in points)]
    return table.drop(index=same)


def format_value(value: Any) -> str:
    """Format a float with four significant digits, and other values with `str`; with `repr` if a terminal might obey them."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if text.isprintable() else repr(text)


def plot_trials(workload: LaptopWorkload, name: str, trials: Trials, path: Path) -> None:
    """Plot the validation metric of each trial against submission time, with the target, and save the plot as a PNG."""
    metric = f"validation/{workload.target_metric_name}"
    curves = {f"trial {number}": (evaluations["score"], evaluations[metric]) for number, (_, evaluations, _) in trials.items()}
    plot_curves({name: (workload, curves)}, "submission time in seconds", colors(list(curves)), path)


def format_target(workload: Workload) -> str:
    """Return the validation target as text, such as "accuracy > 0.98"."""
    return f"{workload.target_metric_name} {'>' if workload.higher_is_better else '<'} {workload.validation_target_value:g}"
