"""What a step costs, on the shapes of AlgoPerf's models: `python -m experiments.step_time --workload=imagenet_vit`.

Optimizers take the same steps in turn, in one process, with the same gradients. Printed for each, medians in milliseconds:

    ordinary, refresh   a step without and with a refresh of the roots
    every 1, 10, 100    a step on average with a refresh that often: ordinary + (refresh - ordinary) / frequency
    products            the matrix products of an ordinary step alone, on tensors of the same layout
    / adamw             ordinary over that of torch's fused AdamW
    / products          ordinary over products
    operations          dispatched in an ordinary step: views do not count, a list of tensors once for each 30 of them
    syncs               operations of an ordinary step for which the host waits
    state, peak         bytes per parameter that are kept, and that a refresh needs beside them

Gradients are drawn anew at each step, so that factors move more than in training: solver "qr" has its worst case here.
pytorch_optimizer and heavyball are measured where they are installed.
"""

import gc
import statistics
import time
import weakref
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pandas as pd
import torch
from absl import app, flags
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo import AdamWShampoo

from .balance import load_shapes

FLAGS = flags.FLAGS

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mm_", "bmm_", "addmm_", "baddbmm_", "mv", "addmv"}
WAITING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item", "masked_select", "unique_dim", "_unique2"}
LR = 1e-3


class Watch(TorchDispatchMode):
    """Counts the operations inside it, keeps the matrix products, and follows the bytes that are allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.syncs = self.bytes = self.peak = 0
        self.products: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation."""
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        if name in PRODUCTS:
            kept = [x.clone() if i == 0 and name.endswith("_") else x for i, x in enumerate(args)]
            self.products.append(lambda: function(*kept, **kwargs))
        result = function(*args, **kwargs)
        if name == "_unsafe_view":  # a view all the same
            return result
        aliases = [value.alias_info for value in function._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):
            self.operations += -(-len(args[0]) // 30) if args and isinstance(args[0], list | tuple) else 1
            self.syncs += name in WAITING
        if not any(aliases):
            for x in result if isinstance(result, list | tuple) else [result]:
                if isinstance(x, Tensor):
                    self.follow(x)
        return result

    def multiply(self) -> None:
        """The matrix products again."""
        for multiply in self.products:
            multiply()

    def follow(self, x: Tensor) -> None:
        """Count the bytes of a new tensor until they are free."""
        nbytes = x.untyped_storage().nbytes()
        self.bytes += nbytes
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(x.untyped_storage(), self.forget, nbytes)

    def forget(self, nbytes: int) -> None:
        """These bytes are free."""
        self.bytes -= nbytes


def shampoo(**options: Any) -> Callable[..., Optimizer]:
    """This project's, with the options of the competition's first point unless others are named."""
    common = {"betas": (0.93, 0.995), "weight_decay": 0.08, "nadam": True}
    return lambda params, frequency, block_size: AdamWShampoo(
        params, LR, **{**common, "precondition_frequency": frequency, "block_size": block_size, **options}
    )


def peer(module: str, name: str, size: str, **options: Any) -> Callable[..., Optimizer]:
    """An optimizer of another package; `size` is what it calls the largest block."""
    return lambda params, frequency, block_size: getattr(import_module(module), name)(
        params, lr=LR, precondition_frequency=frequency, **{size: block_size}, **options
    )


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": lambda params, frequency, block_size: torch.optim.AdamW(params, LR, fused=True),
    "shampoo": shampoo(),
    "shampoo, qr": shampoo(solver="qr"),
    "shampoo, staggered": shampoo(stagger=True),
    "shampoo, small": shampoo(precondition_vectors=False, bf16_roots=True, block_size=512),
    "pytorch_optimizer.SOAP": peer("pytorch_optimizer", "SOAP", "max_precondition_dim"),
    "heavyball.SOAP": peer("heavyball", "SOAP", "max_precond_dim", compile_step=False),
}


