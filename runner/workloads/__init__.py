"""The laptop workloads by name, each defined in the module of that name, and workloads in other files by path and class."""

import difflib
import importlib
import re
import sys
from pathlib import Path

from ..data import DataError
from ..submissions import describe, load_module, module_name
from .base import LaptopWorkload

WORKLOADS = {  # module -> class
    "flights_dlrm": "FlightsDLRM",
    "fsdd_conformer": "FsddConformer",
    "fsdd_lstm": "FsddLSTM",
    "mnist_resnet": "MnistResNet",
    "mnist_unet": "MnistUNet",
    "mnist_vit": "MnistViT",
    "pydoc_lm": "PydocLM",
    "solubility_gnn": "SolubilityGNN",
}


def workload_class(name: str) -> type[LaptopWorkload]:
    """Return the class of a workload, without reading its data. `name` is one of `WORKLOADS`, or path/to/file.py:Class.

    Raise ValueError for an unknown name, a file or class that does not exist, or a class that is not a complete workload.
    """
    if ":" in name:
        return class_in_file(name)
    if name not in WORKLOADS:
        near = difflib.get_close_matches(name, WORKLOADS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown workload {name!r}; it must be one of {', '.join(WORKLOADS)}, or path/to/file.py:Class{hint}")
    workload: type[LaptopWorkload] = getattr(importlib.import_module(f".{name}", __package__), WORKLOADS[name])
    return workload


def known_class(name: str) -> type[LaptopWorkload] | None:
    """Return the class of a workload as `workload_class` does, but run no file for it: return None if it is in one that was not
    imported before, or is unknown.
    """
    if name in WORKLOADS or (":" in name and module_name(Path(name.rpartition(":")[0]).expanduser().resolve()) in sys.modules):
        return workload_class(name)
    return None


def class_in_file(name: str) -> type[LaptopWorkload]:
    """Return the class that path/to/file.py:Class names. Raise ValueError if there is none or it is incomplete."""
    path, _, class_name = name.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file() or file.suffix != ".py":
        raise ValueError(f"the workload is {name!r}; before the colon there must be a Python file that exists")
    found = getattr(load_module(file), class_name, None)
    if not isinstance(found, type) or not issubclass(found, LaptopWorkload):
        raise ValueError(f"{path} has no subclass of runner.workloads.base.LaptopWorkload named {class_name!r}")
    declared = {attribute for attribute in LaptopWorkload.__annotations__ if not hasattr(found, attribute)}
    if missing := sorted(declared | found.__abstractmethods__):
        raise ValueError(f"{class_name} in {path} lacks {', '.join(missing)}; a workload must define them in its class")
    return found


def short_name(name: str) -> str:
    """Return the name of a workload in folders and titles: that of path/to/file.py:TwoMoons is two_moons."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.rpartition(":")[2]).lower() if ":" in name else name


def load_workload(name: str) -> LaptopWorkload:
    """Return a workload with its data. Raise ValueError like `workload_class`, or if the class cannot be built; raise
    `data.DataError` if its data is wrong.
    """
    try:
        return workload_class(name)()
    except (ValueError, DataError):
        raise
    except Exception as error:
        raise ValueError(f"{name} cannot be built: {describe(error)}") from error
