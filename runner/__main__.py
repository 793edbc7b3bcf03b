"""`python -m runner`: run a submission on a workload, with the flags of AlgoPerf's submission runner."""

import sys
import traceback
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from tqdm import tqdm

from . import ALGOPERF, distributed
from .command import run
from .data import DataError
from .files import create, locked, replacing
from .logs import MetricLogger, experiment_folder, make_folder
from .loop import Settings, run_trial
from .report import first_reaching_target, format_target, plot_trials, read_trials, trial_table
from .resume import check_trial, prepare_trial
from .search_space import load_space, read_points
from .submissions import check_point, describe, known_batch_size, load_submission
from .workloads import WORKLOADS, load_workload, short_name
from .workloads.base import LaptopWorkload

FLAGS = flags.FLAGS
flags.DEFINE_string("workload", None, f"one of {', '.join(WORKLOADS)}, or path/to/file.py:Class", required=True)
flags.DEFINE_string("submission_path", None, "Python file of the submission", required=True)
flags.DEFINE_string("tuning_search_space", None, "JSON file: a list of points, or a range per hyperparameter")
flags.DEFINE_string("experiment_dir", None, "folder that holds all experiments", required=True)
flags.DEFINE_string("experiment_name", None, "name of this experiment: a folder in experiment_dir", required=True)
flags.DEFINE_integer("num_tuning_trials", 1, "number of points to take from the search space", lower_bound=1)
flags.DEFINE_integer("hparam_start_index", None, "index of the first point to run, from 0", lower_bound=0)
flags.DEFINE_integer("hparam_end_index", None, "index of the point to stop before", lower_bound=1)
flags.DEFINE_integer("max_global_steps", None, "end each trial after this many steps", lower_bound=1)
flags.DEFINE_integer(
    "eval_every_steps",
    None,
    "evaluate after the first step and every N steps instead of by the clock (not an AlgoPerf flag)",
    lower_bound=1,
)
flags.DEFINE_integer(
    "rng_seed",
    None,
    "seed for weights and data order (default: random), and for sampling from a search space of ranges (default: 0)",
    lower_bound=0,
)
flags.DEFINE_boolean("save_checkpoints", True, "save model and optimizer at every evaluation")
flags.DEFINE_boolean("save_intermediate_checkpoints", False, "keep all checkpoints, not only the latest (AlgoPerf: true)")
flags.DEFINE_boolean("resume_last_run", False, "resume an experiment from its checkpoints")
flags.DEFINE_boolean("overwrite", False, "replace an experiment of the same name")
flags.DEFINE_boolean("torch_compile", False, "compile the model (AlgoPerf: true)")
flags.DEFINE_enum("framework", "pytorch", ["pytorch"], "PyTorch only")
flags.DEFINE_enum(
    "tuning_ruleset",
    "external",
    ["external", "self"],
    "external: a trial per point of the search space; self: one trial without hyperparameters, with 1.5 times the time",
)

IGNORED_FLAGS = {  # accepted so that AlgoPerf's command lines work unchanged
    "data_dir": "the data ships inside packages",
    "imagenet_v2_data_dir": "no workload uses ImageNet",
    "librispeech_tokenizer_vocab_path": "no workload uses a tokenizer",
    "pytorch_eval_num_workers": "there are no loader processes",
}
IGNORED_SWITCHES = {
    "set_pytorch_max_split_size": "models are small",
    "append_timestamp": "--overwrite and --resume_last_run decide what happens to an experiment of the same name",
    "use_wandb": "metrics go to CSV files and TensorBoard",
    "profile": "there is no profiler",
    "skip_evals": "evaluations are cheap",
}
for _name, _reason in IGNORED_FLAGS.items():
    flags.DEFINE_string(_name, None, f"accepted and ignored: {_reason}")
for _name, _reason in IGNORED_SWITCHES.items():
    flags.DEFINE_boolean(_name, None, f"accepted and ignored: {_reason}")


def print_rank_0(text: str) -> None:
    """Print a line, above the progress line if there is one. Ranks other than 0 print nothing."""
    if distributed.rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()


