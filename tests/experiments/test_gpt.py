"""Training on Python files: the runs learn, see the same batches, and stop by the clock."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.gpt import GPT
from experiments.python_files import read_texts, tokenize

ROOT = Path(__file__).parents[2]
FOLDERS = [f"{sysconfig.get_paths()['stdlib']}/{name}" for name in ("asyncio", "email", "unittest", "xml", "encodings")]
NAMES = ["adamw", "shampoo", "soap"] + ["muon"] * hasattr(torch.optim, "Muon")
SIZES = ["--layers=2", "--width=32", "--heads=2", "--context=32", "--vocabulary=512", "--batch=8"]


def run(path, *arguments):
    """Run the command; return its CSV and what it prints."""
    line = [sys.executable, "-m", "experiments.gpt", f"--folders={','.join(FOLDERS)}", *SIZES, f"--output={path}", *arguments]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert result.returncode == 0, result.stderr
    return pd.read_csv(path), result.stdout


@pytest.mark.slow
def test_every_optimizer_falls_below_the_entropy_of_tokens(tmp_path):
    rates = ",".join(f"{name}=2e-2" for name in NAMES)
    table, _ = run(tmp_path / "a.csv", "--steps=120", "--evaluate_every=40", f"--lr={rates}", f"--plot={tmp_path}/a.png")
    assert list(table["optimizer"].drop_duplicates()) == [
        name for name in ["adamw", "shampoo", "muon", "soap"] if name in NAMES
    ]
    counts = np.bincount(tokenize(read_texts(FOLDERS, 1e8, 0), 512)[0])
    shares = counts[counts > 0] / counts.sum()
    entropy = -(shares * np.log(shares)).sum()
    for _, rows in table.groupby("optimizer"):
        assert list(rows["step"]) == [0, 40, 80, 120]
        assert rows["seconds"].is_monotonic_increasing
        assert rows["validation loss"].iloc[0] == pytest.approx(np.log(512), abs=0.1)  # small first weights
        assert rows["train loss"].iloc[-1] < entropy
        assert rows.iloc[1:].notna().all(axis=None)
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.slow
def test_runs_start_from_the_same_weights_and_see_the_same_batches(tmp_path):
    frozen = ",".join(f"{name}=0" for name in NAMES)
    table, _ = run(tmp_path / "a.csv", "--steps=6", "--evaluate_every=2", f"--lr={frozen}")
    losses = {name: rows[["train loss", "validation loss"]].to_numpy() for name, rows in table.groupby("optimizer")}
    for name in NAMES:
        np.testing.assert_array_equal(losses[name], losses["adamw"])
    assert len(set(losses["adamw"][1:, 0])) == 3  # other batches at other steps


@pytest.mark.slow
def test_the_clock_ends_a_run_and_the_table_says_so(tmp_path):
    table, printed = run(tmp_path / "a.csv", "--steps=1000000", "--optimizers=adamw,shampoo", "--minutes=0.15")
    assert set(table["optimizer"]) == {"adamw", "shampoo"}
    assert printed.count("clock") == 3  # after the first, and both after the second
    assert table.groupby("optimizer")["step"].max().between(1, 999_999).all()


def test_texts_are_different_and_no_file_is_in_both_parts(tmp_path):
    for i in range(200):
        (tmp_path / f"{i}.py").write_text(f"x = {i // 2}\n")
    training, held_out = read_texts([str(tmp_path)], 1e6, 0)
    assert sorted(training + held_out) == sorted(f"x = {i}\n" for i in range(100))
    assert 0 < len(held_out) < 10
    training, held_out = read_texts([str(tmp_path)], 300, 0)
    assert 290 <= sum(map(len, training + held_out)) <= 300


def test_the_default_model_has_the_size_of_gpt2():
    with torch.device("meta"):
        model = GPT(50304, 1024, 768, 12, 12)
    assert sum(p.numel() for p in model.parameters()) == 124_475_904  # GPT-2's 124,439,808, with 47 more tokens
