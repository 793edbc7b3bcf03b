"""A long run with all that may happen: `python -m experiments.soak --steps=20000`.

Two runs of a small model, step for step alike: gradients go missing at random, some hold NaN, the learning rate changes, and
every thousand steps one run is saved and loaded into a new optimizer, the other is not. They must agree bit for bit, stay
finite, and keep as much state as at the start.
"""

import io
import logging
from typing import Any

import torch
from absl import app, flags
from torch import Tensor, nn
from tqdm import tqdm

from shampoo import AdamWShampoo

FLAGS = flags.FLAGS

SHAPES = [(12, 20), (20,), (20, 7, 3), (7,), ()]
OPTIONS: dict[str, Any] = {"lr": 1e-3, "block_size": 16, "precondition_frequency": 7, "momentum": 0.5, "weight_decay": 0.01}


def make(seed: int) -> tuple[list[nn.Parameter], AdamWShampoo]:
    """Weights and an optimizer."""
    draw = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]
    return params, AdamWShampoo(params, **OPTIONS)


def gradients(t: int, params: list[nn.Parameter]) -> list[Tensor | None]:
    """Those of step t, of a quadratic with noise: a fifth missing, and in one step of a hundred a NaN."""
    draw = torch.Generator().manual_seed(t)
    grads: list[Tensor | None] = []
    for p in params:
        G = p.detach() + torch.randn(p.shape, generator=draw)
        grads.append(None if torch.rand((), generator=draw) < 0.2 else G)
    if t % 100 == 50 and grads[0] is not None:
        grads[0][0, 0] = torch.nan
    return grads


def reloaded(params: list[nn.Parameter], optimizer: AdamWShampoo) -> AdamWShampoo:
    """A new optimizer of the same weights, from the file of the old one."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    new = AdamWShampoo(params, **OPTIONS)
    new.load_state_dict(torch.load(file, weights_only=True))
    return new


def numbers(optimizer: AdamWShampoo) -> int:
    """How many numbers of state there are."""
    return sum(x.numel() for of_parameter in optimizer.state_dict()["state"].values() for x in of_parameter.values())


def soak(steps: int, save_every: int) -> tuple[int, int]:
    """Both runs; the steps skipped, and the numbers of state. Raises RuntimeError where a promise breaks."""
    (one, plain), (two, saved) = make(0), make(0)
    size = numbers(plain)
    for t in tqdm(range(1, steps + 1), unit="step", disable=None):
        grads = gradients(t, one)
        for params, optimizer in ((one, plain), (two, saved)):
            for p, G in zip(params, grads, strict=True):
                p.grad = None if G is None else G.clone()
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 + t % 1000 / 1000)
            optimizer.step()
        if t % save_every == 0:
            saved = reloaded(two, saved)
            if numbers(saved) != size or numbers(plain) != size:
                raise RuntimeError(f"at step {t} the state has {numbers(plain)} and {numbers(saved)} numbers, first {size}")
            if not all(torch.equal(p, q) and p.isfinite().all() for p, q in zip(one, two, strict=True)):
                raise RuntimeError(f"at step {t} the weights are not finite, or the two runs differ")
    return plain.events["steps skipped"], size


def main(_: Any) -> None:
    """Run, and say what was seen."""
    torch.set_num_threads(1)
    logging.getLogger("shampoo").setLevel(logging.ERROR)  # every skipped step is a warning
    skipped, size = soak(FLAGS.steps, FLAGS.save_every)
    print(
        f"{FLAGS.steps} steps, {skipped} of them skipped; {size} numbers of state, as at the start; both runs agree bit for bit"
    )


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 20_000, "of each run", lower_bound=1)
    flags.DEFINE_integer("save_every", 1000, "steps from one file to the next", lower_bound=1)
    app.run(main)
