"""Kill the runner at random moments, and fill its disk: `python -m experiments.kill_runs --kills=200 --full_disks=20`.

A run of two trials is killed one to four times and resumed each time: by SIGKILL or Ctrl-C at a random time, by SIGKILL just
before a random access to one of its files, or by the system in the middle of writing a file, after a random number of bytes. In
other runs, the disk is full from a random time on, but for at most one and a half checkpoints; there is room again once the run
has ended, and it is resumed.

In the end, each run must be like one that was left alone: the same files, checkpoints equal bit for bit, and the same rows in
its logs, times excepted. Trials that had ended when the disk was full must have stayed as they were. The disk is a tmpfs; where
mounting one is not allowed, files above a certain size fail instead.
"""

import functools
import importlib
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from absl import app, flags

FLAGS = flags.FLAGS

PROJECT = Path(__file__).parents[1]
NUM_TRIALS, EVAL_EVERY = 2, 3
TIMES = ("accumulated_", "score", "total_duration", "preemption_count")  # what differs between runs
ACCESSES = ("open", "os.rename", "os.remove", "os.mkdir")  # Python's audit events
FORK = multiprocessing.get_context("fork")  # a child has the modules; importing them takes seconds
TIMEOUT = 600  # seconds; reached only by a process that hangs


def arguments(root: Path) -> list[str]:
    """Return the command line of a run in a folder."""
    return [
        "runner",
        f"--workload={FLAGS.runs_of}",
        f"--submission_path={PROJECT / 'submission.py'}",
        f"--tuning_search_space={PROJECT / 'runner' / 'tuning_search_space.json'}",
        f"--num_tuning_trials={NUM_TRIALS}",
        f"--max_global_steps={FLAGS.steps}",
        f"--eval_every_steps={EVAL_EVERY}",
        "--rng_seed=1",
        f"--experiment_dir={root}",
        "--experiment_name=e",
        "--resume_last_run",
    ]


