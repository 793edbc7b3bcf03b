"""`python -m runner`: run a submission on a workload, with the flags of AlgoPerf's submission runner."""

import collections
import importlib
import json
import os
import sys
import traceback
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import app, flags
from tqdm import tqdm

from . import ALGOPERF, distributed
from .data import DataError
from .logs import MetricLogger, experiment_folder, write_json
from .loop import Settings, run_trial
from .report import goal, plot_trials, read_trials, to_target, trial_table
from .search_space import read_points
from .workloads import WORKLOADS, load_workload
from .workloads.base import LaptopWorkload

FLAGS = flags.FLAGS
flags.DEFINE_string("workload", None, f"one of {', '.join(WORKLOADS)}", required=True)
flags.DEFINE_string("submission_path", None, "the submission's Python file", required=True)
flags.DEFINE_string("tuning_search_space", None, "JSON: a list of points, or a range for each hyperparameter", required=True)
flags.DEFINE_string("experiment_dir", None, "where experiments are kept", required=True)
flags.DEFINE_string("experiment_name", None, "a folder in experiment_dir", required=True)
flags.DEFINE_integer("num_tuning_trials", 1, "how many points to run", lower_bound=1)
flags.DEFINE_integer("hparam_start_index", None, "the first point to run, from 0", lower_bound=0)
flags.DEFINE_integer("hparam_end_index", None, "the point to stop before", lower_bound=1)
flags.DEFINE_integer("max_global_steps", None, "steps after which a trial ends", lower_bound=1)
flags.DEFINE_integer("eval_every_steps", None, "evaluate by steps, not by seconds (AlgoPerf has no such flag)", lower_bound=1)
flags.DEFINE_integer(
    "rng_seed",
    None,
    "seed of weights and data order (None: drawn anew) and of a search space of ranges (None: 0)",
    lower_bound=0,
)
flags.DEFINE_boolean("save_checkpoints", True, "save model and optimizer at every evaluation")
flags.DEFINE_boolean("save_intermediate_checkpoints", False, "keep all, not only the latest (AlgoPerf: true)")
flags.DEFINE_boolean("resume_last_run", False, "continue an experiment from its checkpoints")
flags.DEFINE_boolean("overwrite", False, "replace an experiment of the same name")
flags.DEFINE_boolean("torch_compile", False, "compile the model (AlgoPerf: true)")
flags.DEFINE_enum("framework", "pytorch", ["pytorch"], "PyTorch only")
flags.DEFINE_enum("tuning_ruleset", "external", ["external"], "external tuning only")

MEANINGLESS = {  # AlgoPerf's flags that a pasted command line may have
    "data_dir": "the data ships inside packages",
    "imagenet_v2_data_dir": "there is no ImageNet",
    "librispeech_tokenizer_vocab_path": "there is no tokenizer",
    "pytorch_eval_num_workers": "there are no loader processes",
}
MEANINGLESS_SWITCHES = {
    "set_pytorch_max_split_size": "models are small",
    "append_timestamp": "--overwrite and --resume_last_run say what becomes of an experiment of the same name",
    "use_wandb": "metrics go to CSV files and TensorBoard",
    "profile": "there is no profiler",
    "skip_evals": "evaluations are cheap",
}
for _name, _reason in MEANINGLESS.items():
    flags.DEFINE_string(_name, None, f"accepted and ignored: {_reason}")
for _name, _reason in MEANINGLESS_SWITCHES.items():
    flags.DEFINE_boolean(_name, None, f"accepted and ignored: {_reason}")


def say(text: str) -> None:
    """Print a line, above the progress line where there is one; of several ranks only the first does."""
    if distributed.rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()


