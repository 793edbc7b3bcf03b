"""Train on digits with DDP, and go on from the last checkpoint: torchrun --nproc_per_node=2 examples/ddp.py FOLDER"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from shampoo import AdamWShampoo
from shampoo.schedule import warmup_cosine

BATCH, EVERY = 64, 20  # images per step, on all ranks together; steps between checkpoints


def save(path, model, optimizer, scheduler, step):
    """Save a checkpoint, which takes the place of the last one only when it is complete."""
    optimizer.consolidate_state_dict()  # on all ranks: gathers the state on rank 0
    if dist.get_rank() == 0:
        saved = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(saved | {"scheduler": scheduler.state_dict()}, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)


def load(path, model, optimizer, scheduler):
    """Load the last checkpoint on all ranks, of which there may be another number now. Return its step, or 0 without one."""
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    model.module.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    return saved["step"]


def main(folder, steps):
    dist.init_process_group("gloo")  # before the optimizer, which shares its work between the ranks; nccl on GPUs
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    model = DistributedDataParallel(model)
    optimizer = AdamWShampoo(model.parameters(), lr=3e-3, weight_decay=0.1)
    scheduler = warmup_cosine(optimizer, num_steps=steps, warmup_steps=steps // 20)

    images, labels = (torch.tensor(each) for each in load_digits(return_X_y=True))
    images = images.float() / 16
    path = Path(folder, "checkpoint.pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    first = load(path, model, optimizer, scheduler)
    for step in range(first + 1, steps + 1):
        batch = torch.randint(1500, (BATCH,), generator=torch.Generator().manual_seed(step))[rank::size]
        optimizer.zero_grad()
        loss = cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % EVERY == 0 or step == steps:
            save(path, model, optimizer, scheduler, step)
    with torch.no_grad():
        accuracy = (model.module(images[1500:]).argmax(dim=1) == labels[1500:]).float().mean().item()
    if rank == 0:
        print(f"ddp: {size} processes, steps {first + 1} to {steps}, test accuracy {accuracy:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=200)
    main(**vars(parser.parse_args()))
