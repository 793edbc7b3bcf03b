"""What only a GPU can show: no step waits for the device, and a process group of NCCL works. Without a GPU, all of it skips."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import MORE_SHAPES, VARIANTS, make_params, set_gradients

from shampoo import AdamWShampoo

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

BETWEEN_TURNS = {"stagger": True, "precondition_frequency": 100, "start_preconditioning_step": 100}


def load_gradients(params, seed):
    """Set gradients, and wait until they are on the device."""
    set_gradients(params, seed)
    torch.cuda.synchronize()


@pytest.mark.parametrize("options", [*VARIANTS.values(), BETWEEN_TURNS], ids=[*VARIANTS, "staggered, between turns"])
def test_an_ordinary_step_never_waits_for_the_device(options):
    params = make_params(*MORE_SHAPES, device="cuda")
    optimizer = AdamWShampoo(params, **{"precondition_frequency": 20, "start_preconditioning_step": 1, **options})
    for t in range(3):
        load_gradients(params, t)
        optimizer.step()
    for t in range(3, 6):
        load_gradients(params, t)
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("solver", ["auto", "eigh", "qr", "newton"])
def test_roots_are_exact_whatever_precision_products_have(solver, precision):
    """TF32 and bfloat16 products of the user's choice round the factors, but not what is computed from them."""
    from shampoo.roots import inverse_root

    G = torch.randn(4, 96, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = G @ G.mT / 200
    lam, Q = torch.linalg.eigh(A)
    exact = (Q * (lam + 1e-4 * lam.sum(dim=1, keepdim=True)).rsqrt().unsqueeze(1)) @ Q.mT
    torch.set_float32_matmul_precision(precision)
    try:
        single = A.float().cuda()
        zeros = torch.zeros_like(single)
        X, notes = inverse_root(single, 1.0, 0.5, 1e-4, zeros, zeros.clone(), solver=solver, relative_eps=True)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not notes
    assert (X.cpu() - exact).norm() / exact.norm() < 5e-5  # cuSOLVER's eigenvectors: 1.1e-5; products in TF32: 1e-3


NCCL = """
import sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from shampoo import AdamWShampoo
from shampoo.ranks import Exchange, Ranks

dist.init_process_group("nccl", rank=0, world_size=1, store=dist.FileStore(sys.argv[1], 1))
torch.cuda.set_device(0)

def train(wrap, group):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 3)).cuda()
    model = wrap(model) or model
    optimizer = AdamWShampoo(model.parameters(), lr=0.01, weight_decay=0.1, block_size=16, process_group=group)
    for t in range(12):
        x = torch.randn(64, 24, generator=torch.Generator().manual_seed(t)).cuda()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in full]), optimizer

expected, _ = train(lambda model: None, None)
for wrap in (DistributedDataParallel, fully_shard):
    found, optimizer = train(wrap, None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    optimizer.state_dict()

_, optimizer = train(lambda model: None, None)
ranks = Ranks(dist.group.WORLD, 0, 1)
exchange = Exchange(ranks, optimizer._buckets, {p: "p" for b in optimizer._buckets for p in b.params}, None)
sent = [torch.randn(b.layout.numel, device="cuda") for b in optimizer._buckets]
for _ in range(2):
    received = exchange.run(sent, [False, False])
    exchange.check()
    for b, of_ranks in enumerate(received):
        assert torch.equal(of_ranks[0], sent[b])
dist.destroy_process_group()
print("done")
"""


def test_one_rank_of_nccl_trains_with_ddp_and_fsdp2_and_exchanges_its_directions(tmp_path):
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", NCCL, tmp_path / "store"],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.stdout.splitlines()[-1:] == ["done"], run.stderr[-3000:]
