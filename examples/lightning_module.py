"""Train on digits with Lightning, and go on from the last checkpoint.

    torchrun --nproc_per_node=2 examples/lightning_module.py FOLDER

The optimizer needs no line of its own. Lightning calls `configure_optimizers` after it has connected the processes.
"""

import argparse
import os
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from shampoo import AdamWShampoo
from shampoo.schedule import warmup_cosine


class Digits(lightning.LightningModule):
    """A network of three layers, and how to train it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    def on_train_start(self):
        self.first = self.trainer.global_step + 1  # after resuming

    def training_step(self, batch, index):
        inputs, targets = batch
        return cross_entropy(self.layers(inputs), targets)

    def validation_step(self, batch, index):
        inputs, targets = batch
        self.log("accuracy", (self.layers(inputs).argmax(dim=1) == targets).float().mean(), sync_dist=True)

    def configure_optimizers(self):
        optimizer = AdamWShampoo(self.parameters(), lr=3e-3, weight_decay=0.1)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = warmup_cosine(optimizer, num_steps=steps, warmup_steps=steps // 20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(folder, epochs):
    lightning.seed_everything(0)
    images, labels = (torch.tensor(each) for each in load_digits(return_X_y=True))
    data = TensorDataset(images.float() / 16, labels)
    train, test = (torch.utils.data.Subset(data, rows) for rows in (range(1500), range(1500, 1797)))
    size = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets it
    trainer = lightning.Trainer(
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=size,
        strategy="ddp" if size > 1 else "auto",
        max_epochs=epochs,
        callbacks=[ModelCheckpoint(folder, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = Path(folder, "last.ckpt")
    model = Digits()
    trainer.fit(model, DataLoader(train, 32), DataLoader(test, 297), ckpt_path=str(last) if last.exists() else None)
    if trainer.is_global_zero:
        steps = f"steps {model.first} to {trainer.global_step}"
        print(f"lightning_module: {size} processes, {steps}, test accuracy {trainer.callback_metrics['accuracy']:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--epochs", type=int, default=8)
    main(**vars(parser.parse_args()))
