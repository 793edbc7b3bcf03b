import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_runs_that_are_killed_or_run_out_of_disk_end_like_one_that_was_left_alone():
    """10 of the 200 kills, and one of the 20 full disks, of `experiments/kill_runs.py`."""
    flags = ["--kills=10", "--full_disks=1", "--steps=6", "--runs_of=tests/runner/toy_workload.py:Toy"]
    command = [sys.executable, "-m", "experiments.kill_runs", *flags]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=1200, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "every run was resumed, and ended like one that was left alone" in result.stdout
