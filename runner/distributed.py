"""Communication between processes under torchrun. Without torchrun there is one process, and nothing waits."""

import atexit
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def start() -> None:
    """Join the process group if torchrun started this process: NCCL with GPUs, gloo without."""
    if dist.is_torchelastic_launched():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process; rank 0 prints and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def broadcast(value: Any) -> Any:
    """Return rank 0's value on all ranks."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def all_gather(value: Any) -> list[Any]:
    """Return the values of all ranks, in order of rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def unwrap(model: Any) -> Any:
    """Return the model inside DistributedDataParallel, or `model` itself if it is not wrapped."""
    return model.module if isinstance(model, DistributedDataParallel) else model
