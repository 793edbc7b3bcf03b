"""A stand-in for AlgoPerf's submission runner: the same flags, loop and files, on workloads of laptop size with real data.

`from algoperf import spec` works after this import: it is the installed `algoperf` where there is one, else `runner.spec`.
"""

import importlib
import sys
from types import ModuleType

try:
    importlib.import_module("algoperf.spec")
    ALGOPERF = "algoperf is installed: its spec is used"
except ImportError as error:
    package = ModuleType("algoperf", "Stands in for AlgoPerf's package, which is not installed.")
    package.spec = importlib.import_module("runner.spec")  # type: ignore[attr-defined]
    sys.modules.update({"algoperf": package, "algoperf.spec": package.spec})
    reason = "is not installed" if getattr(error, "name", None) == "algoperf" else f"cannot be imported ({error})"
    ALGOPERF = f"algoperf {reason}, and not needed here: runner/spec.py stands in for its spec"
