"""Submissions and other Python files that users name by path."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

NEEDED = ("get_batch_size", "init_optimizer_state", "update_params", "data_selection")


def load_submission(path: str) -> ModuleType:
    """Import a submission with `load_module`.

    Raise ValueError if `path` is not an existing Python file, cannot be imported, or lacks a function of the API.
    """
    file = Path(path).expanduser()
    if not file.is_file() or file.suffix != ".py":
        raise ValueError(f"the submission path is {path!r}; it must be a Python file that exists")
    module = load_module(file)
    if missing := [name for name in NEEDED if not hasattr(module, name)]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; a submission must define {', '.join(NEEDED)}")
    return module


def known_batch_size(submission: ModuleType, workload: str) -> int | None:
    """Return the submission's batch size for the workload of that name, or None if the submission does not know it: if
    `get_batch_size` raises ValueError, as AlgoPerf's submissions do, or KeyError, as a dictionary does.

    Raise ValueError if `get_batch_size` returns anything but an integer >= 1.
    """
    try:
        batch_size = submission.get_batch_size(workload)
    except (ValueError, KeyError):
        return None
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(
            f"get_batch_size({workload!r}) returned {batch_size!r}; it must return an integer >= 1, or raise ValueError if it "
            "does not know the workload"
        )
    return batch_size


def check_point(workload: Any, submission: ModuleType, point: Any, where: str) -> None:
    """Build a model of the workload, and the optimizer at a point, or at None for a submission that tunes itself.

    Raise ValueError, which begins with `where`, if the point is invalid or incomplete, or None and the submission needs one.
    """
    model, model_state = workload.init_model_fn([0, 0])
    try:
        submission.init_optimizer_state(workload, model, model_state, point, [0, 0])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except AttributeError as error:
        if error.obj is not point or error.name is None:  # an error of another kind
            raise
        if point is None:
            needs = f"needs the hyperparameter {error.name}, so it cannot tune itself; give it a search space"
            raise ValueError(f"{where} {needs}") from error
        raise ValueError(f"{where} lacks the hyperparameter {error.name}, which the submission needs; add it") from error


def load_module(file: Path) -> ModuleType:
    """Import a Python file from any folder under a name that no other module has. A file that was imported before is not run
    again.

    Its folder becomes importable, as for a script. In a folder below the working directory, or one with `__init__.py`, it may
    also use `from .other import f` and AlgoPerf's `from submissions.NAME.other import f`. Raise ValueError if an import in the
    file fails.
    """
    file = file.resolve()
    root = package_root(file.parent)
    package = file.parent.relative_to(root).parts
    name = ".".join([*(package if all(map(str.isidentifier, package)) else ()), re.sub(r"\W", "_", str(file))])
    if name in sys.modules:
        return sys.modules[name]
    for folder in (root, file.parent):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, ImportError):
            raise ValueError(f"{file} cannot be imported: {error}") from error
        raise
    return module


def package_root(folder: Path) -> Path:
    """Return the working directory if it holds `folder`, as in AlgoPerf, else the nearest folder without `__init__.py`."""
    if folder.is_relative_to(Path.cwd()):
        return Path.cwd()
    return next(parent for parent in (folder, *folder.parents) if not (parent / "__init__.py").exists())
