"""Check that a machine is ready for the benchmark: `python -m experiments.competition.check`; for the runs of `--entry`.

Requires the environment variables of `experiments.competition.plan`. With `--submission`, check instead this project's entry to
the leaderboard; see `experiments.competition.leaderboard`. Print `ok` or `missing` for each requirement, with a remedy if it is
missing. Exit with code 1 if anything is missing. Change nothing.
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
from absl import app, flags

from .leaderboard import Check, check_submission, submission_files
from .plan import DATA, ENTRIES, Entry, plan

FLAGS = flags.FLAGS

ROOT = Path(__file__).resolve().parents[2]
PINS = {"torch": "2.5.1", "absl-py": "2.1.0"}
LOG_BYTES = 10 * 2**30
ABSENT = "not installed"
PARTS = {  # folder in $DATA: what AlgoPerf's datasets/dataset_setup.py leaves there
    "criteo1tb": ["day_0_00"],
    "fastmri": ["knee_singlecoil_train", "knee_singlecoil_val", "knee_singlecoil_test"],
    "imagenet/pytorch": ["train", "val", "imagenet_v2/matched-frequency/3.0.0"],
    "librispeech": ["train-clean-100", "spm_model.vocab"],
    "ogbg": ["ogbg_molpcba/0.1.3"],
    "wmt": ["wmt14_translate/de-en/1.0.0", "wmt17_translate/de-en/1.0.0", "wmt_sentencepiece_model"],
    "finewebedu": ["train", "val"],
}


def installed(name: str) -> str:
    """Return the version of an installed package, or ABSENT."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ABSENT


def check_machine(gpus: int) -> Iterator[Check]:
    """Check GPUs, NCCL, and torchrun."""
    count = torch.cuda.device_count()
    found = f"{count} of {torch.cuda.get_device_name()}" if count else "none"
    yield f"{gpus} GPUs", count >= gpus, found, f"use a machine with {gpus} GPUs"
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


def check_checkout(folder: Path, entry: Entry) -> Iterator[Check]:
    """Check AlgoPerf's checkout: its runner, its workloads, and this submission in it."""
    runner = (folder / "submission_runner.py").is_file()
    yield "AlgoPerf's runner", runner, str(folder), "set ALGOPERF to AlgoPerf's checkout"
    absent = [name for name in entry.workloads if not (folder / "algoperf" / "workloads" / name).is_dir()]
    remedy = "update AlgoPerf (finewebedu_lm came with its pull request 904); until then, the plan skips them"
    yield "all workloads in AlgoPerf's checkout", not absent, f"without {', '.join(absent)}" if absent else "all", remedy
    own = [*submission_files(ROOT), *([entry.search_space] if entry.search_space else [])]
    submission = folder / entry.submission
    _, differing, lacking = filecmp.cmpfiles(ROOT, submission, own, shallow=False)
    wrong = [*differing, *lacking, *([] if (submission / "__init__.py").is_file() else ["an empty __init__.py"])]
    remedy = f"copy {', '.join(wrong)} there; see docs/algoperf.md"
    yield "this submission in AlgoPerf's checkout", not wrong, str(submission), remedy


def check_folders(environment: Callable[[str], str | None], entry: Entry) -> Iterator[Check]:
    """Check AlgoPerf's checkout with this submission, the data sets, and disk space for logs."""
    folders = {name: environment(name) for name in ("ALGOPERF", "DATA", "EXPERIMENTS")}
    for name, value in folders.items():
        remedy = f"export {name}=...; see `python -m experiments.competition.plan --help`"
        yield f"${name}", bool(value), value or "not set", remedy
    if folders["ALGOPERF"]:
        yield from check_checkout(Path(folders["ALGOPERF"]), entry)
    if folders["DATA"]:
        for data in dict.fromkeys(DATA[name].split()[0] for name in entry.workloads):
            folder = Path(folders["DATA"]) / data
            absent = [part for part in PARTS[data] if not (folder / part).exists()]
            remedy = f"create {', '.join(absent)} with AlgoPerf's datasets/dataset_setup.py"
            yield f"data in {data}", not absent, str(folder), remedy
    if folders["EXPERIMENTS"]:
        folder = Path(folders["EXPERIMENTS"])
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        yield (
            f"{LOG_BYTES >> 30} GiB for logs",
            free >= LOG_BYTES and existing.is_dir() and os.access(existing, os.W_OK),
            f"{free >> 30} GiB free in {existing}",
            "set EXPERIMENTS to a writable folder with enough space",
        )


def main(_: Any) -> None:
    """Print all checks."""
    if FLAGS.submission:
        checks = list(check_submission(ROOT))
        ready = "ready for a pull request to the branch evaluation of the leaderboard's repository"
    else:
        entry = ENTRIES[FLAGS.entry]
        checks = [*check_machine(entry.gpus), *check_packages(), *check_folders(os.environ.get, entry)]
        ready = f"ready for {len(plan(FLAGS.entry))} trials"
    for requirement, met, found, remedy in checks:
        print(f"ok       {requirement}: {found}" if met else f"missing  {requirement}: {found}; {remedy}")
    missing = sum(not met for _, met, _, _ in checks)
    print(f"\n{missing} of {len(checks)} requirements are missing" if missing else f"\n{ready}")
    sys.exit(missing > 0)


if __name__ == "__main__":
    flags.DEFINE_enum("entry", "self", list(ENTRIES), "the runs of `experiments.competition.plan` to check for")
    flags.DEFINE_boolean("submission", False, "check this project's entry to the leaderboard instead of the machine")
    app.run(main)