def read_space() -> list[Any]:
    """Return the points of the search space or, with --tuning_ruleset=self, the only point, which is None as in AlgoPerf.

    Raise ValueError like `read_points`, or if the search space does not fit the ruleset.
    """
    if FLAGS.tuning_ruleset == "self":
        if FLAGS.tuning_search_space:
            raise ValueError("--tuning_ruleset=self has no search space; omit --tuning_search_space")
        return [None]
    if not FLAGS.tuning_search_space:
        raise ValueError("--tuning_search_space is missing; give a JSON file, or --tuning_ruleset=self if there is none")
    path, asked = FLAGS.tuning_search_space, FLAGS.num_tuning_trials
    points = read_points(path, asked, FLAGS.rng_seed or 0)
    space = load_space(path)
    if isinstance(space, list) and len(space) > asked:
        print_rank_0(f"{path} has {len(space)} points; --num_tuning_trials={asked} takes the first {asked}")
    return points


class Progress:
    """A progress line with step, loss, metric, and an upper bound on the time left. Without a terminal, print one line per
    evaluation instead.
    """

    def __init__(self, title: str, workload: LaptopWorkload):
        self._title, self._metric = title, workload.target_metric_name
        self._budget = workload.max_allowed_runtime_sec
        self._first: tuple[float, int] | None = None  # seconds and step of the first call
        quiet = distributed.rank() > 0 or not sys.stderr.isatty()
        self._line = tqdm(bar_format="{desc}", leave=False, dynamic_ncols=True, disable=quiet)

    def __call__(self, step: int, logger: MetricLogger, evaluated: bool, seconds: float) -> None:
        """Show the latest metrics after a step; `seconds` is the submission time so far."""
        names = {"loss": "loss", f"validation/{self._metric}": f"validation {self._metric}"}
        metrics = [f"{shown} {logger.last[name]:.4g}" for name, shown in names.items() if name in logger.last]
        if self._line.disable:
            if evaluated:
                print_rank_0("  ".join([self._title, f"step {step}", *metrics, f"{seconds:.1f} s"]))
            return
        self._first = self._first or (seconds, step)
        left = self._budget - seconds
        if FLAGS.max_global_steps and step > self._first[1]:
            per_step = (seconds - self._first[0]) / (step - self._first[1])
            left = min(left, per_step * (FLAGS.max_global_steps - step))
        self._line.set_description_str(
            "  ".join([self._title, f"step {step}", *metrics, f"at most {left:.0f} s left"]), refresh=False
        )
        self._line.update()

    def close(self) -> None:
        """Remove the line."""
        self._line.close()


def check_points(workload: LaptopWorkload, submission: ModuleType, points: list[Any]) -> None:
    """Raise ValueError for an invalid or incomplete point, before the first trial."""
    for i, point in enumerate(points, start=1):
        where = f"{FLAGS.tuning_search_space}, point {i}" if FLAGS.tuning_search_space else FLAGS.submission_path
        check_point(workload, submission, point, where)


def prepare_folder(points: list[Any], locks: ExitStack) -> Path:
    """Return the folder of the run; create it if needed, and lock it. Raise ValueError or OSError if it cannot be used."""
    if FLAGS.resume_last_run and FLAGS.overwrite:
        raise ValueError("--resume_last_run and --overwrite exclude each other; pass one to resume the run or to replace it")
    folder = experiment_folder(FLAGS.experiment_dir, FLAGS.experiment_name, short_name(FLAGS.workload), FLAGS.overwrite)
    create(folder.parent)
    locks.enter_context(locked(folder))
    if FLAGS.resume_last_run:
        for i, point in select_points(points):
            check_trial(folder / f"trial_{i}", as_dict(point), FLAGS.rng_seed)
    make_folder(folder, FLAGS.resume_last_run, FLAGS.overwrite)
    return folder


def as_dict(point: Any) -> dict[str, Any]:
    """Return a point as it is in hparams.json."""
    return {} if point is None else point._asdict()


def select_points(points: list[Any]) -> list[tuple[int, Any]]:
    """Return the points from --hparam_start_index to --hparam_end_index, each with its number, counted from 1."""
    return list(islice(enumerate(points, start=1), FLAGS.hparam_start_index, FLAGS.hparam_end_index))


