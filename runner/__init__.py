"""A stand-in for AlgoPerf's submission runner: the same flags, training loop, and files, on small workloads with real data.

Importing it makes the imports of AlgoPerf's torch submissions work, `from algoperf import spec` and
`from algoperf.pytorch_utils import pytorch_setup`: `algoperf` is the installed package or, if there is none, has the modules of
those names in this folder. Its name in version 0.5, `algorithmic_efficiency`, then works too.
"""

import importlib
import re
import signal
import sys
from types import ModuleType

starting = sys.argv[0] == "-m" and re.search(rf" -m ?{__name__}\b", " ".join(sys.orig_argv))
if starting and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # imports take seconds: until `command.run`, Ctrl-C prints no traceback

try:
    importlib.import_module("algoperf.spec")
    ALGOPERF = "algoperf is installed; using its spec"
except ImportError as error:
    package = ModuleType("algoperf", "Stands in for AlgoPerf's package, which is not installed.")
    for name in ("spec", "pytorch_utils"):
        module = importlib.import_module(f"runner.{name}")
        setattr(package, name, module)
        sys.modules.update({f"algoperf.{name}": module, f"algorithmic_efficiency.{name}": module})
    sys.modules.update({"algoperf": package, "algorithmic_efficiency": package})
    reason = "is not installed" if getattr(error, "name", None) == "algoperf" else f"cannot be imported ({error})"
    ALGOPERF = f"algoperf {reason} and is not needed; using runner/spec.py in place of its spec"
