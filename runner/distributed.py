"""Several processes under torchrun: what each needs to know of the others. Without torchrun there is one, and nothing waits."""

import atexit
import os
from typing import Any

import torch
import torch.distributed as dist


def start() -> None:
    """Join the process group if torchrun started this process: NCCL with GPUs, gloo without."""
    if dist.is_torchelastic_launched():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)


def size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def from_first(value: Any) -> Any:
    """The value that rank 0 has."""
    values = [value]
    if size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def of_all(value: Any) -> list[Any]:
    """Every rank's value."""
    values = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return values
