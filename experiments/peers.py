"""Constructors of other packages' optimizers, with this project's options as far as they have them.

Each is called with (params, frequency, block_size). pytorch_optimizer and heavyball are packages; Meta's Distributed Shampoo is
the package torch-shampoo, or a checkout of facebookresearch/optimizers on PYTHONPATH; the competition's code is the folder
`shampoo_submission` of mlcommons/submissions_algorithms, which `use_competition` is told.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.optim import Optimizer

Constructor = Callable[[Any, int, int], Optimizer]  # of (params, frequency, block_size)

LR, BETAS, DECAY = 1e-3, (0.93, 0.995), 0.08  # as the competition's first point
COMPETITION_PACKAGE = "submissions.submissions_algorithms_v0_5.AlgoPerf_Team_21.external_tuning.shampoo_submission"
REQUIRED = {"meta Shampoo": "distributed_shampoo", "meta SOAP": "distributed_shampoo", "competition": "submissions"}


def is_available(name: str) -> bool:
    """Return whether the package of the optimizer `name` can be imported."""
    package = REQUIRED.get(name, name.split(".")[0] if "." in name else "torch")
    return package in sys.modules or find_spec(package) is not None


def soap(module: str, size: str, **options: Any) -> Constructor:
    """Return a constructor of another package's SOAP; `size` is its name for the maximum block size."""
    return lambda params, frequency, block_size: import_module(module).SOAP(
        params, lr=LR, precondition_frequency=frequency, **{size: block_size}, **options
    )


def meta(preconditioner: str, grafted: bool) -> Constructor:
    """Return a constructor of Meta's Distributed Shampoo with one of its preconditioner configs, grafted to Adam or not."""

    def construct(params: Any, frequency: int, block_size: int) -> Optimizer:
        package = import_module("distributed_shampoo")
        grafting = package.AdamPreconditionerConfig(beta2=BETAS[1], epsilon=1e-8) if grafted else None
        optimizer: Optimizer = package.DistributedShampoo(
            params, lr=LR, betas=BETAS, epsilon=1e-8, weight_decay=DECAY, max_preconditioner_dim=block_size,
            precondition_frequency=frequency, grafting_config=grafting, preconditioner_config=getattr(package, preconditioner),
        )  # fmt: skip
        return optimizer

    return construct


def use_competition(folder: str) -> None:
    """Make the competition's code in `folder` importable under the name that it was submitted as.

    Its optimizer needs a process group: one of this process alone is made.
    """
    path = Path(folder).resolve()
    if not (path / "optimizers" / "distributed_shampoo").is_dir():
        raise ValueError(f"{folder} has no optimizers/distributed_shampoo: give the competition's folder shampoo_submission")
    parts = COMPETITION_PACKAGE.split(".")
    for length in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:length]))
        module.__path__ = [str(path)] if length == len(parts) else []
        sys.modules[module.__name__] = module
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, rank=0, world_size=1, store=HashStore())


def competition(params: Any, frequency: int, block_size: int) -> Optimizer:
    """Construct the competition's optimizer with the options of its first point."""
    package = f"{COMPETITION_PACKAGE}.optimizers.distributed_shampoo"
    optimizer, types = import_module(f"{package}.distributed_shampoo"), import_module(f"{package}.shampoo_types")
    constructed: Optimizer = optimizer.DistributedShampoo(
        params, lr=LR, betas=BETAS, epsilon=1e-8, weight_decay=DECAY, max_preconditioner_dim=block_size,
        precondition_frequency=frequency, use_nadam=True, use_bias_correction=True, use_decoupled_weight_decay=True,
        grafting_config=types.AdamGraftingConfig(beta2=BETAS[1], epsilon=1e-8), use_merge_dims=True,
        use_protected_eigh=True,
    )  # fmt: skip
    return constructed


def muon(params: Any, frequency: int, block_size: int) -> Optimizer:
    """Construct torch's Muon for the matrices, which ignores all other parameters."""
    return torch.optim.Muon([p for p in params if p.dim() == 2], lr=LR, weight_decay=DECAY)


PEERS: dict[str, Constructor] = {
    "pytorch_optimizer.SOAP": soap("pytorch_optimizer", "max_precondition_dim"),
    "heavyball.SOAP": soap("heavyball", "max_precond_dim", compile_step=False),
    "meta Shampoo": meta("DefaultShampooConfig", grafted=True),
    "meta SOAP": meta("DefaultSOAPConfig", grafted=False),
    "competition": competition,
    **({"torch Muon": muon} if hasattr(torch.optim, "Muon") else {}),
}
