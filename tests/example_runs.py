"""Run the examples in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path
from signal import SIGKILL

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run(name, *arguments, processes=1, kill_at=None):
    """Run an example, under torchrun if there are several processes. Return the line that it prints.

    With `kill_at`, a step, its last process is killed before that step.
    """
    pytest.importorskip("sklearn")  # the digits
    script = [str(ROOT / "examples" / f"{name}.py"), *map(str, arguments)]
    script = [str(ROOT / "tests/killed.py"), str(kill_at), *script] if kill_at else script
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, *launcher, *script], env=environment, text=True, capture_output=True, timeout=1200, check=False
    )
    killed = done.returncode == -SIGKILL or "SIGKILL" in done.stderr or "SIGABRT" in done.stderr  # torch's threads may abort it
    assert killed if kill_at else done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(f"{name}: ")]
    assert len(lines) == (0 if kill_at else 1), done.stdout
    return lines[0] if lines else ""


def interrupted(name, folder, *arguments, processes, kill_at):
    """Run an example to its end in folder/whole, and kill it and run it again in folder/resumed. Return the last run's line."""
    run(name, folder / "whole", *arguments, processes=processes)
    run(name, folder / "resumed", *arguments, processes=processes, kill_at=kill_at)
    return run(name, folder / "resumed", *arguments, processes=processes)


def assert_identical(folder, weights, optimizer):
    """Assert that the last checkpoints in folder/whole and folder/resumed are equal bit for bit.

    `weights` and `optimizer` return the model's and the optimizer's state_dict, given the folder of a run.
    """
    whole, resumed = folder / "whole", folder / "resumed"
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    found, expected = optimizer(resumed), optimizer(whole)
    torch.testing.assert_close(found["state"], expected["state"], rtol=0, atol=0)
    assert found["param_groups"] == expected["param_groups"]
    assert expected["param_groups"][0]["step"] > 0
