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

Check = tuple[str, bool, str]  # what, whether it is there, what was found or is to do


def installed(name: str) -> str:
    """The version of an installed package, or ABSENT."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ABSENT


def check_machine() -> Iterator[Check]:
    """GPUs and how they talk."""
    count = torch.cuda.device_count()
    yield f"{GPUS} GPUs", count >= GPUS, f"{count} found"
    yield "NCCL", dist.is_available() and dist.is_nccl_available(), "a CUDA build of torch has it"
    yield "torchrun", shutil.which("torchrun") is not None, "it comes with torch; activate its environment"


def check_packages() -> Iterator[Check]:
    """AlgoPerf and its pins."""
    for name, pin in PINS.items():
        found = installed(name)
        yield f"{name} {pin}", found.split("+")[0] == pin, f"{found}; pip install {name}=={pin}"
    found = installed("algoperf")
    yield "algoperf", found != ABSENT, f"{found}; pip install -e '.[pytorch_gpu,full]' in AlgoPerf's checkout"


def check_folders(environment: Callable[[str], str | None]) -> Iterator[Check]:
    """The checkout with this submission, the data, room for logs."""
    places = {name: environment(name) for name in ("ALGOPERF", "DATA", "EXPERIMENTS")}
    for name, place in places.items():
        yield f"${name}", bool(place), place or f"export {name}=..., see `python -m experiments.competition.plan --help`"
    if places["ALGOPERF"]:
        folder = Path(places["ALGOPERF"])
        yield "AlgoPerf's runner", (folder / "submission_runner.py").is_file(), str(folder / "submission_runner.py")
        submission = folder / SUBMISSION
        own = FILES + [str(path.relative_to(ROOT)) for path in sorted((ROOT / "shampoo").glob("*.py"))]
        _, differing, absent = filecmp.cmpfiles(ROOT, submission, own, shallow=False)
        found = f"differ or lack in {submission}: {', '.join(differing + absent)}" if differing + absent else str(submission)
        yield "this submission in AlgoPerf's checkout", not differing + absent, found
    if places["DATA"]:
        for workload, (data, _) in DATA.items():
            folder = Path(places["DATA"]) / data
            there = folder.is_dir() and any(folder.iterdir())
            yield f"data of {workload}", there, f"{folder}; datasets/dataset_setup.py makes it"
        vocabulary = Path(places["DATA"]) / "librispeech" / "spm_model.vocab"
        yield "librispeech's vocabulary", vocabulary.is_file(), str(vocabulary)
    if places["EXPERIMENTS"]:
        folder = Path(places["EXPERIMENTS"])
        above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(above).free
        yield f"{LOGS >> 30} GiB for logs", free >= LOGS and os.access(above, os.W_OK), f"{free >> 30} GiB free in {above}"


def main(_: Any) -> None:
    """Print all checks."""
    checks = [*check_machine(), *check_packages(), *check_folders(os.environ.get)]
    for what, there, found in checks:
        print(f"{'ok' if there else 'missing':8} {what}: {found}")
    missing = sum(not there for _, there, _ in checks)
    print(f"\n{missing} of {len(checks)} things are missing" if missing else f"\nready for {len(plan())} trials")
    sys.exit(missing > 0)


if __name__ == "__main__":
    app.run(main)
