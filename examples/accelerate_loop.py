"""Train on digits with accelerate, and go on from the last checkpoint.

    accelerate launch --cpu --num_processes=2 examples/accelerate_loop.py FOLDER

The optimizer needs no line of its own. Create it after Accelerator(), so that the processes share its work.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from shampoo import AdamWShampoo
from shampoo.schedule import warmup_cosine


def main(folder, epochs):
    order = DataLoaderConfiguration(use_seedable_sampler=True)  # each epoch's depends on its number alone, also after resuming
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), dataloader_config=order)
    set_seed(0)
    images, labels = (torch.tensor(each) for each in load_digits(return_X_y=True))
    images = images.float() / 16
    loader = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=32, shuffle=True)  # per process
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = AdamWShampoo(model.parameters(), lr=3e-3, weight_decay=0.1)
    # With n processes, accelerate takes n steps of the schedule per step of the optimizer: count those of one process
    scheduler = warmup_cosine(optimizer, num_steps=epochs * len(loader), warmup_steps=len(loader))
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    saved = [int(path.name) for path in Path(folder).glob("[0-9]*")]  # one folder per epoch
    if saved:
        accelerator.load_state(f"{folder}/{max(saved)}")
    first = max(saved, default=0)
    for epoch in range(first, epochs):
        loader.set_epoch(epoch)
        for inputs, targets in loader:
            optimizer.zero_grad()
            accelerator.backward(cross_entropy(model(inputs), targets))
            optimizer.step()
            scheduler.step()
        accelerator.save_state(f"{folder}/{epoch + 1}")  # on all processes
    with torch.no_grad():
        predicted = accelerator.unwrap_model(model)(images[1500:].to(accelerator.device)).argmax(dim=1).cpu()
    accuracy = (predicted == labels[1500:]).float().mean().item()
    done = f"{accelerator.num_processes} processes, epochs {first + 1} to {epochs}"
    accelerator.print(f"accelerate_loop: {done}, test accuracy {accuracy:.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--epochs", type=int, default=8)
    main(**vars(parser.parse_args()))