def load_submission(path: str) -> ModuleType:
    """Import a submission as AlgoPerf does, by the path's dotted name from this folder; from its own folder if it is elsewhere.

    Raises ValueError if there is no such file, or it lacks a function of the API.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file() or file.suffix != ".py":
        raise ValueError(f"the submission path is {path!r}; it must be a Python file that exists")
    root = Path.cwd() if Path.cwd() in file.parents else file.parent
    sys.path.insert(0, str(root))
    module = importlib.import_module(".".join(file.relative_to(root).with_suffix("").parts))
    needed = ("get_batch_size", "init_optimizer_state", "update_params", "data_selection")
    if missing := [name for name in needed if not hasattr(module, name)]:
        raise ValueError(f"{path} lacks {', '.join(missing)}, which every submission must have")
    return module


def global_batch_size(submission: ModuleType, name: str, workload: LaptopWorkload) -> int:
    """The submission's batch size for the workload; the workload's own if the submission does not know it."""
    try:
        return submission.get_batch_size(name)
    except ValueError:
        return workload.default_batch_size


def trial_seed(folder: Path) -> int:
    """The seed of a trial: of the run that is continued, the flag, or a new one. Raises ValueError if the first two differ."""
    earlier = folder / "meta_data_0.json"
    if not earlier.exists():
        return int.from_bytes(os.urandom(3)) if FLAGS.rng_seed is None else FLAGS.rng_seed
    seed = json.loads(earlier.read_text())["rng_seed"]
    if FLAGS.rng_seed not in (None, seed):
        raise ValueError(f"{folder} was begun with --rng_seed={seed}, not {FLAGS.rng_seed}; leave the flag out to continue it")
    return seed


class Progress:
    """One line in a terminal: step, loss, metric, time left at the most. Elsewhere a plain line for each evaluation."""

    def __init__(self, title: str, workload: LaptopWorkload):
        self._title, self._metric = title, workload.target_metric_name
        self._budget = workload.max_allowed_runtime_sec
        self._begun: tuple[float, int] | None = None  # clock and step of the first call
        quiet = distributed.rank() > 0 or not sys.stderr.isatty()
        self._line = tqdm(bar_format="{desc}", leave=False, dynamic_ncols=True, disable=quiet)

    def __call__(self, step: int, logger: MetricLogger, evaluated: bool, seconds: float) -> None:
        """Show the newest metrics after a step; `seconds` is the submission's time so far."""
        names = {"loss": "loss", f"validation/{self._metric}": f"validation {self._metric}"}
        metrics = [f"{shown} {logger.last[name]:.4g}" for name, shown in names.items() if name in logger.last]
        if self._line.disable:
            if evaluated:
                say("  ".join([self._title, f"step {step}", *metrics, f"{seconds:.1f} s"]))
            return
        self._begun = self._begun or (seconds, step)
        left = self._budget - seconds
        if FLAGS.max_global_steps and step > self._begun[1]:
            per_step = (seconds - self._begun[0]) / (step - self._begun[1])
            left = min(left, per_step * (FLAGS.max_global_steps - step))
        self._line.set_description_str(
            "  ".join([self._title, f"step {step}", *metrics, f"at most {left:.0f} s left"]), refresh=False
        )
        self._line.update()

    def close(self) -> None:
        """Remove the line."""
        self._line.close()


def check_points(workload: LaptopWorkload, submission: ModuleType, points: list[Any]) -> None:
    """Let the submission build its optimizer at every point: a bad one raises ValueError before the first trial."""
    for i, point in enumerate(points, start=1):
        model, model_state = workload.init_model_fn([0, 0])
        try:
            submission.init_optimizer_state(workload, model, model_state, point, [0, 0])
        except ValueError as error:
            raise ValueError(f"{FLAGS.tuning_search_space}, point {i}: {error}") from error


def check_resumable(trials: list[Path]) -> None:
    """Raise ValueError if a trial has another seed, or was evaluated but has no checkpoint: two runs would mix in one file."""
    for trial in trials:
        trial_seed(trial)
        if (trial / "eval_measurements.csv").exists() and not any(trial.glob("checkpoint_*")):
            raise ValueError(f"{trial} has no checkpoint to continue from; give --overwrite to start anew, or another name")


def prepare_folder(points: list[Any]) -> Path:
    """The run's folder, made if it is new. Raises as `experiment_folder` and `check_resumable` do."""
    places = FLAGS.experiment_dir, FLAGS.experiment_name, FLAGS.workload
    folder = experiment_folder(*places, FLAGS.resume_last_run, FLAGS.overwrite)
    check_resumable([folder / f"trial_{i}" for i, _ in chosen(points)])
    return folder


