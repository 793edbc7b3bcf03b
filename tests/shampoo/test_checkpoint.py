"""Checkpoints of earlier versions load: golden/VERSION.pt, written by `python tests/shampoo/test_checkpoint.py FILE`."""

import sys
from pathlib import Path

import pytest
import torch
from common import COMPETITION

from shampoo import AdamWShampoo

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.pt"))
SHAPES = [(6, 5), (7,), (), (4, 3, 2, 2), (20, 9), (0, 3)]
STEPS = 7
COMMON = COMPETITION | {"lr": 1e-2, "eps": 1e-3, "precondition_frequency": 3, "block_size": 10}
CASES = {
    "blocks, momentum, decay": {"block_size": 8, "momentum": 0.9, "nesterov": True, "nadam": True, "weight_decay": 0.1},
    "qr, staggered, bfloat16 roots": {"block_size": 8, "solver": "qr", "stagger": True, "bf16_roots": True},
    "one-sided, unmerged": {"exponents": (0.5, 0.0), "merge_dims": False, "block_size": 4, "grafting": "sgd", "lr": 1e-3},
    "max_dim, vectors without factors": {"max_dim": 9, "precondition_vectors": False, "grafting": "none", "lr": 1e-3},
    "sums, no average of gradients": {"betas": (0.0, 1.0), "grafting": "adagrad", "factor_frequency": 2},
}


def train(optimizer, params, steps):
    for t in steps:
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i)).to(p.dtype)
        optimizer.step()


def groups(params, options):
    """Two groups, the second with options of its own."""
    return [{"params": params[:4]}, {"params": params[4:], "lr": 2 * options["lr"], "betas": (0.8, 0.95)}]


def record(options, dtype):
    """Return the checkpoint of a run after 7 steps and its weights after 7 more."""
    params = [
        torch.nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(i)).to(dtype)) for i, s in enumerate(SHAPES)
    ]
    optimizer = AdamWShampoo(groups(params, options), **options)
    train(optimizer, params, range(STEPS))
    saved = {"weights": [p.detach().clone() for p in params], "optimizer": optimizer.state_dict()}
    saved = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, saved)
    train(optimizer, params, range(STEPS, 2 * STEPS))
    return {**saved, "later": [p.detach().clone() for p in params]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_checkpoint_of_an_earlier_version_loads_and_the_run_continues(path, case, dtype):
    golden = torch.load(path, weights_only=True)[f"{case}, {dtype}"]
    params = [torch.nn.Parameter(w) for w in golden["weights"]]
    optimizer = AdamWShampoo(groups(params, COMMON), **{**CASES[case], "lr": 0.5})
    optimizer.load_state_dict(golden["optimizer"])

    now, saved = optimizer.state_dict(), golden["optimizer"]
    for i, of_parameter in saved["state"].items():
        for name, x in of_parameter.items():
            assert torch.equal(now["state"][i][name], x), (i, name)
            assert now["state"][i][name].dtype == x.dtype
    for group, then in zip(now["param_groups"], saved["param_groups"], strict=True):
        assert {key: group[key] for key in then} == then

    train(optimizer, params, range(STEPS, 2 * STEPS))
    for p, expected in zip(params, golden["later"], strict=True):
        tolerance = (
            {"rtol": 0, "atol": 1e-5} if dtype != torch.bfloat16 else {"rtol": 2**-7, "atol": 2**-7}
        )  # a unit in the last place
        torch.testing.assert_close(p.detach(), expected, **tolerance)


def test_there_is_a_golden_file():
    assert GOLDEN


if __name__ == "__main__":
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    torch.save(
        {f"{case}, {dtype}": record({**COMMON, **CASES[case]}, dtype) for case in CASES for dtype in dtypes}, sys.argv[1]
    )
