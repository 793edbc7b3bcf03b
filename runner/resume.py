"""What `--resume_last_run` does with the trials that it finds."""

import os
from pathlib import Path
from typing import Any

import torch
from absl import logging

from .files import PARTIAL, read_json, set_aside
from .logs import LOGS, checkpoints, ended, read_checkpoint, read_rows, write_json

KEPT = ("hparams.json", "meta_data_0.json")  # hold the point and the seed of a trial, also of one that begins anew


def check_trial(trial: Path, point: dict[str, Any], rng_seed: int | None) -> None:
    """Raise ValueError if a trial cannot be resumed: it has another point, another seed if `rng_seed` is given, or files that
    cannot be read.
    """
    if trial.exists() and not trial.is_dir():
        raise ValueError(f"{trial} must be a folder; move the file away to begin the trial")
    try:
        saved = read_json(trial / "hparams.json") if (trial / "hparams.json").exists() else point
        seed = saved_seed(trial)
        if ended(trial) == "-" and checkpoints(trial):
            for path in (trial / name for name in LOGS):
                if path.exists():
                    read_rows(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}; correct the file, or move {trial} away to begin the trial anew") from error
    if saved != point:
        earlier, now = (
            {name: value for name, value in one.items() if name not in other or other[name] != value}
            for one, other in ((saved, point), (point, saved))
        )
        raise ValueError(
            f"{trial} was begun with the hyperparameters {earlier}, not {now}; give the search space that it was begun with, "
            "and --rng_seed if that has ranges, or another --experiment_name"
        )
    if None not in (seed, rng_seed) and seed != rng_seed:
        raise ValueError(f"{trial} was begun with --rng_seed={seed}, not {rng_seed}; omit the flag to resume")


def saved_seed(trial: Path) -> int | None:
    """Return the seed that a trial was begun with, or None if it was not begun. Raise ValueError if it cannot be read."""
    path = trial / "meta_data_0.json"
    if not path.exists():
        return None
    seed = read_json(path).get("rng_seed")
    if not isinstance(seed, int):
        raise ValueError(f"{path} has the rng_seed {seed!r}; it must be an integer")
    return seed


def prepare_trial(trial: Path, point: dict[str, Any], rng_seed: int | None) -> int | None:
    """Create the folder of a trial. Return its seed, or None if the trial has ended.

    Set aside checkpoints that cannot be read, as after a crash of the disk. Without one that can, the trial begins anew, and
    what it wrote before is set aside, too.
    """
    trial.mkdir(exist_ok=True)
    if ended(trial) != "-":
        return None
    for partial in trial.glob(f"{PARTIAL}*"):
        partial.unlink()  # of a process that was killed
    if not (trial / "hparams.json").exists():
        write_json(trial / "hparams.json", point)
    left = [path for path in trial.iterdir() if path.name not in KEPT and not path.name.startswith("set_aside_")]
    if left and usable_checkpoint(trial) is None:
        left = [path for path in left if path.exists()]
        logging.warning("%s has no checkpoint and begins anew; what it wrote before is in %s", trial, set_aside(left, trial))
    (trial / "error.txt").unlink(missing_ok=True)
    seeds = (saved_seed(trial), rng_seed, int.from_bytes(os.urandom(3)))
    return next(seed for seed in seeds if seed is not None)


def usable_checkpoint(trial: Path) -> Path | None:
    """Return the latest checkpoint that can be read, or None. Set aside the later ones."""
    for path in reversed(checkpoints(trial)):
        try:
            read_checkpoint(path, torch.device("cpu"))
        except ValueError as error:
            logging.warning("%s; it is in %s now", error, set_aside([path], trial))
        else:
            return path
    return None