def chosen(points: list[Any]) -> list[tuple[int, Any]]:
    """The points that the flags choose, with their numbers from 1."""
    return list(islice(enumerate(points, start=1), FLAGS.hparam_start_index, FLAGS.hparam_end_index))


def begin(trial: Path, point: Any) -> tuple[dict[str, Any], int]:
    """Make a trial's folder; the hyperparameters, those of the run that is continued if there is one, and the seed."""
    trial.mkdir(exist_ok=True)
    saved = trial / "hparams.json"
    values = json.loads(saved.read_text()) if saved.exists() else point._asdict()
    write_json(saved, values)
    (trial / "error.txt").unlink(missing_ok=True)
    return values, trial_seed(trial)


def run_trials(workload: LaptopWorkload, submission: ModuleType, points: list[Any], folder: Path) -> None:
    """Run the chosen points one after the other. A trial that fails leaves its error in error.txt; the next one begins."""
    settings = Settings(
        batch_size=global_batch_size(submission, FLAGS.workload, workload),
        max_global_steps=FLAGS.max_global_steps,
        eval_every_steps=FLAGS.eval_every_steps,
        save_checkpoints=FLAGS.save_checkpoints,
        save_intermediate_checkpoints=FLAGS.save_intermediate_checkpoints,
        torch_compile=FLAGS.torch_compile,
        flags=FLAGS.flag_values_dict(),
    )
    for i, point in chosen(points):
        trial = folder / f"trial_{i}"
        values, seed = distributed.from_first(begin(trial, point) if distributed.rank() == 0 else None)
        point = collections.namedtuple("Hyperparameters", values)(**values)
        progress = Progress(f"trial {i}/{len(points)}", workload)
        try:
            run_trial(workload, submission, point, seed, trial, settings, progress)
        except KeyboardInterrupt:
            say(f"interrupted in trial {i}; --resume_last_run continues it from its last evaluation")
            return
        except Exception as error:
            (trial / "error.txt").write_text(traceback.format_exc())
            say(f"trial {i} failed: {error!r}; see {trial / 'error.txt'}")
            if distributed.size() > 1:
                raise  # the other ranks may be waiting for this one: torchrun ends them
        finally:
            progress.close()


def summarize(workload: LaptopWorkload, folder: Path) -> None:
    """Print the table of trials and where to look further; draw the picture."""
    trials = read_trials(folder)
    if not trials:
        sys.exit("error: no trial was evaluated")
    failed = sum(1 for _ in folder.glob("trial_*/error.txt"))
    hits = sum(to_target(workload, evaluations) is not None for _, evaluations in trials.values())
    say(f"\n{trial_table(workload, trials).to_string()}\n")
    say(
        f"{hits} of {len(trials)} trials reached the target, validation {goal(workload)}"
        + (f"; {failed} failed" if failed else "")
    )
    picture = folder / "validation.png"
    plot_trials(workload, FLAGS.workload, trials, picture)
    say(f"picture: {picture}\nTensorBoard: tensorboard --logdir {folder}")


def main(_: list[str]) -> None:
    """Check all that can be checked before the first step, run the trials, sum up."""
    distributed.start()
    say(ALGOPERF)
    for name, reason in (MEANINGLESS | MEANINGLESS_SWITCHES).items():
        if FLAGS[name].present:
            say(f"--{name} has no meaning here: {reason}")
    try:
        workload = load_workload(FLAGS.workload)
        submission = load_submission(FLAGS.submission_path)
        points = read_points(FLAGS.tuning_search_space, FLAGS.num_tuning_trials, FLAGS.rng_seed or 0)
        if not chosen(points):
            raise ValueError(f"--hparam_start_index and --hparam_end_index leave none of the {len(points)} points")
        check_points(workload, submission, points)
        folder = distributed.from_first(prepare_folder(points) if distributed.rank() == 0 else None)
    except (ValueError, FileExistsError, DataError) as error:
        sys.exit(f"error: {error}")
    run_trials(workload, submission, points, folder)
    if distributed.rank() == 0:
        summarize(workload, folder)


if __name__ == "__main__":
    app.run(main)
