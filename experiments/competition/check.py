"""Check that a machine is ready for the benchmark: `python -m experiments.competition.check`.

Requires the environment variables of `experiments.competition.plan`. Print `ok` or `missing` for each requirement, with a
remedy if it is missing. Exit with code 1 if anything is missing. Change nothing.
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
LOG_BYTES = 10 * 2**30
ABSENT = "not installed"
FILES = ["submission.py", "tuning_search_space.json", "requirements.txt"]

Check = tuple[str, bool, str, str]  # requirement, whether it is met, what was found, remedy


def installed(name: str) -> str:
    """Return the version of an installed package, or ABSENT."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ABSENT


def check_machine() -> Iterator[Check]:
    """Check GPUs, NCCL, and torchrun."""
    count = torch.cuda.device_count()
    found = f"{count} of {torch.cuda.get_device_name()}" if count else "none"
    yield f"{GPUS} GPUs", count >= GPUS, found, f"use a machine with {GPUS} GPUs"
    nccl = dist.is_available() and dist.is_nccl_available()
    yield "NCCL", nccl, "in torch" if nccl else ABSENT, "install a CUDA build of torch"
    own, on_path = shutil.which("torchrun", path=Path(sys.executable).parent), shutil.which("torchrun")
    command = f"{own}; activate its environment before you run trials.sh" if own and own != on_path else on_path or ABSENT
    yield "torchrun", command != ABSENT, command, "install torch in the environment of this Python"


def check_packages() -> Iterator[Check]:
    """Check AlgoPerf and the packages it pins."""
    for name, pin in PINS.items():
        found = installed(name)
        yield f"{name} {pin}", found.split("+")[0] == pin, found, f"run pip install {name}=={pin}"
    found = installed("algoperf")
    yield "algoperf", found != ABSENT, found, "run pip install -e '.[pytorch_gpu,full]' in AlgoPerf's checkout"


def check_folders(environment: Callable[[str], str | None]) -> Iterator[Check]:
    """Check AlgoPerf's checkout with this submission, the data sets, and disk space for logs."""
    folders = {name: environment(name) for name in ("ALGOPERF", "DATA", "EXPERIMENTS")}
    for name, value in folders.items():
        yield (
            f"${name}",
            bool(value),
            value or "not set",
            f"export {name}=...; see `python -m experiments.competition.plan --help`",
        )
    if folders["ALGOPERF"]:
        folder = Path(folders["ALGOPERF"])
        yield (
            "AlgoPerf's runner",
            (folder / "submission_runner.py").is_file(),
            str(folder),
            "set ALGOPERF to AlgoPerf's checkout",
        )
        submission = folder / SUBMISSION
        own = FILES + [str(path.relative_to(ROOT)) for path in sorted((ROOT / "shampoo").glob("*.py"))]
        _, differing, absent = filecmp.cmpfiles(ROOT, submission, own, shallow=False)
        remedy = f"copy {', '.join(differing + absent)} there; see README.md"
        yield "this submission in AlgoPerf's checkout", not differing + absent, str(submission), remedy
    if folders["DATA"]:
        for workload, data in DATA.items():
            folder = Path(folders["DATA"]) / data.split()[0]
            has_files = folder.is_dir() and any(folder.iterdir())
            yield f"data of {workload}", has_files, str(folder), "create it with AlgoPerf's datasets/dataset_setup.py"
        vocabulary = Path(folders["DATA"]) / "librispeech" / "spm_model.vocab"
        yield (
            "librispeech's vocabulary",
            vocabulary.is_file(),
            str(vocabulary),
            "create it with AlgoPerf's datasets/dataset_setup.py, along with the data",
        )
    if folders["EXPERIMENTS"]:
        folder = Path(folders["EXPERIMENTS"])
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        yield (
            f"{LOG_BYTES >> 30} GiB for logs",
            free >= LOG_BYTES and os.access(existing, os.W_OK),
            f"{free >> 30} GiB free in {existing}",
            "set EXPERIMENTS to a writable folder with enough space",
        )


def main(_: Any) -> None:
    """Print all checks."""
    checks = [*check_machine(), *check_packages(), *check_folders(os.environ.get)]
    for requirement, met, found, remedy in checks:
        print(f"ok       {requirement}: {found}" if met else f"missing  {requirement}: {found}; {remedy}")
    missing = sum(not met for _, met, _, _ in checks)
    print(f"\n{missing} of {len(checks)} requirements are missing" if missing else f"\nready for {len(plan())} trials")
    sys.exit(missing > 0)


if __name__ == "__main__":
    app.run(main)
