"""Train with FSDP2, save while training goes on, and resume: torchrun --nproc_per_node=2 examples/fsdp2.py FOLDER"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from shampoo import AdamWShampoo
from shampoo.groups import param_groups
from shampoo.schedule import warmup_cosine

BATCH = 64  # images per step, on all ranks together
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # one key per parameter's name and state, as in torchtitan


def gather(model, optimizer, scheduler):
    """Return what a checkpoint holds, or takes when it is loaded. On all ranks: gathers the state of what each owns."""
    weights, state = get_state_dict(model, optimizer, options=FLAT)
    return {"model": weights, "optimizer": state, "scheduler": scheduler.state_dict()}


def load(folder, model, optimizer, scheduler):
    """Load the last complete checkpoint, of any number of ranks. Return its step, or 0 without one."""
    last = max((int(path.parent.name) for path in folder.glob("*/.metadata")), default=0)
    if last:
        saved = gather(model, optimizer, scheduler)
        dcp.load(saved, checkpoint_id=folder / str(last))
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=FLAT)
        scheduler.load_state_dict(saved["scheduler"])
    return last


def main(folder, steps, every):
    dist.init_process_group("gloo")  # on GPUs: "cpu:gloo,cuda:nccl"
    rank, size, writers = dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    for layer in [*model[::2], model]:
        fully_shard(layer, mesh=dist.init_device_mesh("cpu", (size,)))
    optimizer = AdamWShampoo(param_groups(model, weight_decay=0.1), lr=3e-3)  # ranks share its work and state
    scheduler = warmup_cosine(optimizer, num_steps=steps, warmup_steps=steps // 20)

    images, labels = (torch.tensor(each) for each in load_digits(return_X_y=True))
    images, folder, saving = images.float() / 16, Path(folder), None
    first = load(folder, model, optimizer, scheduler)
    for step in range(first + 1, steps + 1):
        batch = torch.randint(1500, (BATCH,), generator=torch.Generator().manual_seed(step))[rank::size]
        optimizer.zero_grad()
        cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        scheduler.step()
        if step % every == 0 or step == steps:
            if saving:
                saving.result()  # one at a time
            state = gather(model, optimizer, scheduler)
            saving = dcp.async_save(state, checkpoint_id=folder / str(step), process_group=writers)
    if saving:
        saving.result()
    with torch.no_grad():
        accuracy = (model(images[1500:]).argmax(dim=1) == labels[1500:]).float().mean().item()
    if rank == 0:
        print(f"fsdp2: {size} processes, steps {first + 1} to {steps}, test accuracy {accuracy:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=50)  # steps between checkpoints
    main(**vars(parser.parse_args()))
