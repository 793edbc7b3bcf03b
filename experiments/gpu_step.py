"""Show where the time of a step goes on a GPU: `python -m experiments.gpu_step --workload=imagenet_vit`.

For each optimizer, `torch.profiler` watches ordinary steps, on the parameter shapes of one of AlgoPerf's models:

    wall        milliseconds of a step
    busy        milliseconds that its kernels and copies take on the device
    idle        1 - busy / wall: the share that a CUDA graph could save at most
    kernels     kernels and copies on the device
    waits       calls by which the host waits for the device

Then, of gradients G (d x 2d) in several sizes d, the relative error of the factor G G^T from products in TF32, and that of G
rounded to TF32's mantissa of 10 bits before an exact product, which needs no GPU; and the error of the factor's inverse square
root (eps 1e-4 of the trace) that this makes.
"""

from typing import Any

import pandas as pd
import torch
from absl import app, flags
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from .balance import load_shapes
from .peers import use_competition
from .step_time import OPTIMIZERS, milliseconds

FLAGS = flags.FLAGS

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
STEPS = 4


def profile_steps(optimizer: Optimizer, device: torch.device) -> dict[str, float]:
    """Return the row of a table for ordinary steps of an optimizer whose parameters have gradients."""
    for _ in range(3):
        optimizer.step()
    wall = min(milliseconds(optimizer.step, device) for _ in range(STEPS))
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            optimizer.step()
        torch.cuda.synchronize()
    events = profiler.events() or []
    device_events = [e for e in events if e.device_type.name == "CUDA" and not e.name.startswith("Optimizer.")]  # its own span
    busy = sum(e.self_device_time_total for e in device_events) / 1e3 / STEPS
    waits = sum(e.name in WAITS for e in events) - 1  # less that of synchronize()
    return {
        "wall": wall,
        "busy": busy,
        "idle": max(0.0, 1 - busy / wall),
        "kernels": len(device_events) / STEPS,
        "waits": waits / STEPS,
    }


def round_mantissa(X: Tensor, bits: int = 10) -> Tensor:
    """Return float32 X rounded to `bits` bits of mantissa, to nearest, ties to even, as the tensor cores' TF32 inputs are."""
    drop = 23 - bits
    raw = X.contiguous().view(torch.int32)
    return ((raw + (1 << (drop - 1)) - 1 + ((raw >> drop) & 1)) & -(1 << drop)).view(torch.float32)


def inverse_square_root(A: Tensor, eps: float = 1e-4) -> Tensor:
    """Return (A + eps tr(A) I)^(-1/2) for A in float64."""
    lam, Q = torch.linalg.eigh(A)
    root: Tensor = (Q * (lam + eps * A.trace()).rsqrt()) @ Q.mT
    return root


def tf32_errors(d: int, device: torch.device) -> dict[str, float]:
    """Return the row of the second table for size d."""
    G = torch.randn(d, 2 * d, generator=torch.Generator().manual_seed(d)).to(device)
    G *= torch.logspace(0, -3, d, device=device).unsqueeze(1)  # a spectrum as of real gradients
    exact = G.double() @ G.double().mT
    torch.set_float32_matmul_precision("high")
    found = {"TF32": (G @ G.mT).double()}
    torch.set_float32_matmul_precision("highest")
    found["emulated"] = round_mantissa(G).double() @ round_mantissa(G).double().mT
    found["float32"] = (G @ G.mT).double()
    root = inverse_square_root(exact)
    errors = {f"{name}, factor": float((A - exact).norm() / exact.norm()) for name, A in found.items()}
    of_roots = {f"{name}, root": float((inverse_square_root(A) - root).norm() / root.norm()) for name, A in found.items()}
    return errors | of_roots


def main(_: Any) -> None:
    """Print both tables."""
    if FLAGS.competition:
        use_competition(FLAGS.competition)
    device, rows = torch.device("cuda"), {}
    for name in FLAGS.optimizer:
        params = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in load_shapes()[FLAGS.workload]]
        for p in params:
            p.grad = torch.randn_like(p)
        rows[name] = profile_steps(OPTIMIZERS[name](params, 1000, 1024), device)
    print(f"{FLAGS.workload}, {torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(pd.DataFrame(rows).T.to_string(float_format="{:.2f}".format))
    print(pd.DataFrame({d: tf32_errors(d, device) for d in (64, 256, 1024)}).T.to_string(float_format="{:.1e}".format))


if __name__ == "__main__":
    flags.DEFINE_enum("workload", "imagenet_vit", sorted(load_shapes()), "AlgoPerf workload whose parameter shapes are used")
    flags.DEFINE_multi_enum("optimizer", ["adamw", "shampoo", "shampoo, defaults"], list(OPTIMIZERS), "optimizers to watch")
    flags.DEFINE_string("competition", None, "folder shampoo_submission of the competition's code")
    app.run(main)
