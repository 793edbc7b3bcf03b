"""The workloads by name; each lives in the module of its name."""

import difflib
import importlib

from .base import LaptopWorkload

WORKLOADS = {  # module -> class
    "airports_dlrm": "AirportsDLRM",
    "fsdd_conformer": "FsddConformer",
    "fsdd_lstm": "FsddLSTM",
    "mnist_resnet": "MnistResNet",
    "mnist_unet": "MnistUNet",
    "mnist_vit": "MnistViT",
    "pydoc_lm": "PydocLM",
    "solubility_gnn": "SolubilityGNN",
}


def workload_class(name: str) -> type[LaptopWorkload]:
    """The class of a workload, without its data. Raises ValueError for an unknown name."""
    if name not in WORKLOADS:
        near = difflib.get_close_matches(name, WORKLOADS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown workload {name!r}; there are {', '.join(WORKLOADS)}{hint}")
    return getattr(importlib.import_module(f".{name}", __package__), WORKLOADS[name])


def load_workload(name: str) -> LaptopWorkload:
    """The workload, its data read and checked. Raises ValueError for an unknown name, `data.DataError` for bad data."""
    return workload_class(name)()
