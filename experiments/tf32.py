"""Study what TF32 does to the optimizer: `python -m experiments.tf32 --output_dir=DIR`; twenty minutes.

AlgoPerf allows TF32 for float32 products on its A100s: GPUs then round both inputs to 10 bits of mantissa, and add products in
float32. `TF32` emulates this on a CPU, at one or more places:

    factors      products of gradients
    roots        products in solvers, which `shampoo.roots` always computes in full precision; here it does not
    directions   products of roots with the averaged gradient
    model        the model's own products and convolutions, forward and backward

`submission.py` takes its steps in full precision; here it does not. Errors: replay the gradients of each workload's first
steps, and some of low rank, and compare factors, roots, and directions with those in float64. Steps: train to the target with
the point of `self_tuning.json`, and compare steps with those of float32, on the same seeds.
DIR/runs.csv has the runs; repeat the command to continue. Write the page to DIR/README.md.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from absl import app, flags
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from runner.loop import Settings, run_trial
from runner.ratios import ALL, format_ratio, ratios
from runner.study import FIRST_SEED, Entry, Run, complete, point_hash, read_table, steps_and_limits
from runner.workloads import load_workload, workload_class
from shampoo import AdamWShampoo
from shampoo.preconditioner import Kronecker

FLAGS = flags.FLAGS

LOW_BITS = 13  # of float32's 23 bits of mantissa, TF32 has 10
INPUTS = {  # products, and which of their arguments are rounded
    "mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "baddbmm_": (1, 2),
    "convolution": (0, 1), "convolution_backward": (0, 1, 2),
}  # fmt: skip
PLACES = {  # variant: where products are rounded
    "float32": (),
    "factors": ("factors",),
    "directions": ("directions",),
    "allowed": ("factors", "directions"),
    "roots_too": ("factors", "directions", "roots"),
    "model_too": ("factors", "directions", "model"),
}
TRAINED = ("float32", "allowed", "roots_too", "model_too")
OPTIONS: dict[str, dict[str, Any]] = {  # what roots are computed from
    "entry: power 1/2, relative epsilon 1e-5": {"exponents": 0.5, "eps": 1e-5, "relative_eps": True},
    "competition: power 1/4, epsilon 1e-8": {"exponents": 0.25, "eps": 1e-8, "relative_eps": False},
}
WRAPPER = "from experiments.tf32 import with_tf32\n\nglobals().update(with_tf32({!r}))\n"


# The emulation


def to_tf32(x: Tensor, truncate: bool = False) -> Tensor:
    """Return float32 elements rounded to 10 bits of mantissa, to nearest with ties to even, or toward zero."""
    bits = x.view(torch.int32)
    last = (bits >> LOW_BITS) & 1  # of the bits that are kept
    half = 0 if truncate else (1 << (LOW_BITS - 1)) - 1 + last
    rounded = ((bits + half) >> LOW_BITS) << LOW_BITS
    return rounded.view(torch.float32).where(torch.isfinite(x), x)


class TF32(TorchDispatchMode):
    """Round the inputs of float32 products at some places, as long as this is active; see `allow_tf32`.

    A product in the optimizer is recognized by its operation (factors are updated in place), or by the precision that is set
    (only solvers ask for full precision).
    """

    def __init__(self, places: Sequence[str], truncate: bool = False):
        super().__init__()  # type: ignore[no-untyped-call]
        self.places, self.truncate, self.in_model = places, truncate, False

    def place(self, name: str) -> str:
        """Return the place of the product that is about to run."""
        if self.in_model:
            return "model"
        if name == "baddbmm_":
            return "factors"
        return "roots" if torch.get_float32_matmul_precision() == "highest" else "directions"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, with rounded inputs if it is a product at one of the places."""
        name = func.overloadpacket.__name__
        if name in INPUTS and self.place(name) in self.places:
            rounded = {i for i in INPUTS[name] if args[i].dtype == torch.float32}
            args = [to_tf32(arg, self.truncate) if i in rounded else arg for i, arg in enumerate(args)]
        return func(*args, **(kwargs or {}))


@contextmanager
def allow_tf32(mode: TF32) -> Iterator[None]:
    """Emulate TF32, and allow it, so that `shampoo.roots` has something to forbid."""
    torch.set_float32_matmul_precision("high")
    try:
        with mode:
            yield
    finally:
        torch.set_float32_matmul_precision("highest")


