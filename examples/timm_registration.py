"""Register the optimizer with timm, and train one of timm's networks on digits: python examples/timm_registration.py

timm needs a torchvision that was built for the installed torch.
"""

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry
from torch.nn.functional import cross_entropy

from shampoo import AdamWShampoo
from shampoo.schedule import warmup_cosine

# timm's eps is Adam's, which is grafting_eps here; timm cuts names at "_"
INFO = OptimInfo("shampoo", AdamWShampoo, "AdamW-style Shampoo", has_eps=False, has_betas=True, second_order=False)


def main(steps):
    default_registry.register(INFO)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    optimizer = create_optimizer_v2(model, "shampoo", lr=3e-3, weight_decay=0.1)  # without decay of biases and norms
    scheduler = warmup_cosine(optimizer, num_steps=steps, warmup_steps=steps // 20)
    images, labels = (torch.tensor(each) for each in load_digits(return_X_y=True))
    images = torch.nn.functional.interpolate(images.float().view(-1, 1, 8, 8) / 16, scale_factor=4)
    for _ in range(steps):
        batch = torch.randint(1500, (64,))
        optimizer.zero_grad()
        cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        scheduler.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[1500:]).argmax(dim=1) == labels[1500:]).float().mean().item()
    print(f"timm_registration: {type(optimizer).__name__}, {steps} steps, test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(**vars(parser.parse_args()))
