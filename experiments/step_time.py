"""Time an optimizer step on the shapes of AlgoPerf's models: `python -m experiments.step_time --workload=imagenet_vit`.

All optimizers run in one process and take each step in turn, on the same gradients. Columns, with median times in milliseconds:

    ordinary, refresh   a step without and with a refresh of the roots
    least, most         smallest and largest of the rounds' median ordinary steps
    every 1, 10, 100    the average step at that frequency of refreshes: ordinary + (refresh - ordinary) / frequency
    products            the matrix products of an ordinary step alone, on tensors of the same layout
    / adamw             ordinary over that of torch's fused AdamW
    / products          ordinary over products
    operations          operations dispatched in an ordinary step; views do not count, a list of n tensors counts ceil(n / 30)
    syncs               operations in an ordinary step that wait for the device; on a GPU, torch's own count of waits
    state, peak         bytes per parameter of the state, and of temporary memory at a refresh; on a GPU, the allocator's

Gradients are drawn independently at each step, so that factors change more than in training: the worst case for solver "qr".
Other packages' optimizers are included if they are installed; see `experiments.peers` for where they come from.
"""

import gc
import statistics
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from absl import app, flags
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo import AdamWShampoo, health
from shampoo.hyperparameters import COMPETITION

from .balance import load_shapes
from .peers import BETAS, DECAY, LR, PEERS, Constructor, is_available, use_competition

FLAGS = flags.FLAGS

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mm_", "bmm_", "addmm_", "baddbmm_", "mv", "addmv"}
WAITING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item", "masked_select", "unique_dim", "_unique2"}


class Watch(TorchDispatchMode):
    """Count the operations dispatched inside it, record the matrix products, and track allocated bytes and their peak.

    Recorded products keep their inputs alive, so that the peak is too high with `record`.
    """

    def __init__(self, record: bool = True) -> None:
        TorchDispatchMode.__init__(self)
        self.record = record
        self.operations = self.syncs = self.bytes = self.peak = 0
        self.products: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and record it."""
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        if self.record and name in PRODUCTS:
            inputs = [x.clone() if i == 0 and name.endswith("_") else x for i, x in enumerate(args)]
            self.products.append(lambda: function(*inputs, **kwargs))
        result = function(*args, **kwargs)
        if name == "_unsafe_view":  # its schema does not declare that it returns a view
            return result
        aliases = [value.alias_info for value in function._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):
            self.operations += -(-len(args[0]) // 30) if args and isinstance(args[0], list | tuple) else 1
            self.syncs += name in WAITING
        if not any(aliases):
            for x in result if isinstance(result, list | tuple) else [result]:
                if isinstance(x, Tensor):
                    self.track(x)
        return result

    def multiply(self) -> None:
        """Run the recorded matrix products again."""
        for multiply in self.products:
            multiply()

    def track(self, x: Tensor) -> None:
        """Count the bytes of a new tensor until its storage is freed."""
        nbytes = x.untyped_storage().nbytes()
        self.bytes += nbytes
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(x.untyped_storage(), self.release, nbytes)

    def release(self, nbytes: int) -> None:
        """Subtract the bytes of a freed storage."""
        self.bytes -= nbytes


def shampoo(**options: Any) -> Constructor:
    """Return a constructor of `AdamWShampoo` with the competition's first point as defaults for `options`."""
    common = {**COMPETITION, "eps": 1e-8, "exponents": None, "betas": BETAS, "weight_decay": DECAY, "nadam": True}
    return lambda params, frequency, block_size: AdamWShampoo(
        params, LR, **{**common, "precondition_frequency": frequency, "block_size": block_size, **options}
    )


def defaults(**options: Any) -> Constructor:
    """Return a constructor of `AdamWShampoo` with its defaults but for `options`, whatever the block size."""
    return lambda params, frequency, block_size: AdamWShampoo(params, LR, precondition_frequency=frequency, **options)


OPTIMIZERS: dict[str, Constructor] = {
    "adamw": lambda params, frequency, block_size: torch.optim.AdamW(params, LR, fused=True),
    "shampoo": shampoo(),
    "shampoo, defaults": defaults(),
    "shampoo, defaults, eigh": defaults(solver="eigh"),
    "shampoo, defaults, staggered": defaults(stagger=True),
    "shampoo, defaults, blocks of 2048": defaults(block_size=2048),
    "shampoo, defaults, soap": defaults(preconditioner="soap"),
    "shampoo, qr": shampoo(solver="qr"),
    "shampoo, newton": shampoo(solver="newton", exponents=0.5, eps=1e-4, relative_eps=True),
    "shampoo, staggered": shampoo(stagger=True),
    "shampoo, small": shampoo(precondition_vectors=False, bf16_roots=True, block_size=512),
    **PEERS,
}


def watch(step: Callable[[], Any], device: torch.device, record: bool = True) -> Watch:
    """Call `step` under `Watch`. On a GPU, torch's sync debug mode counts its syncs, and torch's allocator its peak."""
    found = Watch(record)
    if device.type != "cuda":
        with found:
            step()
        return found
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits, found:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found.syncs = sum("synchronizing" in str(wait.message) for wait in waits)
    found.peak = torch.cuda.max_memory_allocated(device) - before
    return found


