"""The runner on multiple ranks, started by torchrun."""

import json

import numpy as np
import pandas as pd
import pytest
from commands import ROOT, start


@pytest.mark.slow
def test_two_ranks_train_like_one_and_their_checkpoint_resumes_on_one(tmp_path, monkeypatch):
    """Each rank processes half of a batch and half of an evaluation; only rank 0 writes."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # two ranks cannot share a GPU
    point = json.loads((ROOT / "runner" / "tuning_search_space.json").read_text())[0]
    space = tmp_path / "space.json"
    space.write_text(json.dumps([{**point, "epsilon": 1e-4, "learning_rate": 1e-3}]))  # these keep rounding errors small
    flags = [
        "--workload=flights_dlrm",
        "--submission_path=submission.py",
        f"--tuning_search_space={space}",
        f"--experiment_dir={tmp_path}",
        "--eval_every_steps=10",
        "--rng_seed=3",
    ]

    def train(ranks, name, steps):
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"] if ranks > 1 else []
        resume = ["--resume_last_run"] if (tmp_path / name).exists() else []
        argv = [*flags, f"--experiment_name={name}", f"--max_global_steps={steps}", *resume]
        return start(*launcher, "runner", *argv).stdout

    assert train(2, "two", 20).count("picture:") == 1
    trial = tmp_path / "two/flights_dlrm_pytorch/trial_1"
    (trial / "checkpoint_20").unlink()  # as if it had been killed after step 10
    meta = json.loads((trial / "meta_data_0.json").read_text())
    (trial / "meta_data_0.json").write_text(json.dumps({**meta, "ended": "-"}))
    train(1, "two", 40)
    train(1, "one", 40)
    two, one = (pd.read_csv(tmp_path / name / "flights_dlrm_pytorch/trial_1/eval_measurements.csv") for name in ("two", "one"))
    assert list(two["global_step"]) == list(one["global_step"]) == [1, 10, 20, 30, 40]
    for split in ("train", "validation", "test"):
        np.testing.assert_allclose(two[f"{split}/loss"], one[f"{split}/loss"], rtol=1e-4)
