"""Stand-in for `algoperf.pytorch_utils`: the only function of it that submissions use."""

import os

import torch


def pytorch_setup() -> tuple[bool, int, torch.device, int]:
    """Return whether torchrun started this process, its local rank, its device, and the number of GPUs."""
    parallel, rank = "LOCAL_RANK" in os.environ, int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    return parallel, rank, device, torch.cuda.device_count()
