"""The example of FSDP2 learns, and a run that goes on from a checkpoint ends with the same bits as one without interruption."""

import re
import shutil

import pytest
import torch
from example_runs import run


def content(folder):
    """Return all tensors and other values of a checkpoint."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder, folder / "all.pt")
    saved = torch.load(folder / "all.pt", weights_only=True)
    return {(part, *key.split("/")): x for part in saved for key, x in saved[part].items()}


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.6", reason="FSDP2 on CPUs needs torch 2.6")
def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert "steps 1 to 12," in run("fsdp2", straight, "--steps=12", "--every=6", processes=2)
    shutil.copytree(straight / "6", resumed / "6")
    (resumed / "12").mkdir()  # as a run leaves it that ends while it saves
    output = run("fsdp2", resumed, "--steps=12", "--every=6", processes=2)
    assert "steps 7 to 12," in output
    assert float(re.search(r"accuracy (.*)", output).group(1)) > 0.3  # chance: 0.1
    expected, found = content(straight / "12"), content(resumed / "12")
    assert found.keys() == expected.keys()
    assert any("inv_roots" in key[1] and x.any() for key, x in found.items())
    for key, x in expected.items():
        assert torch.equal(found[key], x) if isinstance(x, torch.Tensor) else found[key] == x, key
