"""What a machine lacks for the benchmark: `python -m experiments.competition.check`, with the variables of the plan set.

One line for each thing, `ok` or `missing` with what to do; exit code 1 if anything is missing. Nothing is changed.
"""

import filecmp
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from absl import app

from .plan import DATA, GPUS, SUBMISSION, plan

ROOT = Path(__file__).resolve().parents[2]
PINS = {"torch": "2.5.1", "absl-py": "2.1.0"}
LOGS = 10 * 2**30  # bytes
ABSENT = "not installed"
FILES = ["submission.py", "tuning_search_space.json", "requirements.txt"]

Check = tuple[str, bool, str, str]  # what, whether it is there, what was found, what to do if it is not


def installed(name: str) -> str:
    """The version of an installed package, or ABSENT."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ABSENT


def check_machine() -> Iterator[Check]:
    """GPUs and how they talk."""
    count = torch.cuda.device_count()
    found = f"{count} of {torch.cuda.get_device_name()}" if count else "none"
    yield f"{GPUS} GPUs", count >= GPUS, found, "another machine"
    nccl = dist.is_available() and dist.is_nccl_available()
    yield "NCCL", nccl, "in torch" if nccl else ABSENT, "a CUDA build of torch has it"
    command = shutil.which("torchrun")
    yield "torchrun", command is not None, command or ABSENT, "it comes with torch: activate its environment"


def check_packages() -> Iterator[Check]:
    """AlgoPerf and its pins."""
    for name, pin in PINS.items():
        found = installed(name)
        yield f"{name} {pin}", found.split("+")[0] == pin, found, f"pip install {name}=={pin}"
    found = installed("algoperf")
    yield "algoperf", found != ABSENT, found, "pip install -e '.[pytorch_gpu,full]' in AlgoPerf's checkout"


def check_folders(environment: Callable[[str], str | None]) -> Iterator[Check]:
    """The checkout with this submission, the data, room for logs."""
    places = {name: environment(name) for name in ("ALGOPERF", "DATA", "EXPERIMENTS")}
    for name, place in places.items():
        yield (
            f"${name}",
            bool(place),
            place or "not set",
            f"export {name}=..., as `python -m experiments.competition.plan --help` says",
        )
    if places["ALGOPERF"]:
        folder = Path(places["ALGOPERF"])
        yield "AlgoPerf's runner", (folder / "submission_runner.py").is_file(), str(folder), "that is to be AlgoPerf's checkout"
        submission = folder / SUBMISSION
        own = FILES + [str(path.relative_to(ROOT)) for path in sorted((ROOT / "shampoo").glob("*.py"))]
        _, differing, absent = filecmp.cmpfiles(ROOT, submission, own, shallow=False)
        remedy = f"copy {', '.join(differing + absent)} there, see README.md"
        yield "this submission in AlgoPerf's checkout", not differing + absent, str(submission), remedy
    if places["DATA"]:
        for workload, (data, _) in DATA.items():
            folder = Path(places["DATA"]) / data
            there = folder.is_dir() and any(folder.iterdir())
            yield f"data of {workload}", there, str(folder), "AlgoPerf's datasets/dataset_setup.py makes it"
        vocabulary = Path(places["DATA"]) / "librispeech" / "spm_model.vocab"
        yield "librispeech's vocabulary", vocabulary.is_file(), str(vocabulary), "it is made with the data"
    if places["EXPERIMENTS"]:
        folder = Path(places["EXPERIMENTS"])
        above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(above).free
        yield (
            f"{LOGS >> 30} GiB for logs",
            free >= LOGS and os.access(above, os.W_OK),
            f"{free >> 30} GiB free in {above}",
            "another folder",
        )


def main(_: Any) -> None:
    """Print all checks."""
    checks = [*check_machine(), *check_packages(), *check_folders(os.environ.get)]
    for what, there, found, remedy in checks:
        print(f"ok       {what}: {found}" if there else f"missing  {what}: {found}; {remedy}")
    missing = sum(not there for _, there, _, _ in checks)
    print(f"\n{missing} of {len(checks)} things are missing" if missing else f"\nready for {len(plan())} trials")
    sys.exit(missing > 0)


if __name__ == "__main__":
    app.run(main)
