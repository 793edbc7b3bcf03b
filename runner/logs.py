"""Files of a run, with AlgoPerf's layout and names: `EXPERIMENT_DIR/EXPERIMENT_NAME/WORKLOAD_pytorch/trial_N/`."""

import datetime
import json
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams


def experiment_folder(experiment_dir: str, name: str, workload: str, resume: bool, overwrite: bool) -> Path:
    """Return the folder of a run; create it if needed.

    Raise ValueError for a name that leads outside `experiment_dir`, and FileExistsError if the folder exists and neither
    `resume` nor `overwrite` is set.
    """
    root = Path(experiment_dir).expanduser().resolve()
    folder = (root / name / f"{workload}_pytorch").resolve()
    if not name or root not in folder.parents or folder.parent == root:
        raise ValueError(f"the experiment name is {name!r}; it must name a folder inside {root}")
    if folder.exists() and overwrite:
        shutil.rmtree(folder)
    elif folder.exists() and not resume:
        raise FileExistsError(
            f"{folder} exists; pass --resume_last_run to resume it, --overwrite to replace it, or another --experiment_name"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object atomically; values that JSON does not support are written as strings."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(dict(content), indent=2, default=str))
    partial.replace(path)


def meta_data(workload: Any, rng_seed: int) -> dict[str, Any]:
    """Return the workload's scalar attributes, the machine, the versions, the seed, and the date."""
    names = [name for name in dir(workload) if not name.startswith("_") and name not in ("param_shapes", "model_params_types")]
    values = {name: getattr(workload, name) for name in names}
    return {
        **{f"workload.{name}": value for name, value in values.items() if isinstance(value, (bool, int, float, str))},
        "os_platform": platform.platform(),
        "python_version": platform.python_version(),
        "torch_version": torch.__version__,
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "gpu_count": torch.cuda.device_count(),
        "rng_seed": rng_seed,
        "date": datetime.date.today().isoformat(),
    }


def ended(trial: Path) -> str:
    """Return what ended a trial, or "-" if it has not ended."""
    files = sorted(trial.glob("meta_data_*.json"), key=lambda path: int(path.stem.removeprefix("meta_data_")))
    reason: str = json.loads(files[-1].read_text()).get("ended", "-")
    return reason


def cpu_name() -> str:
    """Return the name of the processor if /proc/cpuinfo has it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


CLOCK = ("accumulated_", "global_step", "preemption_count", "score", "total_duration")  # how metrics of time and progress begin


def tensorboard_tag(name: str, target: str) -> str:
    """Return the tag of a metric. TensorBoard groups tags by what precedes the slash, sorts the groups (capitals come first),
    and opens the first two: Target and Training.
    """
    if name == target:
        return f"Target/{name.replace('/', ' ')}"
    return name if "/" in name else f"{'clock' if name.startswith(CLOCK) else 'Training'}/{name}"


class MetricLogger:
    """Log metrics to measurements.csv and TensorBoard, and those of evaluations to eval_measurements.csv too.

    TensorBoard also gets the best value so far of the metric `target`, and for its HPARAMS tab the hyperparameters and that
    value. It names runs by their folders, so the event file is in one that is named after the learning rate.
    """

    def __init__(self, folder: Path, first_step: int, target: str, higher_is_better: bool, hyperparameters: Mapping[str, Any]):
        self.last: dict[str, float] = {}  # latest value of every metric, for the progress line
        self._folder, self._target, self._best = folder, target, "max" if higher_is_better else "min"
        run = f"lr {hyperparameters['learning_rate']:.3g}" if "learning_rate" in hyperparameters else ""
        self._events = SummaryWriter(str(folder / run), purge_step=first_step)
        self._best_tag = f"{tensorboard_tag(target, target)} (best so far)"
        shown = {name: x if isinstance(x, (int, float)) else str(x) for name, x in hyperparameters.items()}
        *begin, self._end = hparams(shown, {self._best_tag: 0.0})
        for summary in begin:
            self._events._get_file_writer().add_summary(summary)

    def append_scalar_metrics(
        self, metrics: dict[str, float], global_step: int, preemption_count: int | None = None, is_eval: bool = False
    ) -> None:
        """Append one row. A new file has sorted columns; columns that appear later are added at the end."""
        row = {**metrics, "global_step": global_step}
        if preemption_count is not None:
            row["preemption_count"] = preemption_count
        for name in ("measurements.csv", "eval_measurements.csv")[: 1 + is_eval]:
            table = append_row(self._folder / name, row)
        for name, value in row.items():
            self._events.add_scalar(tensorboard_tag(name, self._target), value, global_step)
        if is_eval:
            self._events.add_scalar(self._best_tag, table[self._target].agg(self._best), global_step)
        self._events.flush()
        self.last.update(row)

    def finish(self) -> None:
        """Mark the run as ended, and close the event file."""
        self._events._get_file_writer().add_summary(self._end)
        self._events.close()


def append_row(path: Path, row: Mapping[str, float]) -> pd.DataFrame:
    """Append a row to a CSV file atomically, adding columns if needed, and return all rows."""
    new = pd.DataFrame([row], columns=sorted(row))
    table = pd.concat([pd.read_csv(path), new]) if path.exists() else new
    partial = path.with_suffix(".partial")
    table.to_csv(partial, index=False)
    partial.replace(path)
    return table


def drop_rows_after(path: Path, global_step: int) -> None:
    """Drop the rows of a CSV file that were written after the checkpoint at `global_step`."""
    table = pd.read_csv(path)
    partial = path.with_suffix(".partial")
    table[table["global_step"] <= global_step].to_csv(partial, index=False)
    partial.replace(path)


def save_checkpoint(folder: Path, state: Mapping[str, Any], keep_others: bool) -> None:
    """Write checkpoint_STEP atomically, then remove all other checkpoints unless `keep_others` is set."""
    path = folder / f"checkpoint_{state['global_step']}"
    torch.save(dict(state), folder / "partial")
    (folder / "partial").replace(path)
    for other in () if keep_others else folder.glob("checkpoint_*"):
        if other != path:
            other.unlink()


def latest_checkpoint(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """Return the checkpoint with the most steps, or None. Loaded with `weights_only=True`, so it cannot run code."""
    paths = sorted(folder.glob("checkpoint_*"), key=lambda path: int(path.name.removeprefix("checkpoint_")))
    return torch.load(paths[-1], map_location=device, weights_only=True) if paths else None