def run_trials(workload: LaptopWorkload, submission: ModuleType, points: list[Any], batch_size: int, folder: Path) -> list[str]:
    """Run the selected points one after another. Return what went wrong.

    If a trial fails, its error goes to error.txt, and the next one starts. Ctrl-C ends the run.
    """
    settings = Settings(
        batch_size=batch_size,
        max_global_steps=FLAGS.max_global_steps,
        eval_every_steps=FLAGS.eval_every_steps,
        save_checkpoints=FLAGS.save_checkpoints,
        save_intermediate_checkpoints=FLAGS.save_intermediate_checkpoints,
        torch_compile=FLAGS.torch_compile,
        flags=FLAGS.flag_values_dict(),
    )
    selected, failed, problems = select_points(points), [], []
    for i, point in selected:
        trial = folder / f"trial_{i}"
        progress = Progress(f"trial {i}/{len(points)}", workload)
        try:
            prepared = prepare_trial(trial, as_dict(point), FLAGS.rng_seed) if distributed.rank() == 0 else None
            seed = distributed.broadcast(prepared)
            if seed is not None:
                run_trial(workload, submission, point, seed, trial, settings, progress)
        except KeyboardInterrupt:
            problems.append(f"interrupted in trial {i}; pass --resume_last_run to go on from its last checkpoint")
            break
        except (Exception, SystemExit) as error:
            failed.append(trial.name)
            print_rank_0(f"trial {i} failed: {describe(error)}; see {write_error(trial)}")
            if distributed.world_size() > 1:
                raise  # other ranks may be waiting for this one; torchrun then stops them
        finally:
            progress.close()
    if failed:
        problems.append(f"{len(failed)} of {len(selected)} trials failed: {', '.join(failed)}")
    return problems


def write_error(trial: Path) -> str:
    """Write the traceback of the current exception to error.txt in the trial's folder, and return its path. If the disk is
    full, print the traceback, and return "above".
    """
    text = traceback.format_exc()
    try:
        with replacing(trial / "error.txt") as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError:
        print(text, file=sys.stderr)
        return "above"
    return str(trial / "error.txt")


def summarize(workload: LaptopWorkload, folder: Path) -> list[str]:
    """Print the table of trials, plot their validation metric, and print where to find the files. Return what went wrong."""
    trials, problems = read_trials(folder, f"validation/{workload.target_metric_name}")
    if not trials:
        return [*problems, "no trial was evaluated"]
    failed = sum(1 for _ in folder.glob("trial_*/error.txt"))
    hits = sum(first_reaching_target(workload, evaluations) is not None for _, evaluations, _ in trials.values())
    print_rank_0(f"\n{trial_table(workload, trials).to_string()}\n")
    print_rank_0(
        f"{hits} of {len(trials)} trials reached the target, validation {format_target(workload)}"
        + (f"; {failed} failed" if failed else "")
    )
    picture = folder / "validation.png"
    try:
        plot_trials(workload, short_name(FLAGS.workload), trials, picture)
    except OSError as error:
        return [*problems, f"the picture cannot be written: {error}"]
    print_rank_0(f"picture: {picture}\nTensorBoard: tensorboard --logdir {folder}")
    return problems


def load(name: str) -> tuple[LaptopWorkload, ModuleType, list[Any], int]:
    """Return the workload of that name, the submission, the points of the search space, and the batch size.

    Raise ValueError or DataError if the flags name none, or none that fit together.
    """
    workload = load_workload(name)
    workload.max_allowed_runtime_sec *= 1.5 if FLAGS.tuning_ruleset == "self" else 1
    submission = load_submission(FLAGS.submission_path)
    points = read_space()
    if not select_points(points):
        raise ValueError(f"--hparam_start_index and --hparam_end_index leave none of the {len(points)} points")
    batch_size = known_batch_size(submission, short_name(name))
    if batch_size is None:
        batch_size = workload.default_batch_size
        print_rank_0(f"get_batch_size does not know {short_name(name)}; using the workload's batch size, {batch_size}")
    check_points(workload, submission, points)
    return workload, submission, points, batch_size


def main(_: list[str]) -> None:
    """Check everything that can be checked before the first step, run the trials, and print a summary. The exit status is 1 if
    anything went wrong.
    """
    distributed.start()
    print_rank_0(ALGOPERF)
    for name, reason in (IGNORED_FLAGS | IGNORED_SWITCHES).items():
        if FLAGS[name].present:
            print_rank_0(f"--{name} has no meaning here: {reason}")
    with ExitStack() as locks:
        try:
            workload, submission, points, batch_size = load(FLAGS.workload)
            folder = distributed.broadcast(prepare_folder(points, locks) if distributed.rank() == 0 else None)
        except (OSError, ValueError, DataError) as error:
            sys.exit(f"error: {error}")
        problems = run_trials(workload, submission, points, batch_size, folder)
        if distributed.rank() == 0 and (problems := [*problems, *summarize(workload, folder)]):
            sys.exit(f"error: {'; '.join(problems)}")


if __name__ == "__main__":
    run(main)
