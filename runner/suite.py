"""`python -m runner.suite`: run several submissions on several workloads, score them as AlgoPerf does, and write a report.

Trials are in EXPERIMENT_DIR/SUBMISSION/study_K/WORKLOAD_pytorch/trial_N, where `runner.score` reads them. Each is a separate
`python -m runner` process whose flags are recorded in its folder. A trial ends when both targets are reached, after
step_hint / 0.75 steps (AlgoPerf's budget: its step_hint is three quarters of the steps that fit in the time), or when the
workload's time is up. The same command resumes a suite: it keeps finished trials, resumes interrupted ones, and retries failed
ones.
"""

import collections
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
from absl import app, flags
from tqdm import tqdm

from .logs import latest_checkpoint
from .loop import has_ended
from .report import last_line, write_report
from .search_space import read_points
from .workloads import WORKLOADS, workload_class

RUNNER = Path(__file__).parent
OURS = f"shampoo={RUNNER.parent / 'submission.py'}:{RUNNER / 'tuning_search_space.json'}"
BASELINES = sorted(str(path) for path in RUNNER.glob("baselines/*/submission.py"))
QUICK = ["fsdd_lstm", "mnist_vit", "solubility_gnn"], 2  # workloads, trials
TRIAL_TIMEOUT = 1800  # seconds; a trial that hangs counts as failed

FLAGS = flags.FLAGS


class Entry(NamedTuple):
    """A submission, its search space, and its name in the tables."""

    name: str
    submission: Path
    search_space: Path


class TrialRun(NamedTuple):
    """A trial to run: point `number`, counted from 1, of the entry's search space."""

    entry: Entry
    study: int
    workload: str
    number: int

    def folder(self, root: Path) -> Path:
        """Return the folder of the trial's files."""
        return root / self.entry.name / f"study_{self.study}" / f"{self.workload}_pytorch" / f"trial_{self.number}"


def parse_entry(text: str) -> Entry:
    """Parse [NAME=]PATH[:SEARCH_SPACE]. The default name is that of the file's folder; the default search space is
    tuning_search_space.json in that folder.

    Raise ValueError for a file that does not exist, or a name that cannot be the name of a folder.
    """
    name, _, paths = text.rpartition("=")
    if name and (Path(name).name != name or name == ".."):
        raise ValueError(f"--submissions has the name {name!r}; it must be a plain folder name, without slashes")
    path, _, space = paths.partition(":")
    submission = Path(path).expanduser().resolve()
    search_space = Path(space).expanduser().resolve() if space else submission.with_name("tuning_search_space.json")
    for file in (submission, search_space):
        if not file.is_file():
            raise ValueError(f"--submissions has {text!r}, but there is no file {file}; it must be [NAME=]PATH[:SEARCH_SPACE]")
    return Entry(name or submission.parent.name, submission, search_space)


def plan(
    entries: Sequence[Entry], workloads: Sequence[str], num_studies: int, num_trials: int, rng_seed: int, root: Path
) -> list[TrialRun]:
    """Return all trials, ordered by study, then by workload.

    Raise ValueError for an unknown workload, a repeated name, a search space with too few points, or a trial folder that holds
    another point.
    """
    for workload in workloads:
        workload_class(workload)
    if repeated := [name for name, count in collections.Counter(entry.name for entry in entries).items() if count > 1]:
        raise ValueError(f"--submissions has {repeated} more than once; give them names: NAME=PATH[:SEARCH_SPACE]")
    points = {
        (entry, study): read_points(entry.search_space, num_trials, rng_seed + study)
        for entry in entries
        for study in range(1, num_studies + 1)
    }
    for (entry, _), space in points.items():
        if len(space) < num_trials:
            raise ValueError(
                f"{entry.search_space} has {len(space)} points; --num_tuning_trials={num_trials} needs at least {num_trials}"
            )
    runs = [
        TrialRun(entry, study, workload, number)
        for study in range(1, num_studies + 1)
        for workload in workloads
        for entry in entries
        for number in range(1, num_trials + 1)
    ]
    for run in runs:
        saved = run.folder(root) / "hparams.json"
        if saved.exists() and json.loads(saved.read_text()) != points[run.entry, run.study][run.number - 1]._asdict():
            raise ValueError(
                f"{saved} is not point {run.number} of {run.entry.search_space}; give another --experiment_dir, or the search "
                "space that the suite was started with"
            )
    return runs


def is_finished(folder: Path) -> bool:
    """Return True if a trial has ended without an error."""
    checkpoint = None if (folder / "error.txt").exists() else latest_checkpoint(folder, torch.device("cpu"))
    return checkpoint is not None and has_ended(checkpoint["train_state"])


