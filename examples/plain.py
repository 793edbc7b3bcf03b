"""Train a small convolutional network on scikit-learn's 1,797 digits: python examples/plain.py FOLDER

With a memory estimate, a schedule, averaged weights, and TensorBoard. For FOLDER: tensorboard --logdir=FOLDER
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.tensorboard import SummaryWriter

from shampoo import AdamWShampoo
from shampoo.averaging import AveragedWeights
from shampoo.diagnostics import log_diagnostics, weights
from shampoo.memory import state_bytes
from shampoo.schedule import warmup_cosine


def make_model():
    """Return a convolutional network with batch normalization."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def main(folder, steps):
    images, labels = (torch.tensor(each) for each in load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    model = make_model()
    per_weight = state_bytes(model).per_element  # before anything is allocated
    optimizer = AdamWShampoo(model.parameters(), lr=3e-3, weight_decay=0.1)
    scheduler = warmup_cosine(optimizer, num_steps=steps, warmup_steps=steps // 20)
    averages, writer = AveragedWeights(model), SummaryWriter(folder)
    draw = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        batch = torch.randint(1500, (64,), generator=draw)
        optimizer.zero_grad()
        loss = cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        log = step % 50 == 0
        before = weights(optimizer) if log else None
        optimizer.step()
        scheduler.step()
        averages.update()
        if log:
            writer.add_scalar("loss", loss.item(), step)
            log_diagnostics(optimizer, writer, step, before)
    averages.eval()  # the averages take the weights' place in the model
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[1500:]).argmax(dim=1) == labels[1500:]).float().mean().item()
    writer.add_scalar("accuracy", accuracy, steps)
    writer.close()
    print(f"plain: {steps} steps, test accuracy {accuracy:.3f}, {per_weight:.0f} bytes of state per weight")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=300)
    main(**vars(parser.parse_args()))