def live_bytes() -> int:
    """Bytes of all tensors that exist."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def milliseconds(act: Callable[[], Any], device: torch.device) -> float:
    """How long it takes, the device's work included."""
    wait(device)
    start = time.perf_counter()
    act()
    wait(device)
    return 1e3 * (time.perf_counter() - start)


def wait(device: torch.device) -> None:
    """Until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    names: list[str], shapes: list[tuple[int, ...]], frequency: int, block_size: int, rounds: int, device: torch.device
) -> pd.DataFrame:
    """The table: from `rounds` times `frequency` steps, of which the longest of each round is its refresh."""
    draw = torch.Generator(device).manual_seed(0)
    grads = [torch.randn(shape, device=device, generator=draw) for shape in shapes]
    params: dict[str, list[torch.nn.Parameter]] = {}
    optimizers: dict[str, Optimizer] = {}
    state: dict[str, int] = {}

    def step_all(act: Callable[[str], Any]) -> dict[str, Any]:
        """What `act` gives for each optimizer, with new gradients, alike for all."""
        for grad in grads:
            grad.normal_(generator=draw)
        for name in names:
            for p, grad in zip(params[name], grads, strict=True):
                p.grad = grad  # some optimizers drop it
        return {name: act(name) for name in names}

    def watched(name: str) -> Watch:
        """A step as `Watch` sees it."""
        with Watch() as watch:
            optimizers[name].step()
        return watch

    def timed(name: str) -> float:
        """A step by the clock."""
        return milliseconds(optimizers[name].step, device)

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
    peaks, ordinary = step_all(lambda name: watched(name).peak), step_all(watched)  # steps number `frequency` and one more
    for _ in range(frequency - 1):
        step_all(timed)
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        times = pd.DataFrame([step_all(timed) for _ in range(frequency)])
        for name in names:
            products = milliseconds(ordinary[name].multiply, device)
            rows[name].append((times[name].nsmallest(frequency - 1).median(), times[name].max(), products))

    numel = sum(grad.numel() for grad in grads)
    table = pd.DataFrame({name: map(statistics.median, zip(*found, strict=True)) for name, found in rows.items()})
    table = table.T.set_axis(["ordinary", "refresh", "products"], axis=1)
    for every in (1, 10, 100):
        table[f"every {every}"] = table["ordinary"] + (table["refresh"] - table["ordinary"]) / every
    table["/ products"] = table["ordinary"] / table["products"]
    table["/ adamw"] = table["ordinary"] / table["ordinary"].get("adamw", float("nan"))
    table["operations"] = [ordinary[name].operations for name in names]
    table["syncs"] = [ordinary[name].syncs for name in names]
    table["state"] = [state[name] / numel for name in names]
    table["peak"] = [peaks[name] / numel for name in names]
    return table


def main(_: Any) -> None:
    """Print the table."""
    torch.set_num_threads(FLAGS.threads)
    names = [name for name in FLAGS.optimizer if "." not in name or find_spec(name.split(".")[0])]
    device = torch.device(FLAGS.device)
    table = measure(names, load_shapes()[FLAGS.workload], FLAGS.frequency, FLAGS.block_size, FLAGS.rounds, device)
    print(f"{FLAGS.workload}, {device}, {FLAGS.threads} threads, torch {torch.__version__}")
    print(table.to_string(float_format="{:.2f}".format))


if __name__ == "__main__":
    flags.DEFINE_enum("workload", "ogbg", sorted(load_shapes()), "whose shapes")
    flags.DEFINE_multi_enum("optimizer", list(OPTIMIZERS), list(OPTIMIZERS), "which; those not installed are left out")
    flags.DEFINE_integer("frequency", 4, "steps between refreshes while measuring", lower_bound=2)
    flags.DEFINE_integer("block_size", 1024, "the largest block; 'shampoo, small' has 512", lower_bound=1)
    flags.DEFINE_integer("rounds", 3, "of `frequency` steps, of which medians are taken", lower_bound=1)
    flags.DEFINE_integer("threads", 2, "of the CPU", lower_bound=1)
    flags.DEFINE_string("device", "cpu", "or cuda")
    app.run(main)
