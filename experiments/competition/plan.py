"""The complete benchmark as commands: `python -m experiments.competition.plan --output_dir=DIR`, or `--dry_run` to print it.

Eight workloads, five points, three studies: 120 trials, each one line of torchrun with AlgoPerf's runner. DIR gets `trials.sh`,
which runs them one after the other, and `trials.slurm`, an array with one trial a task. A trial that has finished is not run
again; one that was cut short starts anew, since its clock counts: `bash trials.sh` or `sbatch trials.slurm` go on where they
stopped. Where things are is said by variables of the shell:

    ALGOPERF      AlgoPerf's checkout, with this submission in submissions/external_tuning/adamw_shampoo
    DATA          the data sets, in the folders of AlgoPerf's datasets/README.md
    EXPERIMENTS   where logs go, as `python -m runner.score --submission_directory=$EXPERIMENTS` reads them

`python -m experiments.competition.check` tells what a machine lacks for it.
"""

import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

FLAGS = flags.FLAGS

DATA = {  # each workload's folder in $DATA, and the flags that its data need
    "criteo1tb": ("criteo1tb", ""),
    "fastmri": ("fastmri", ""),
    "imagenet_resnet": ("imagenet/pytorch", "--imagenet_v2_data_dir=$DATA/imagenet/pytorch"),
    "imagenet_vit": ("imagenet/pytorch", "--imagenet_v2_data_dir=$DATA/imagenet/pytorch"),
    "librispeech_conformer": ("librispeech", "--librispeech_tokenizer_vocab_path=$DATA/librispeech/spm_model.vocab"),
    "librispeech_deepspeech": ("librispeech", "--librispeech_tokenizer_vocab_path=$DATA/librispeech/spm_model.vocab"),
    "ogbg": ("ogbg", ""),
    "wmt": ("wmt", ""),
}
STUDIES, POINTS, GPUS = 3, 5, 8
NAME = "adamw_shampoo"
SUBMISSION = f"submissions/external_tuning/{NAME}"
VARIABLES = (
    ': "${ALGOPERF:?is to be the checkout of AlgoPerf}" "${DATA:?is where the data are}" "${EXPERIMENTS:?is where logs go}"'
)


class Trial(NamedTuple):
    """One of the 120: studies and points count from 1."""

    study: int
    workload: str
    point: int

    @property
    def folder(self) -> str:
        """Where AlgoPerf's runner puts its logs."""
        return f"$EXPERIMENTS/{NAME}/study_{self.study}/{self.workload}_pytorch/trial_{self.point}"

    @property
    def seed(self) -> int:
        """The same one at each writing; without one, each of AlgoPerf's ranks draws its own."""
        return random.Random(f"{self.study} {self.workload} {self.point}").randrange(2**31)

    @property
    def command(self) -> str:
        """The trial by AlgoPerf's runner."""
        data, more = DATA[self.workload]
        words = [
            f"torchrun --standalone --nproc_per_node={GPUS} submission_runner.py",
            f"--framework=pytorch --workload={self.workload}",
            f"--submission_path={SUBMISSION}/submission.py --tuning_search_space={SUBMISSION}/tuning_search_space.json",
            f"--num_tuning_trials={POINTS} --hparam_start_index={self.point - 1} --hparam_end_index={self.point}",
            f"--rng_seed={self.seed} --data_dir=$DATA/{data}",
            more,
            f"--experiment_dir=$EXPERIMENTS/{NAME} --experiment_name=study_{self.study}",
            "--save_checkpoints=False --resume_last_run",  # else the runner asks what to do with the folder of another trial
        ]
        return " ".join(filter(None, words))

    @property
    def line(self) -> str:
        """The command, unless the trial has finished; what an unfinished one left would mix with the new logs."""
        return (
            f'[ -e "{self.folder}/finished" ] || (rm -rf "{self.folder}" && {self.command} && touch "{self.folder}/finished")'
        )


def plan() -> list[Trial]:
    """All trials, study by study: an early stop leaves whole studies."""
    return [Trial(s, w, p) for s in range(1, STUDIES + 1) for w in DATA for p in range(1, POINTS + 1)]


def shell_script(trials: list[Trial]) -> str:
    """One trial after the other; one that fails does not stop the next."""
    return "\n".join(["#!/usr/bin/env bash", VARIABLES, 'cd "$ALGOPERF" || exit', *(trial.line for trial in trials)]) + "\n"


def slurm_array(trials: list[Trial]) -> str:
    """An array, each task one line of the script."""
    return f"""#!/usr/bin/env bash
#SBATCH --job-name={NAME}
#SBATCH --array=1-{len(trials)}
#SBATCH --nodes=1 --ntasks=1 --gpus-per-node={GPUS} --exclusive
#SBATCH --time=24:00:00
{VARIABLES}
cd "$ALGOPERF" || exit
case $SLURM_ARRAY_TASK_ID in
{chr(10).join(f"{i}) {trial.line} ;;" for i, trial in enumerate(trials, start=1))}
esac
"""


def main(_: Any) -> None:
    """Write the plan, or print it."""
    if FLAGS.dry_run:
        print(shell_script(plan()), end="")
        return
    if FLAGS.output_dir is None:
        sys.exit("error: give --output_dir, where the scripts go, or --dry_run to see them")
    output = Path(FLAGS.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    for name, text in (("trials.sh", shell_script(plan())), ("trials.slurm", slurm_array(plan()))):
        (output / name).write_text(text)
        print(f"{len(plan())} trials: {output / name}")
    print(f"then: python -m runner.score --submission_directory=$EXPERIMENTS --output_dir={output}")


if __name__ == "__main__":
    flags.DEFINE_string("output_dir", None, "where the scripts go")
    flags.DEFINE_boolean("dry_run", False, "print trials.sh instead")
    app.run(main)