def run(root: Path, before: Callable[[], None]) -> None:
    """Call `before`, and do what `python -m runner` does; its output goes to a file in the folder `root`."""
    output = os.open(root / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from runner import __main__ as runner  # its flags would be required of this command

    argv = arguments(root)
    FLAGS.unparse_flags()
    FLAGS(argv)
    before()
    try:
        runner.main([])
    except KeyboardInterrupt:  # before the first trial or after the last
        sys.exit(1)


def start(root: Path, before: Callable[[], None] = lambda: None) -> Any:
    """Return a new process that runs or resumes the run in the folder `root`."""
    process = FORK.Process(target=run, args=(root, before))
    process.start()
    return process


def end(process: Any) -> int:
    """Wait for a process, and return its exit status."""
    process.join(TIMEOUT)
    if process.is_alive():
        process.kill()
        raise RuntimeError(f"a run did not end within {TIMEOUT} s")
    return int(process.exitcode)


def at_access(number: int, root: Path, count: Any, act: Callable[[], None]) -> Callable[[], None]:
    """Return a function after which this process counts its accesses to files in `root`, and acts before one of them."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in ACCESSES and str(args[0]).startswith(f"{root}{os.sep}"):
            count.value += 1
            if count.value == number:
                act()

    return lambda: sys.addaudithook(hook)


def limit_size(size: int) -> None:
    """Let no file of this process grow above a size."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def die() -> None:
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_writing(size: int) -> None:
    """Have this process killed by the system when it lets a file grow above a size."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    limit_size(size)


# What a run leaves


def without_times(rows: Any) -> Any:
    """Return a row, a list of rows, or a list of pairs of a step and a row without what differs between runs."""
    if isinstance(rows, dict):
        return {name: value for name, value in rows.items() if not name.startswith(TIMES)}
    return [without_times(row) if isinstance(row, (dict, list, tuple)) else row for row in rows]


def contents(folder: Path) -> dict[str, Any]:
    """Return what must be equal in the folders of a trial, by file."""
    from runner.logs import LOGS, as_written, ended, read_checkpoint

    found: dict[str, Any] = {"ended": ended(folder)}
    for path in folder.iterdir():
        if path.name in LOGS:
            found[path.name] = without_times(as_written(path).to_dict("records"))
        elif path.name.startswith("checkpoint_"):
            state = read_checkpoint(path, torch.device("cpu"))
            kept = ("model_params", "optimizer_state", "model_state", "global_step", "log_rows")
            found[path.name] = {name: state[name] for name in kept} | {"results": without_times(state["eval_results"])}
        elif path.name == "meta_data_0.json":
            found[path.name] = json.loads(path.read_text())["rng_seed"]
        elif not path.name.startswith(("meta_data_", "flags_", "set_aside_", "lr ")):  # one more for each restart
            found[path.name] = path.read_text()
    return found


def equal(x: Any, y: Any) -> bool:
    """Return whether nested containers are equal bit for bit."""
    if isinstance(x, torch.Tensor):
        return torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(equal(x[key], y[key]) for key in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(equal, x, y))
    return bool(x == y)


def trials(root: Path) -> dict[str, dict[str, Any]]:
    """Return the contents of the trials of a run by name."""
    return {path.name: contents(path) for path in sorted(root.glob("e/*/trial_*"))}


def check(expected: dict[str, dict[str, Any]], root: Path, only_ended: bool = False) -> None:
    """Raise RuntimeError if a trial in `root` differs from the expected one."""
    found = trials(root)
    if only_ended:
        found = {name: files for name, files in found.items() if files["ended"] != "-"}
    for name in found if only_ended else expected:
        here, there = found.get(name, {}), expected[name]
        if differing := sorted(file for file in {*here, *there} if not equal(here.get(file), there.get(file))):
            raise RuntimeError(f"{root}: {', '.join(differing)} of {name} differ from those of a run that was left alone")


# Trouble

SIGKILL, CTRL_C, ACCESS, WRITE = "by SIGKILL at a time", "by Ctrl-C at a time", "before an access to a file", "in a write"


def killed(root: Path, kind: str, seconds: float, accesses: int, size: int, draw: random.Random) -> bool:
    """Run, and be killed at a random moment of this kind. Return False if the run ended before."""
    if kind in (SIGKILL, CTRL_C):
        process = start(root)
        process.join(draw.uniform(0, seconds))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL if kind == SIGKILL else signal.SIGINT)
    else:
        act = die if kind == ACCESS else functools.partial(die_writing, int(size ** draw.random()))
        process = start(root, at_access(draw.randint(1, accesses), root / "e", FORK.Value("q", 0), act))
    status = end(process)
    if status not in (0, {SIGKILL: -signal.SIGKILL, CTRL_C: 1, ACCESS: -signal.SIGKILL, WRITE: -signal.SIGXFSZ}[kind]):
        raise RuntimeError(f"{root}: the run ended with status {status}: {(root / 'output.txt').read_text()}")
    return status != 0


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """Mount a tmpfs of `size` bytes at `folder`, and yield True; yield False if that is not allowed."""
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode == 0
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)


def limit_files(size: int, delay: float) -> Callable[[], None]:
    """Return a function after which files of this process cannot grow above `size` bytes, once `delay` seconds have passed."""

    def begin() -> None:
        signal.signal(signal.SIGALRM, lambda *_: limit_size(size))
        signal.setitimer(signal.ITIMER_REAL, delay)

    return begin


def filled(root: Path, delay: float, room: int, mounted: bool) -> bool:
    """Run on a disk that is full after `delay` seconds but for `room` bytes. Return False if the run ended without an error."""
    if not mounted:
        return end(start(root, limit_files(room, delay))) != 0
    process = start(root)
    process.join(delay)
    fill(root / "filler", room)
    status = end(process)
    (root / "filler").unlink()
    return status != 0


def fill(path: Path, room: int) -> None:
    """Write a file that leaves `room` bytes of its disk."""
    with path.open("wb") as file:
        while path.stat().st_size == 0:
            free = os.statvfs(path).f_bavail * os.statvfs(path).f_frsize
            with suppress(OSError):  # the run has written something since then
                os.posix_fallocate(file.fileno(), 0, max(free - room, 1))


# The command


def kill_runs(expected: dict[str, dict[str, Any]], seconds: float, accesses: int, size: int, draw: random.Random) -> str:
    """Kill runs `--kills` times, and check each. Return how often in which way."""
    kills = dict.fromkeys((SIGKILL, CTRL_C, ACCESS, WRITE), 0)
    while sum(kills.values()) < FLAGS.kills:
        with tempfile.TemporaryDirectory(prefix="killed") as folder:
            root = Path(folder)
            for _ in range(draw.randint(1, 4)):
                kind = draw.choice(list(kills))
                kills[kind] += killed(root, kind, seconds, accesses, size, draw)
            if end(start(root)) != 0:
                raise RuntimeError(f"the run cannot be resumed: {(root / 'output.txt').read_text()}")
            check(expected, root)
        print(f"killed {sum(kills.values())} times", flush=True)
    return f"{sum(kills.values())} kills ({', '.join(f'{count} {kind}' for kind, count in kills.items())})"


def fill_disks(expected: dict[str, dict[str, Any]], seconds: float, size: int, draw: random.Random) -> str:
    """Fill the disk of runs `--full_disks` times, and check each. Return how."""
    count, kinds = 0, set()
    while count < FLAGS.full_disks:
        with tempfile.TemporaryDirectory(prefix="filled") as folder, small_disk(Path(folder), 100 * size) as mounted:
            root = Path(folder)
            room = draw.randrange(int(1.5 * size) if mounted else size)
            count += filled(root, draw.uniform(0, seconds), room, mounted)
            if partial := [str(path) for path in root.rglob(".partial_*")]:
                raise RuntimeError(f"a full disk leaves {partial}")
            check(expected, root, only_ended=True)
            if end(start(root)) != 0:
                raise RuntimeError(f"the run does not go on: {(root / 'output.txt').read_text()}")
            check(expected, root)
            kinds.add("a tmpfs" if mounted else "limits on the size of files")
        print(f"filled {count} disks", flush=True)
    return f"{count} full disks ({', '.join(kinds)})"


def main(_: Any) -> None:
    """Run once without trouble, then with it, and print a summary."""
    torch.set_num_threads(1)  # so that this process can be forked
    importlib.import_module("runner.__main__")
    importlib.import_module("torch._dynamo")  # the first optimizer of a process imports it, for seconds

    draw = random.Random(FLAGS.seed)
    with tempfile.TemporaryDirectory(prefix="alone") as folder:
        root, count, begin = Path(folder), FORK.Value("q", 0), time.monotonic()
        if end(start(root, at_access(0, root / "e", count, die))) != 0:
            sys.exit(f"error: the run fails: {(root / 'output.txt').read_text()}")
        seconds, expected = time.monotonic() - begin, trials(root)
        size = max(path.stat().st_size for path in root.glob("e/*/trial_*/checkpoint_*"))
    done = [
        kill_runs(expected, seconds, count.value, size, draw),
        fill_disks(expected, seconds, size, draw),
    ]
    print(f"{'; '.join(done)}; every run was resumed, and ended like one that was left alone")


if __name__ == "__main__":
    flags.DEFINE_integer("kills", 200, "number of kills", lower_bound=0)
    flags.DEFINE_integer("full_disks", 20, "number of full disks", lower_bound=0)
    flags.DEFINE_string("runs_of", "solubility_gnn", "workload to run")
    flags.DEFINE_integer("steps", 12, "steps of a trial", lower_bound=2)
    flags.DEFINE_integer("seed", 0, "seed for the moments")
    app.run(main)