def with_tf32(places: Sequence[str]) -> dict[str, Any]:
    """Return the names of `submission.py`, with TF32 emulated at these places."""
    import submission

    mode = TF32(places)
    take_step, update_params = submission.take_step, submission.update_params

    def step(optimizer: Any, global_step: int) -> None:
        """Take the optimizer's step."""
        mode.in_model = False
        take_step(optimizer, global_step)

    def update(**arguments: Any) -> Any:
        """Train on one batch."""
        mode.in_model = True
        with allow_tf32(mode):
            return update_params(**arguments)

    replaced = {"take_step": step, "full_precision": nullcontext}
    vars(submission).update(replaced)
    return {**vars(submission), "update_params": update}


# Errors of factors, roots, and directions


def record_gradients(name: str, steps: int, folder: Path) -> list[list[Tensor]]:
    """Train for some steps; return the gradients (B, m, n) of each stack of matrices, at most 16 blocks of each, by step."""
    import submission

    workload, found = load_workload(name), dict[int, list[Tensor]]()
    workload.max_allowed_runtime_sec, workload.eval_splits = float("inf"), ("validation",)
    original = Kronecker.update

    def update(self: Kronecker, G: Tensor, beta2: float, present: Tensor | None) -> None:
        """Record the gradients, and update the factors."""
        if G.dim() == 3 and all(self.exponents):
            found.setdefault(id(self), []).append(G[:16].clone())
        original(self, G, beta2, present)

    settings = Settings(batch_size=workload.default_batch_size, max_global_steps=steps, eval_every_steps=steps)
    Kronecker.update = update  # type: ignore[method-assign]
    try:
        run_trial(workload, submission, None, FIRST_SEED, folder, settings, progress=lambda *_: None)
    finally:
        Kronecker.update = original  # type: ignore[method-assign]
    return list(found.values())


def replay(gradients: Sequence[Tensor], dtype: torch.dtype, **options: Any) -> dict[str, list[Tensor]]:
    """Return the factors and roots of each dimension after these gradients, and the direction of their average."""
    group: Any = AdamWShampoo([torch.zeros(1)], **options).defaults
    beta2 = 0.98  # the entry's
    stack = Kronecker(tuple(gradients[0].shape), (group["exponents"],) * 2, group, dtype, torch.device("cpu"))
    for G in gradients:
        stack.update(G.to(dtype), beta2, None)
    stack.refresh(range(len(gradients[0])), 1 - beta2 ** len(gradients), group, None)
    mean = torch.stack(list(gradients)).mean(dim=0).to(dtype)
    return {"factors": stack.factors, "roots": stack.inv_roots, "directions": [stack.direction(mean, mean)]}


def relative_errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> Tensor:
    """Return ||X - Y||_F / ||Y||_F for each matrix X and its exact value Y."""
    pairs = zip(found, exact, strict=True)
    return torch.cat([(X - Y).flatten(1).norm(dim=1) / Y.flatten(1).norm(dim=1) for X, Y in pairs])


def low_rank_gradients() -> list[Tensor]:
    """Return five gradients (4, 64, 64) of rank 3."""
    random = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    return [random(4, 64, 3) @ random(4, 3, 64) for _ in range(5)]


def error_table(recorded: Sequence[Sequence[Tensor]]) -> pd.DataFrame:
    """Return the largest relative error of factors, roots, and directions over all blocks, by options, solver, and places."""
    modes = {variant: TF32(places) for variant, places in PLACES.items() if "model" not in places}
    modes["allowed, truncated"] = TF32(PLACES["allowed"], truncate=True)
    rows = []
    for title, options in OPTIONS.items():
        exact = [replay(gradients, torch.float64, **options) for gradients in recorded]
        for solver in ("eigh", "newton"):
            for variant, mode in modes.items():
                with allow_tf32(mode):
                    found = [replay(gradients, torch.float32, solver=solver, **options) for gradients in recorded]
                for what in ("factors", "roots", "directions"):
                    errors = [relative_errors(f[what], e[what]) for f, e in zip(found, exact, strict=True)]
                    rows.append((title, solver, what, variant, torch.cat(errors).max().item()))
    table = pd.DataFrame(rows, columns=["options", "solver", "error of", "rounded", "error"])
    return table.pivot(index=["options", "solver", "error of"], columns="rounded", values="error")[list(modes)]


# Steps


def entries(folder: Path) -> list[Entry]:
    """Write a submission for each variant to train; return them with the point of self-tuning."""
    found = []
    for variant in TRAINED:
        path = folder / f"tf32_{variant}.py"  # not submission.py, which it imports
        path.write_text(WRAPPER.format(PLACES[variant]))
        found.append(Entry(variant, path, (None,)))
    return found


