"""Train a small ResNet on digits with Hugging Face's Trainer, and go on from the last checkpoint.

    torchrun --nproc_per_node=2 examples/hf_trainer.py FOLDER

The callback GatherState lets Trainer save checkpoints with multiple processes; with one it changes nothing.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from shampoo import AdamWShampoo
from shampoo.integrations import GatherState


def accuracy(prediction):
    """Return the metrics that Trainer reports as eval_accuracy."""
    return {"accuracy": float((prediction.predictions.argmax(axis=1) == prediction.label_ids).mean())}


def main(folder, steps):
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        warmup_steps=steps // 20,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=32,
        weight_decay=0.1,  # of matrices; Trainer gives biases and norms a group without
        save_steps=20,
        save_total_limit=2,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    images, labels = (torch.tensor(each) for each in load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    rows = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    set_seed(0)
    sizes = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=10, **sizes))
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows[:1500],
        eval_dataset=rows[1500:],
        compute_metrics=accuracy,
        optimizer_cls_and_kwargs=(AdamWShampoo, {"lr": 3e-3}),
        callbacks=[GatherState()],
    )
    last = get_last_checkpoint(folder) if Path(folder).exists() else None
    trainer.train(resume_from_checkpoint=last)
    found = trainer.evaluate()["eval_accuracy"]
    if trainer.is_world_process_zero():
        first = int(last.split("-")[-1]) if last else 0
        print(f"hf_trainer: {arguments.world_size} processes, steps {first + 1} to {steps}, test accuracy {found:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=200)
    main(**vars(parser.parse_args()))
