"""Write the commands of the full benchmark: `python -m experiments.competition.plan --output_dir=DIR`; `--dry_run` prints them.

Eight workloads, five points, and three studies make 120 trials, each one torchrun command with AlgoPerf's runner. Write
DIR/trials.sh, which runs them sequentially, and DIR/trials.slurm, a job array with one trial per task. Running either script
again skips finished trials and restarts interrupted ones from the beginning, since their time is what counts. The scripts read
these environment variables:

    ALGOPERF      AlgoPerf's checkout, with this submission in submissions/external_tuning/adamw_shampoo
    DATA          the data sets, in the folders given in AlgoPerf's datasets/README.md
    EXPERIMENTS   the folder for logs, read by `python -m runner.score --benchmark=0.6 --submission_directory=$EXPERIMENTS`

`python -m experiments.competition.check` checks that a machine is ready. This command ends with the steps of a
submission to AlgoPerf's leaderboard.
"""

import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

FLAGS = flags.FLAGS

DATA = {  # workload: the folder in $DATA, and more flags for its data
    "criteo1tb": "criteo1tb",
    "fastmri": "fastmri",
    "imagenet_resnet": 'imagenet/pytorch --imagenet_v2_data_dir="$DATA/imagenet/pytorch"',
    "imagenet_vit": 'imagenet/pytorch --imagenet_v2_data_dir="$DATA/imagenet/pytorch"',
    "librispeech_conformer": 'librispeech --librispeech_tokenizer_vocab_path="$DATA/librispeech/spm_model.vocab"',
    "librispeech_deepspeech": 'librispeech --librispeech_tokenizer_vocab_path="$DATA/librispeech/spm_model.vocab"',
    "ogbg": "ogbg",
    "wmt": "wmt",
}
STUDIES, POINTS, GPUS = 3, 5, 8
NAME = "adamw_shampoo"
SUBMISSION = f"submissions/external_tuning/{NAME}"
PREAMBLE = f"""
: "${{ALGOPERF:?set to the AlgoPerf checkout}}" "${{DATA:?set to the data folder}}" "${{EXPERIMENTS:?set to a folder for logs}}"
command -v torchrun > /dev/null || {{ echo "torchrun is not on PATH: activate the environment of torch" >&2; exit 1; }}
cd "$ALGOPERF" || exit

# trial STUDY WORKLOAD POINT SEED DATA [FLAG...]: skip a finished trial, else delete the logs of an earlier attempt and run it.
# --resume_last_run avoids a prompt about other trials' folders.
trial() {{
  local folder="$EXPERIMENTS/{NAME}/study_$1/$2_pytorch/trial_$3"
  [ -e "$folder/finished" ] && return
  rm -rf "$folder" && torchrun --standalone --nproc_per_node={GPUS} submission_runner.py --framework=pytorch --workload="$2" \\
    --submission_path={SUBMISSION}/submission.py \\
    --tuning_search_space={SUBMISSION}/tuning_search_space.json \\
    --num_tuning_trials={POINTS} --hparam_start_index=$(($3 - 1)) --hparam_end_index="$3" --rng_seed="$4" \\
    --data_dir="$DATA/$5" --experiment_dir="$EXPERIMENTS/{NAME}" --experiment_name="study_$1" \\
    --save_checkpoints=False --resume_last_run "${{@:6}}" && touch "$folder/finished"
}}
"""
LEADERBOARD = f"""
# To submit to AlgoPerf's leaderboard (README of mlcommons/submissions_algorithms, June 2026):
# 1. Sign MLCommons' contributor agreement, https://mlcommons.org/community/subscribe/
# 2. Fork https://github.com/mlcommons/submissions_algorithms, and start a branch.
# 3. As in README.md, copy the submission to {SUBMISSION}.
# 4. Open a pull request to the branch `evaluation`; pull_request.md has its title and its text, to which you add scores.
# 5. AlgoPerf's working group reviews it, and may choose to run it on all workloads.
"""


class Trial(NamedTuple):
    """One of the 120 trials. Studies and points count from 1."""

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


def plan() -> list[Trial]:
    """Return all trials, study by study, so that an early stop leaves complete studies."""
    return [Trial(s, w, p) for s in range(1, STUDIES + 1) for w in DATA for p in range(1, POINTS + 1)]


def shell_script(trials: list[Trial]) -> str:
    """Return a script that runs the trials sequentially and continues after a failed one."""
    return "\n".join(["#!/usr/bin/env bash", PREAMBLE.lstrip(), *(trial.line for trial in trials)]) + "\n"


def slurm_array(trials: list[Trial]) -> str:
    """Return a Slurm job array with one trial per task."""
    return f"""#!/usr/bin/env bash
#SBATCH --job-name={NAME}
#SBATCH --array=1-{len(trials)}
#SBATCH --nodes=1 --ntasks=1 --gpus-per-node={GPUS} --exclusive
#SBATCH --time=24:00:00
{PREAMBLE}
case $SLURM_ARRAY_TASK_ID in
{chr(10).join(f"{i}) {trial.line} ;;" for i, trial in enumerate(trials, start=1))}
esac
"""


def main(_: Any) -> None:
    """Write the scripts, or print trials.sh; then print the steps of a submission."""
    if FLAGS.dry_run:
        print(shell_script(plan()), LEADERBOARD, sep="", end="")
        return
    if FLAGS.output_dir is None:
        sys.exit("error: set --output_dir to write the scripts, or --dry_run to print trials.sh")
    output = Path(FLAGS.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    for name, text in (("trials.sh", shell_script(plan())), ("trials.slurm", slurm_array(plan()))):
        (output / name).write_text(text)
        print(f"{len(plan())} trials: {output / name}")
    print(f"then: python -m runner.score --benchmark=0.6 --submission_directory=$EXPERIMENTS --output_dir={output}")
    print(LEADERBOARD, end="")


if __name__ == "__main__":
    flags.DEFINE_string("output_dir", None, "folder for the scripts")
    flags.DEFINE_boolean("dry_run", False, "print trials.sh instead of writing files")
    app.run(main)
