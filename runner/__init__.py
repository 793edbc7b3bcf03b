"""A stand-in for AlgoPerf's submission runner: the same flags, training loop, and files, on small workloads with real data.

Importing it makes `from algoperf import spec` work: `algoperf` is the installed package, or `runner.spec` if there is none.
"""

import importlib
import sys
from types import ModuleType

try:
    importlib.import_module("algoperf.spec")
    ALGOPERF = "algoperf is installed; using its spec"
except ImportError as error:
    package = ModuleType("algoperf", "Stands in for AlgoPerf's package, which is not installed.")
    package.spec = importlib.import_module("runner.spec")  # type: ignore[attr-defined]
    sys.modules.update({"algoperf": package, "algoperf.spec": package.spec})
    reason = "is not installed" if getattr(error, "name", None) == "algoperf" else f"cannot be imported ({error})"
    ALGOPERF = f"algoperf {reason} and is not needed; using runner/spec.py in place of its spec"
