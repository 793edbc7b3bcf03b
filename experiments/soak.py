"""Soak test: `python -m experiments.soak --steps=20000`.

Train two copies of a small model on the same gradients. Some gradients are missing, some contain NaN, and the learning rate
changes at every step. One copy is saved and loaded into a new optimizer every thousand steps, the other is not. Weights must
stay finite and bitwise equal, and the state must keep its size.
"""

import io
import logging
from typing import Any

import torch
from absl import app, flags
from torch import Tensor, nn
from tqdm import tqdm

from shampoo import AdamWShampoo
from shampoo.hyperparameters import COMPETITION

FLAGS = flags.FLAGS

SHAPES = [(12, 20), (20,), (20, 7, 3), (7,), ()]
OPTIONS: dict[str, Any] = {**COMPETITION, "eps": 1e-8, "exponents": None} | {
    "lr": 1e-3,
    "block_size": 16,
    "precondition_frequency": 7,
    "momentum": 0.5,
    "weight_decay": 0.01,
}


def make_model(seed: int) -> tuple[list[nn.Parameter], AdamWShampoo]:
    """Return parameters and an optimizer."""
    draw = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]
    return params, AdamWShampoo(params, **OPTIONS)


def gradients(t: int, params: list[nn.Parameter]) -> list[Tensor | None]:
    """Return noisy gradients of a quadratic at step t. A fifth are None; one step in a hundred has a NaN."""
    draw = torch.Generator().manual_seed(t)
    grads: list[Tensor | None] = []
    for p in params:
        G = p.detach() + torch.randn(p.shape, generator=draw)
        grads.append(None if torch.rand((), generator=draw) < 0.2 else G)
    if t % 100 == 50 and grads[0] is not None:
        grads[0][0, 0] = torch.nan
    return grads


def reload(params: list[nn.Parameter], optimizer: AdamWShampoo) -> AdamWShampoo:
    """Return a new optimizer of the same parameters, loaded from the saved state of the old one."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    new = AdamWShampoo(params, **OPTIONS)
    new.load_state_dict(torch.load(file, weights_only=True))
    return new


def state_numel(optimizer: AdamWShampoo) -> int:
    """Return the number of elements of the optimizer state."""
    return sum(x.numel() for state in optimizer.state_dict()["state"].values() for x in state.values())


def soak(steps: int, save_every: int) -> tuple[int, int]:
    """Train both copies. Return the number of skipped steps and the state size in elements; raise RuntimeError on a failure."""
    (one, plain), (two, saved) = make_model(0), make_model(0)
    size = state_numel(plain)
    for t in tqdm(range(1, steps + 1), unit="step", disable=None):
        grads = gradients(t, one)
        for params, optimizer in ((one, plain), (two, saved)):
            for p, G in zip(params, grads, strict=True):
                p.grad = None if G is None else G.clone()
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 + t % 1000 / 1000)
            optimizer.step()
        if t % save_every == 0:
            saved = reload(two, saved)
            sizes = state_numel(plain), state_numel(saved)
            if sizes != (size, size):
                raise RuntimeError(
                    f"the state had {size} elements at first and has {sizes} at step {t}; its size must not change"
                )
            if not all(torch.equal(p, q) and p.isfinite().all() for p, q in zip(one, two, strict=True)):
                raise RuntimeError(f"at step {t}, weights are not finite, or the two runs differ; they must be bitwise equal")
    return plain.events["steps skipped"], size


def main(_: Any) -> None:
    """Run the test and print a summary."""
    torch.set_num_threads(1)
    logging.getLogger("shampoo").setLevel(logging.ERROR)  # no warning for each skipped step
    skipped, size = soak(FLAGS.steps, FLAGS.save_every)
    print(f"{FLAGS.steps} steps, {skipped} of them skipped; the state kept its {size} elements; both runs are bitwise equal")


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 20_000, "steps per run", lower_bound=1)
    flags.DEFINE_integer("save_every", 1000, "save and load one run every this many steps", lower_bound=1)
    app.run(main)
