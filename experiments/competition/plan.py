"""Write the commands of the full benchmark: `python -m experiments.competition.plan --output_dir=DIR`; `--dry_run` prints them.

Each trial is one torchrun command with AlgoPerf's runner. `--entry` says what to run, in three studies:

    self         this project's entry to the self-tuning ruleset: nine workloads, 27 trials, 4 GPUs
    external     its five points of 2026: nine workloads, 135 trials, 4 GPUs
    competition  the competition's five points, to reproduce version 0.6: eight workloads, 120 trials, 8 GPUs

Write DIR/trials.sh, which runs the trials sequentially, and DIR/trials.slurm, a job array with one trial per task. Running
either script again skips finished trials and restarts interrupted ones from the beginning, since their time is what counts.
Workloads that AlgoPerf's checkout lacks are skipped. The scripts read these environment variables:

    ALGOPERF      AlgoPerf's checkout, with this submission in submissions/self_tuning/adamw_shampoo, or external_tuning
    DATA          the data sets, in the folders given in AlgoPerf's datasets/README.md
    EXPERIMENTS   the folder for logs, read by `python -m runner.score --benchmark=2026 --submission_directory=$EXPERIMENTS`

`python -m experiments.competition.check` checks that a machine is ready. This command ends with the steps of a
submission to AlgoPerf's leaderboard.
"""

import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

from runner.times import BENCHMARKS

FLAGS = flags.FLAGS

STUDIES = 3
NAME = "adamw_shampoo"
GPU_HOUR_PRICE = 2.0  # dollars; an assumption
SELF_TUNING_FACTOR = 1.5  # time budget of a self-tuning trial over that of an external one
IMAGENET = 'imagenet/pytorch --imagenet_v2_data_dir="$DATA/imagenet/pytorch"'
LIBRISPEECH = 'librispeech --librispeech_tokenizer_vocab_path="$DATA/librispeech/spm_model.vocab"'
DATA = {  # workload: the folder in $DATA, and more flags for its data
    "criteo1tb": "criteo1tb",
    "fastmri": "fastmri",
    "imagenet_resnet": IMAGENET,
    "imagenet_vit": IMAGENET,
    "librispeech_conformer": LIBRISPEECH,
    "librispeech_deepspeech": LIBRISPEECH,
    "ogbg": "ogbg",
    "wmt": "wmt",
    "finewebedu_lm": "finewebedu",
}
PREAMBLE = """
: "${{ALGOPERF:?set to the AlgoPerf checkout}}" "${{DATA:?set to the data folder}}" "${{EXPERIMENTS:?set to a folder for logs}}"
command -v torchrun > /dev/null || {{ echo "torchrun is not on PATH: activate the environment of torch" >&2; exit 1; }}
DATA=$(realpath -m "$DATA") EXPERIMENTS=$(realpath -m "$EXPERIMENTS")
cd "$ALGOPERF" || exit

# trial STUDY WORKLOAD POINT SEED DATA [FLAG...]: skip a finished trial, else delete the logs of an earlier attempt and run it.
# --resume_last_run avoids a prompt about other trials' folders.
trial() {{
  local folder="$EXPERIMENTS/{logs}/study_$1/$2_pytorch/trial_$3"
  [ -d "algoperf/workloads/$2" ] || {{ echo "skipped: AlgoPerf's checkout lacks $2" >&2; return; }}
  [ -e "$folder/finished" ] && return
  rm -rf "$folder" && torchrun --standalone --nproc_per_node={gpus} submission_runner.py --framework=pytorch --workload="$2" \\
    --submission_path={submission}/submission.py {ruleset} \\
    --rng_seed="$4" --data_dir="$DATA/$5" --experiment_dir="$EXPERIMENTS/{logs}" \\
    --experiment_name="study_$1" --save_checkpoints=False --resume_last_run "${{@:6}}" && touch "$folder/finished"
}}
"""
EXTERNAL = """--tuning_ruleset=external \\
    --tuning_search_space={submission}/{search_space} \\
    --num_tuning_trials={points} --hparam_start_index=$(($3 - 1)) --hparam_end_index="$3\""""
LEADERBOARD = f"""
# To submit to AlgoPerf's leaderboard (README of mlcommons/submissions_algorithms, June 2026):
# 1. Sign MLCommons' contributor agreement, https://mlcommons.org/community/subscribe/
# 2. Fork https://github.com/mlcommons/submissions_algorithms, and start a branch.
# 3. As in README.md, copy the submission to submissions/self_tuning/{NAME}.
# 4. Replace each TODO in pull_request.md and submission_info.yml, and run
#    python -m experiments.competition.check --submission
# 5. Open a pull request to the branch `evaluation`; pull_request.md has its title and its text, to which you add scores.
# 6. AlgoPerf's working group reviews it, and may choose to run it on all workloads.
"""