def command(run: TrialRun, root: Path) -> list[str]:
    """Return the command line that runs a trial."""
    return [
        *(sys.executable, "-m", "runner"),
        f"--workload={run.workload}",
        f"--submission_path={run.entry.submission}",
        f"--tuning_search_space={run.entry.search_space}",
        f"--num_tuning_trials={run.number}",
        f"--hparam_start_index={run.number - 1}",
        f"--experiment_dir={root / run.entry.name}",
        f"--experiment_name=study_{run.study}",
        f"--max_global_steps={round(workload_class(run.workload).step_hint / 0.75)}",
        f"--eval_every_steps={FLAGS.eval_every_steps}",
        f"--rng_seed={FLAGS.rng_seed + run.study}",
        "--resume_last_run",
    ]


def run_trial(run: TrialRun, root: Path, threads: int) -> str | None:
    """Run a trial to its end. If it fails, return the last line of its error; error.txt in its folder has the full error."""
    folder = run.folder(root)
    if folder.exists() and not any(folder.glob("checkpoint_*")):
        shutil.rmtree(folder)  # there is no checkpoint to resume from
    error_file = folder / "error.txt"
    error_file.unlink(missing_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    try:
        result = subprocess.run(
            command(run, root),
            cwd=RUNNER.parent,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TRIAL_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        failure = str(error)
    else:
        failure = f"{result.stdout}{result.stderr}\nexit status {result.returncode}" if result.returncode else ""
    if failure and not error_file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        error_file.write_text(failure)
    return last_line(error_file) if error_file.exists() else None


def run_trials(runs: Sequence[TrialRun], root: Path, max_workers: int) -> None:
    """Run the trials that are not finished, `max_workers` at a time, and print those that fail."""
    threads = max(1, (os.cpu_count() or 1) // max_workers)
    left = [run for run in runs if not is_finished(run.folder(root))]
    print(f"{len(runs)} trials, {len(runs) - len(left)} finished; {max_workers} at a time, {threads} threads each", flush=True)
    with ThreadPoolExecutor(max_workers) as pool, tqdm(total=len(left), unit="trial", smoothing=0, dynamic_ncols=True) as bar:
        futures = {pool.submit(run_trial, run, root, threads): run for run in left}
        try:
            for future in as_completed(futures):
                if failure := future.result():
                    tqdm.write(f"failed: {futures[future].folder(root)}: {failure}", file=sys.stdout)
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            sys.exit("interrupted; run the same command again to resume")


def main(_: Sequence[str]) -> None:
    """Check everything that can be checked before the first trial, run the trials, and write the report."""
    workloads, num_trials = QUICK if FLAGS.quick else (FLAGS.workloads, FLAGS.num_tuning_trials)
    root = Path(FLAGS.experiment_dir).expanduser().resolve()
    try:
        entries = [parse_entry(text) for text in FLAGS.submissions]
        names = list(WORKLOADS) if workloads == ["all"] else workloads
        runs = plan(entries, names, FLAGS.num_studies, num_trials, FLAGS.rng_seed, root)
    except ValueError as error:
        sys.exit(f"error: {error}")
    root.mkdir(parents=True, exist_ok=True)
    run_trials(runs, root, FLAGS.max_workers)
    try:
        table = write_report(root, root / "report")
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"\n{table}\nreport: {root / 'report' / 'README.md'}")


def define_flags() -> None:
    """Define the flags of this command."""
    flags.DEFINE_list("submissions", [OURS, *BASELINES], "submissions to run, each as [NAME=]PATH[:SEARCH_SPACE]")
    flags.DEFINE_list("workloads", ["all"], f"workloads to run: all, or any of {', '.join(WORKLOADS)}")
    flags.DEFINE_integer("num_studies", 1, "number of repetitions, each with another seed", lower_bound=1)
    flags.DEFINE_integer("num_tuning_trials", 5, "number of points to take from each search space", lower_bound=1)
    flags.DEFINE_integer("eval_every_steps", 25, "evaluate after the first step and every N steps", lower_bound=1)
    flags.DEFINE_integer("rng_seed", 0, "study K uses the seed rng_seed + K for all submissions", lower_bound=0)
    flags.DEFINE_integer("max_workers", os.cpu_count() or 1, "number of trials at a time; they share the cores", lower_bound=1)
    flags.DEFINE_boolean("quick", False, f"run only {', '.join(QUICK[0])}, {QUICK[1]} trials each")
    flags.DEFINE_string("experiment_dir", None, "folder for logs and the report; a suite found in it is resumed", required=True)


if __name__ == "__main__":
    define_flags()
    app.run(main)