def live_bytes() -> int:
    """Return the bytes of all live tensors, counting shared storage once."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def milliseconds(function: Callable[[], Any], device: torch.device) -> float:
    """Return how long a call takes in milliseconds, including its work on the device."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    names: list[str], shapes: list[tuple[int, ...]], frequency: int, block_size: int, rounds: int, device: torch.device
) -> pd.DataFrame:
    """Return the table, from `rounds` rounds of `frequency` steps. The longest step of a round is taken as its refresh."""
    draw = torch.Generator(device).manual_seed(0)
    grads = [torch.randn(shape, device=device, generator=draw) for shape in shapes]
    params: dict[str, list[torch.nn.Parameter]] = {}
    optimizers: dict[str, Optimizer] = {}
    state: dict[str, int] = {}

    def step_all(step: Callable[[str], Any]) -> dict[str, Any]:
        """Draw new gradients, the same for all optimizers, and return `step(name)` for each optimizer."""
        for grad in grads:
            grad.normal_(generator=draw)
        for name in names:
            for p, grad in zip(params[name], grads, strict=True):
                p.grad = grad  # some optimizers set it to None
        return {name: step(name) for name in names}

    for name in names:
        before = live_bytes()
        params[name] = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
        for p, grad in zip(params[name], grads, strict=True):
            p.grad = grad
        optimizers[name] = OPTIMIZERS[name](params[name], frequency, block_size)
        optimizers[name].step()
        state[name] = live_bytes() - before - sum(p.nbytes for p in params[name])
    for _ in range(frequency - 2):
        step_all(lambda name: optimizers[name].step())
    peaks = step_all(lambda name: watch(optimizers[name].step, device, record=False).peak)  # step number `frequency`: a refresh
    ordinary = step_all(lambda name: watch(optimizers[name].step, device))
    for _ in range(frequency - 1):
        step_all(lambda name: optimizers[name].step())
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        times = pd.DataFrame([step_all(lambda name: milliseconds(optimizers[name].step, device)) for _ in range(frequency)])
        for name in names:
            products = milliseconds(ordinary[name].multiply, device)
            rows[name].append((times[name].nsmallest(frequency - 1).median(), times[name].max(), products))

    table = summarize(rows)
    numel = sum(grad.numel() for grad in grads)
    table["operations"] = [ordinary[name].operations for name in names]
    table["syncs"] = [ordinary[name].syncs for name in names]
    table["state"] = [state[name] / numel for name in names]
    table["peak"] = [peaks[name] / numel for name in names]
    return table


def summarize(rounds: dict[str, list[tuple[float, float, float]]]) -> pd.DataFrame:
    """Return the columns of times, from each optimizer's ordinary steps, refreshes, and products in each round."""
    table = pd.DataFrame({name: map(statistics.median, zip(*found, strict=True)) for name, found in rounds.items()})
    table = table.T.set_axis(["ordinary", "refresh", "products"], axis=1)
    table["least"] = [min(found)[0] for found in rounds.values()]
    table["most"] = [max(found)[0] for found in rounds.values()]
    for every in (1, 10, 100):
        table[f"every {every}"] = table["ordinary"] + (table["refresh"] - table["ordinary"]) / every
    table["/ products"] = table["ordinary"] / table["products"]
    table["/ adamw"] = table["ordinary"] / table["ordinary"].get("adamw", float("nan"))
    return table


def main(_: Any) -> None:
    """Print the table."""
    torch.set_num_threads(FLAGS.threads)
    torch.set_float32_matmul_precision(FLAGS.matmul_precision)
    if FLAGS.competition:
        use_competition(FLAGS.competition)
    if FLAGS.like_gpu:
        health.waits = lambda x: True  # the host does not read norms
    names = [name for name in FLAGS.optimizer if is_available(name)]
    device = torch.device(FLAGS.device)
    table = measure(names, load_shapes()[FLAGS.workload], FLAGS.frequency, FLAGS.block_size, FLAGS.rounds, device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{FLAGS.threads} CPU threads"
    print(f"{FLAGS.workload}, {machine}, torch {torch.__version__}, float32 products in precision {FLAGS.matmul_precision!r}")
    print(table.to_string(float_format="{:.2f}".format))


if __name__ == "__main__":
    flags.DEFINE_enum("workload", "ogbg", sorted(load_shapes()), "AlgoPerf workload whose parameter shapes are used")
    flags.DEFINE_multi_enum(
        "optimizer", list(OPTIMIZERS), list(OPTIMIZERS), "optimizers to time; those not installed are skipped"
    )
    flags.DEFINE_integer("frequency", 4, "precondition_frequency while measuring", lower_bound=2)
    flags.DEFINE_integer(
        "block_size",
        1024,
        "maximum block size, but 512 for 'shampoo, small', 128 for 'shampoo, defaults'",
        lower_bound=1,
    )
    flags.DEFINE_integer("rounds", 3, "measured rounds of `frequency` steps; medians are printed", lower_bound=1)
    flags.DEFINE_integer("threads", 2, "number of CPU threads", lower_bound=1)
    flags.DEFINE_string("device", "cpu", "cpu or cuda")
    flags.DEFINE_boolean("like_gpu", False, "on a CPU, run Shampoo's ordinary steps as on a GPU, to count operations")
    flags.DEFINE_enum("matmul_precision", "highest", ["highest", "high"], "of float32 products; 'high' allows TF32 on a GPU")
    flags.DEFINE_string("competition", None, "folder shampoo_submission of the competition's code, to time that too")
    app.run(main)