class Entry(NamedTuple):
    """What to run: a version of the benchmark, the file with the points, or none for self-tuning, and the hardware."""

    benchmark: str
    search_space: str
    points: int
    gpus: int

    @property
    def submission(self) -> str:
        """Return the folder of the submission in AlgoPerf's checkout."""
        return f"submissions/{'external' if self.search_space else 'self'}_tuning/{NAME}"

    @property
    def workloads(self) -> list[str]:
        """Return the workloads of the benchmark."""
        base: list[str] = BENCHMARKS[self.benchmark]["base_workloads"]
        return base

    def hours(self, workload: str) -> float:
        """Return the longest time of one trial, without evaluations."""
        budget: float = BENCHMARKS[self.benchmark]["workloads"][workload]["max_allowed_runtime_sec"]
        return budget * (1 if self.search_space else SELF_TUNING_FACTOR) / 3600


ENTRIES = {
    "self": Entry("2026", "", points=1, gpus=4),
    "external": Entry("2026", "tuning_search_space_2026.json", points=5, gpus=4),
    "competition": Entry("0.6", "tuning_search_space.json", points=5, gpus=8),
}


class Trial(NamedTuple):
    """One trial of an entry. Studies and points count from 1."""

    study: int
    workload: str
    point: int

    @property
    def seed(self) -> int:
        """Return a seed that is the same in every script. Without one, each of AlgoPerf's ranks would draw its own."""
        return random.Random(f"{self.study} {self.workload} {self.point}").randrange(2**31)

    @property
    def line(self) -> str:
        """Return the shell line that runs the trial."""
        return f"trial {self.study} {self.workload} {self.point} {self.seed} {DATA[self.workload]}"


def plan(name: str) -> list[Trial]:
    """Return all trials of an entry, study by study, so that an early stop leaves complete studies."""
    entry = ENTRIES[name]
    return [Trial(s, w, p) for s in range(1, STUDIES + 1) for w in entry.workloads for p in range(1, entry.points + 1)]


def hours(name: str) -> float:
    """Return the longest time of all trials of an entry one after another, without evaluations."""
    return sum(ENTRIES[name].hours(trial.workload) for trial in plan(name))


def preamble(name: str) -> str:
    """Return the shell code that the trials of an entry need."""
    values = ENTRIES[name]._asdict() | {"submission": ENTRIES[name].submission}
    ruleset = EXTERNAL.format(**values) if ENTRIES[name].search_space else "--tuning_ruleset=self"
    return PREAMBLE.format(**values, ruleset=ruleset, logs=f"{NAME}_{name}")


def shell_script(name: str) -> str:
    """Return a script that runs the trials sequentially and continues after a failed one."""
    return "\n".join(["#!/usr/bin/env bash", preamble(name).lstrip(), *(trial.line for trial in plan(name))]) + "\n"


def slurm_array(name: str) -> str:
    """Return a Slurm job array with one trial per task."""
    entry, trials = ENTRIES[name], plan(name)
    limit = round(1.5 * max(map(entry.hours, entry.workloads))) + 1  # evaluations take up to half as long again
    return f"""#!/usr/bin/env bash
#SBATCH --job-name={NAME}
#SBATCH --array=1-{len(trials)}
#SBATCH --nodes=1 --ntasks=1 --gpus-per-node={entry.gpus} --exclusive
#SBATCH --time={limit}:00:00
{preamble(name)}
case $SLURM_ARRAY_TASK_ID in
{chr(10).join(f"{i}) {trial.line} ;;" for i, trial in enumerate(trials, start=1))}
esac
"""


def main(_: Any) -> None:
    """Write the scripts, or print trials.sh; then print the steps of a submission."""
    name, gpus, count = FLAGS.entry, ENTRIES[FLAGS.entry].gpus, len(plan(FLAGS.entry))
    if FLAGS.dry_run:
        print(shell_script(name), LEADERBOARD, sep="", end="")
        return
    if FLAGS.output_dir is None:
        sys.exit("error: set --output_dir to write the scripts, or --dry_run to print trials.sh")
    output = Path(FLAGS.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: --output_dir is {output}, which cannot be made a folder: {error}; choose another")
    for file, text in (("trials.sh", shell_script(name)), ("trials.slurm", slurm_array(name))):
        (output / file).write_text(text)
        print(f"{count} trials: {output / file}")
    most = hours(name)
    print(
        f"at most {most:.0f} hours on {gpus} GPUs, {gpus * most:.0f} GPU hours, and evaluations; "
        f"at {FLAGS.gpu_hour_price:g} dollars per GPU hour, {gpus * most * FLAGS.gpu_hour_price:,.0f} dollars"
    )
    benchmark = ENTRIES[name].benchmark
    print(f"then: python -m runner.score --benchmark={benchmark} --submission_directory=$EXPERIMENTS --output_dir={output}")
    print(LEADERBOARD, end="")


if __name__ == "__main__":
    flags.DEFINE_string("output_dir", None, "folder for the scripts")
    flags.DEFINE_enum("entry", "self", list(ENTRIES), "what to run")
    flags.DEFINE_float("gpu_hour_price", GPU_HOUR_PRICE, "price of a GPU hour in dollars", lower_bound=0.0)
    flags.DEFINE_boolean("dry_run", False, "print trials.sh instead of writing files")
    app.run(main)
