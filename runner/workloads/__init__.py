"""The laptop workloads by name; each is defined in the module of that name."""

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
    """Return the class of a workload, without reading its data. Raise ValueError for an unknown name."""
    if name not in WORKLOADS:
        near = difflib.get_close_matches(name, WORKLOADS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown workload {name!r}; it must be one of {', '.join(WORKLOADS)}{hint}")
    workload: type[LaptopWorkload] = getattr(importlib.import_module(f".{name}", __package__), WORKLOADS[name])
    return workload


def load_workload(name: str) -> LaptopWorkload:
    """Return a workload with its data. Raise ValueError for an unknown name, and `data.DataError` for missing or wrong data."""
    return workload_class(name)()
