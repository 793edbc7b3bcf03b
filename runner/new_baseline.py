"""`python -m runner.new_baseline PATH`: write a submission to start from, and its search space, to the folder PATH."""

import shlex
import shutil
import sys
from pathlib import Path

from absl import app

from .command import run

TEMPLATE = Path(__file__).with_name("template")
NAMES = ("submission.py", "tuning_search_space.json")


def write_baseline(folder: Path) -> None:
    """Copy the template to a folder, which is created if needed. Raise FileExistsError if it already holds one of the files."""
    for name in NAMES:
        if (folder / name).exists():
            raise FileExistsError(f"{folder / name} exists; give another folder, or remove the file")
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        shutil.copyfile(TEMPLATE / name, folder / name)


def command(folder: Path) -> list[str]:
    """Return the command line that runs the five points of a new baseline on mnist_vit, to 4/3 of its step hint."""
    submission, space = (str(folder / name) for name in NAMES)
    return [
        *(sys.executable, "-m", "runner", "--workload=mnist_vit"),
        f"--submission_path={submission}",
        f"--tuning_search_space={space}",
        *("--num_tuning_trials=5", "--max_global_steps=533", "--experiment_dir=experiments_out"),
        f"--experiment_name={folder.resolve().name}",
    ]


def main(argv: list[str]) -> None:
    """Write the files, and print what to do next."""
    if len(argv) != 2:
        raise app.UsageError("give one folder: python -m runner.new_baseline PATH")
    folder = Path(argv[1]).expanduser()
    try:
        write_baseline(folder)
    except OSError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {' and '.join(str(folder / name) for name in NAMES)}; to run it:\n{shlex.join(command(folder))}")


if __name__ == "__main__":
    run(main)
