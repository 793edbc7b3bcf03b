"""Files of a run, with AlgoPerf's layout and names: `EXPERIMENT_DIR/EXPERIMENT_NAME/WORKLOAD_pytorch/trial_N/`."""

import datetime
import io
import json
import os
import platform
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pandas.api.types import is_numeric_dtype
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from .files import check_file, read_json, read_text, replacing


def experiment_folder(experiment_dir: str, name: str, workload: str, overwrite: bool) -> Path:
    """Return the folder of a run, which may not exist.

    Raise ValueError for a name that leads outside `experiment_dir`, or through a link to what `overwrite` must not replace.
    """
    root = Path(experiment_dir).expanduser().resolve()
    named = root / name / f"{workload}_pytorch"
    folder = named.resolve()
    if overwrite and folder != Path(os.path.normpath(named)):
        raise ValueError(f"{named} leads through a link to {folder}, which --overwrite would replace; remove the link")
    if not name or root not in folder.parents or folder.parent == root:
        raise ValueError(f"the experiment name is {name!r}; it must name a folder inside {root}")
    return folder


def make_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Create the folder of a run. Keep one that exists if `resume` is set, and replace it if `overwrite` is set.

    Raise FileExistsError if it exists and neither is set, or if it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} must be a folder; move the file away, or pass another --experiment_name")
    if folder.exists() and overwrite:
        old = folder.with_name(f"old_{folder.name}")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)  # what is removed halfway must not be resumed
        shutil.rmtree(old)
    elif folder.exists() and not resume:
        raise FileExistsError(
            f"{folder} exists; pass --resume_last_run to resume it, --overwrite to replace it, or another --experiment_name"
        )
    folder.mkdir(parents=True, exist_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object; values that JSON does not support are written as strings."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(dict(content), indent=2, default=str), encoding="utf-8")


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


def starts(trial: Path) -> int:
    """Return how many times a trial was started: one more than the number of its last meta_data_K.json, or 0."""
    files = numbered(trial, "meta_data_", ".json")
    return 1 + int(files[-1].stem.removeprefix("meta_data_")) if files else 0


def ended(trial: Path) -> str:
    """Return what ended a trial, or "-" if it has not ended. Raise ValueError if that cannot be read."""
    files = numbered(trial, "meta_data_", ".json")
    return str(read_json(files[-1]).get("ended", "-")) if files else "-"


def numbered(folder: Path, prefix: str, suffix: str = "") -> list[Path]:
    """Return the paths in a folder that are named PREFIX, a number, and SUFFIX, in order of the numbers. Ignore all others."""
    pattern = re.compile(f"{re.escape(prefix)}([0-9]+){re.escape(suffix)}")
    found = [(int(match[1]), path) for path in folder.glob(f"{prefix}*") if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


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
    value. It names runs by their folders, so the event file is in one that is named after the learning rate. A resumed run
    goes on after the evaluation at `first_step`. If `durable`, rows survive a crash of the machine.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        target: str,
        higher_is_better: bool,
        hyperparameters: Mapping[str, Any],
        durable: bool = False,
    ):
        self.last: dict[str, float] = {}  # latest value of every metric, for the progress line
        self._durable = durable
        self._folder, self._target, self._best = folder, target, "max" if higher_is_better else "min"
        rate = hyperparameters.get("learning_rate")
        run = f"lr {rate:.3g}" if isinstance(rate, (int, float)) else ""
        self._events = SummaryWriter(str(folder / run), purge_step=first_step)
        self._best_tag = f"{tensorboard_tag(target, target)} (best so far)"
        shown = {name: x if isinstance(x, (int, float)) else str(x) for name, x in hyperparameters.items()}
        *begin, self._end = hparams(shown, {self._best_tag: 0.0})
        for summary in begin:
            self._events._get_file_writer().add_summary(summary)
        if first_step > 0 and (folder / LOGS[1]).exists():  # TensorBoard hides what it has from purge_step on
            evaluations = read_rows(folder / LOGS[1])
            for _, row in evaluations[evaluations["global_step"] == first_step].iterrows():
                self._show(row.dropna().to_dict(), first_step, evaluations)

    def append_scalar_metrics(
        self, metrics: dict[str, float], global_step: int, preemption_count: int | None = None, is_eval: bool = False
    ) -> None:
        """Append one row. A new file has sorted columns; columns that appear later are added at the end."""
        row = {**metrics, "global_step": global_step}
        if preemption_count is not None:
            row["preemption_count"] = preemption_count
        for name in LOGS[: 1 + is_eval]:
            table = append_row(self._folder / name, row, self._durable)
        self._show(row, global_step, table if is_eval else None)
        self.last.update(row)

    def _show(self, row: Mapping[str, float], global_step: int, evaluations: pd.DataFrame | None) -> None:
        """Add a row to the event file, and the best value so far if there are `evaluations`."""
        for name, value in row.items():
            self._events.add_scalar(tensorboard_tag(name, self._target), value, global_step)
        if evaluations is not None:
            best = pd.to_numeric(evaluations[self._target]).agg(self._best)
            self._events.add_scalar(self._best_tag, best, global_step)
        self._events.flush()

    def finish(self) -> None:
        """Mark the run as ended, and close the event file."""
        self._events._get_file_writer().add_summary(self._end)
        self._events.close()


LOGS = ("measurements.csv", "eval_measurements.csv")


def read_csv(path: Path, **options: Any) -> pd.DataFrame:
    """Return the rows of a log. Raise ValueError for another kind of file."""
    try:
        return pd.read_csv(StringIO(read_text(path)), **options)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_rows(path: Path, columns: Sequence[str] = ("global_step",)) -> pd.DataFrame:
    """Return the rows of a log. Raise ValueError for another kind of file, or if one of the columns is missing or text."""
    table = read_csv(path)
    if missing := [name for name in columns if name not in table]:
        raise ValueError(f"{path} lacks the columns {missing}")
    if text := [name for name in columns if len(table) and not is_numeric_dtype(table[name])]:
        raise ValueError(f"{path} must have numbers in the columns {text}")
    return table


def as_written(path: Path) -> pd.DataFrame:
    """Return the rows of a log as text, so that no digit changes when they are written again; none if there is no file."""
    return read_csv(path, dtype=str, keep_default_na=False) if path.exists() else pd.DataFrame()


def append_row(path: Path, row: Mapping[str, float], durable: bool = False) -> pd.DataFrame:
    """Append a row to a log, adding columns if needed, and return all rows, the earlier ones as text."""
    new = pd.DataFrame([row], columns=sorted(row)).astype(object)
    table = pd.concat([as_written(path), new], ignore_index=True)
    write_rows(path, table, durable)
    return table


def write_rows(path: Path, table: pd.DataFrame, durable: bool = True) -> None:
    """Write a log."""
    with replacing(path, durable) as partial:
        table.to_csv(partial, index=False)


def count_rows(trial: Path) -> dict[str, int]:
    """Return the number of rows of each log."""
    return {name: len(as_written(trial / name)) for name in LOGS}


def keep_rows(trial: Path, counts: Mapping[str, int]) -> None:
    """Drop the rows that were logged after a checkpoint, before which there were `counts`. Raise ValueError for fewer rows."""
    for name, count in counts.items():
        table = as_written(trial / name)
        if len(table) < count:
            raise ValueError(
                f"{trial / name} has {len(table)} rows, and had {count} at the last checkpoint; restore it, or move {trial} "
                "away to begin the trial anew"
            )
        if len(table) > count:
            write_rows(trial / name, table[:count])


def save_checkpoint(folder: Path, state: Mapping[str, Any], keep_others: bool) -> None:
    """Write checkpoint_STEP, then remove all other checkpoints but the one before it, unless `keep_others` is set."""
    content = io.BytesIO()  # torch.save to a full disk raises an error that does not say so
    torch.save(dict(state), content)
    with replacing(folder / f"checkpoint_{state['global_step']}") as partial:
        partial.write_bytes(content.getbuffer())
    for old in () if keep_others else checkpoints(folder)[:-2]:
        old.unlink()


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the latest last."""
    return numbered(folder, "checkpoint_")


def read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Return the content of a checkpoint. It cannot run code: it is loaded with `weights_only=True`, and must be a zip archive,
    since that flag is not safe in torch 2.5.1 for files of older kinds.

    Raise ValueError if it is damaged, or not a checkpoint of the step in its name.
    """
    try:
        check_file(path, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            sizes = [entry.file_size for entry in archive.infolist()]
            if file.seek(0) or file.read(4) != b"PK\3\4" or sum(sizes) > path.stat().st_size or archive.testzip():
                raise ValueError("it is damaged")
        content = torch.load(path, map_location=device, weights_only=True)
        if f"checkpoint_{content['global_step']}" != path.name:
            raise ValueError(f"it is of step {content['global_step']}")
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a whole checkpoint: {' '.join(str(error).split())[:200]}") from error
    return dict(content)