def runs(entry: Entry, workloads: Sequence[str], seeds: int) -> list[Run]:
    """Return a run per workload and seed."""
    return [
        Run(entry.name, workload, point_hash(None), seed)
        for workload in workloads
        for seed in range(FIRST_SEED, FIRST_SEED + seeds)
    ]


def step_table(table: pd.DataFrame, chosen: Sequence[Entry], workloads: Sequence[str], seeds: int) -> pd.DataFrame:
    """Return the ratios of steps to those of float32 as text, one row per workload, and one over all."""
    names, wanted = [entry.name for entry in chosen], {run for entry in chosen for run in runs(entry, workloads, seeds)}
    rows = table[[Run(*row) in wanted for row in table[[*Run._fields]].itertuples(index=False)]]
    steps, limits = steps_and_limits(rows, names, workloads, seeds)
    shown = ratios(steps, limits, "float32").apply(format_ratio, axis=1).unstack("submission")
    return shown.loc[[*workloads, ALL], names[1:]]


PAGE = """\
# TF32 in the optimizer

Written by `python -m experiments.tf32`. AlgoPerf allows TF32 for float32 products on its A100s. No GPU was used: products are
emulated on a CPU, their inputs rounded to 10 bits of mantissa. Columns say where: `allowed` is what TF32 would change in an
optimizer that leaves it allowed, the products of factors and directions; `roots_too` also rounds those in solvers.

## Errors

The largest error ||X - X64||_F / ||X64||_F of inverse roots and directions relative to float64, over all blocks. Rounding is to
nearest; `truncated` is toward zero. That of factors is at most {factors:.1e}.

After {gradients} gradients of {workloads}:

{recorded}

After five gradients of rank 3, 64 x 64:

{low_rank}

- Factors: TF32 hardly changes roots, since factors of rounded gradients are still semidefinite.
- Roots: "newton" needs full precision, which `shampoo.roots` always takes: its roots in TF32 err, or come from eigenvectors
  after all. The one product of "eigh" does not need it.
- Directions: where factors are rank-deficient, roots are large in a space that the averaged gradient does not touch. Once
  rounded, it does, and the direction is wrong by up to its own length. So `submission.py` takes its steps in full precision.

## Steps to the target

Over those of float32, with the point of `self_tuning.json` and {seeds} seeds: geometric means of ratios paired by seed, with
95 % t intervals. Over all of these workloads, TF32 is not told apart from float32.

{steps}
"""


def page(recorded: pd.DataFrame, low_rank: pd.DataFrame, steps: pd.DataFrame) -> str:
    """Return the page."""
    shown = [table.drop("factors", level="error of").reset_index() for table in (recorded, low_rank)]
    first, second = (table.to_markdown(index=False, floatfmt=".1e") for table in shown)
    return PAGE.format(
        gradients=FLAGS.gradients,
        workloads=", ".join(FLAGS.workloads),
        factors=max(table.xs("factors", level="error of").max(axis=None) for table in (recorded, low_rank)),
        recorded=first,
        low_rank=second,
        seeds=FLAGS.seeds,
        steps=steps.to_markdown(),
    )


def main(_: Any) -> None:
    """Compute the errors, run what the table of runs lacks, and write the page."""
    torch.set_num_threads(1)
    folder = Path(FLAGS.output_dir).expanduser().resolve()
    path, failures = folder / "runs.csv", list[str]()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in FLAGS.workloads:
            workload_class(name)
        read_table(path)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    with TemporaryDirectory() as scratch:
        chosen = entries(Path(scratch))
        for entry in chosen:
            failures += complete(path, entry, runs(entry, FLAGS.workloads, FLAGS.seeds), FLAGS.max_workers)
        if failures:
            sys.exit(f"error: {len(failures)} runs failed")
        recorded = [record_gradients(name, FLAGS.gradients, Path(scratch) / name) for name in FLAGS.workloads]
    errors = error_table([gradients for stacks in recorded for gradients in stacks])
    steps = step_table(read_table(path), chosen, FLAGS.workloads, FLAGS.seeds)
    text = page(errors, error_table([low_rank_gradients()]), steps)
    (folder / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    flags.DEFINE_string("output_dir", None, "folder for the table of runs and the page", required=True)
    flags.DEFINE_list("workloads", ["mnist_unet", "mnist_vit", "pydoc_lm", "solubility_gnn"], "workloads to train")
    flags.DEFINE_integer("seeds", 5, "number of seeds", lower_bound=2)
    flags.DEFINE_integer("gradients", 25, "gradients to replay", lower_bound=1)
    flags.DEFINE_integer("max_workers", os.cpu_count() or 1, "number of single-threaded processes", lower_bound=1)
    app.run(main)
