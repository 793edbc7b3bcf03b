"""The runner's commands, run as processes or called in this one."""

import contextlib
import functools
import importlib
import io
import subprocess
import sys
from concurrent.futures import Executor, Future
from pathlib import Path

import pytest
from absl import flags

ROOT = Path(__file__).parents[2]
TIMEOUT = 1200  # seconds; reached only by a process that hangs


def arguments(folder, *given, name="e", workload="pydoc_lm"):
    """Return the command line of a run, with the submission and its search space unless others are given."""
    line = [
        f"--workload={workload}",
        "--submission_path=submission.py",
        f"--experiment_dir={folder}",
        f"--experiment_name={name}",
    ]
    if not any(flag.startswith("--tuning_search_space") for flag in given):
        line.append("--tuning_search_space=tuning_search_space.json")
    return [*line, *given]


def start(module, *argv, check=True):
    """Run `python -m MODULE ARGV` on one thread. Return the completed process, with exit status 0 if `check`."""
    result = subprocess.run(
        [sys.executable, "-m", module, *argv], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def start_process(module, *argv):
    """Start `python -m MODULE ARGV`. Return the running process, with what it prints in its stdout."""
    line = [sys.executable, "-m", module, *argv]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@functools.cache
def load(module):
    """Import a command's module. Return it and its flags, which are removed from absl's FLAGS: commands share flag names."""
    command = importlib.import_module(module)
    if hasattr(command, "define_flags"):
        command.define_flags()
    own = flags.FlagValues()
    for flag in flags.FLAGS.get_key_flags_for_module(module):
        own[flag.name] = flag
    flags.FLAGS.remove_flag_values(own)
    return command, own


def call(module, *argv):
    """Do what `python -m MODULE ARGV` does, in this process. Return what it prints, or raise SystemExit with that as a note."""
    command, own = load(module)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(ROOT)
        patch.setattr(sys, "path", [*sys.path])
        flags.FLAGS.append_flag_values(own)
        try:
            flags.FLAGS([module, *argv])
            command.main([])
        except SystemExit as stopped:
            stopped.add_note(printed.getvalue())
            raise
        finally:
            flags.FLAGS.unparse_flags()
            flags.FLAGS.remove_flag_values(own)
    return printed.getvalue()


def error_of(module, *argv):
    """Return the message with which `call` exits; as SystemExit's code, it means exit status 1 and goes to stderr."""
    with pytest.raises(SystemExit) as stopped:
        call(module, *argv)
    assert isinstance(stopped.value.code, str)
    return stopped.value.code


class InProcess(Executor):
    """Runs what it is given at once, in this process: new ones take seconds to start."""

    def __init__(self, count=1):
        pass

    def submit(self, function, /, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future
