"""Submissions and other Python files that users name by path."""

import importlib.util
import re
import sys
import traceback
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
    except Exception as error:
        raise ValueError(f"get_batch_size({workload!r}) failed: {describe(error)}") from error
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(
            f"get_batch_size({workload!r}) returned {batch_size!r}; it must return an integer >= 1, or raise ValueError if it "
            "does not know the workload"
        )
    return batch_size


def check_point(workload: Any, submission: ModuleType, point: Any, where: str) -> None:
    """Build a model of the workload, and the optimizer at a point, or at None for a submission that tunes itself.

    Raise ValueError, which begins with `where`, if that fails, as for an invalid or incomplete point.
    """
    try:
        model, model_state = workload.init_model_fn([0, 0])
        submission.init_optimizer_state(workload, model, model_state, point, [0, 0])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except Exception as error:
        if not isinstance(error, AttributeError) or error.obj is not point or error.name is None:  # an error of another kind
            raise ValueError(f"{where}: {describe(error)}") from error
        if point is None:
            needs = f"needs the hyperparameter {error.name}, so it cannot tune itself; give it a search space"
            raise ValueError(f"{where} {needs}") from error
        raise ValueError(f"{where} lacks the hyperparameter {error.name}, which the submission needs; add it") from error


def load_module(file: Path) -> ModuleType:
    """Import a Python file from any folder under a name that no other module has. A file that was imported before is not run
    again.

    Its folder becomes importable, as for a script. In a folder below the working directory, or one with `__init__.py`, it may
    also use `from .other import f` and AlgoPerf's `from submissions.NAME.other import f`. Raise ValueError if the file raises
    an exception.
    """
    file = file.resolve()
    name = module_name(file)
    if name in sys.modules:
        return sys.modules[name]
    for folder in (package_root(file.parent), file.parent):
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
        if isinstance(error, (Exception, SystemExit)):
            raise ValueError(f"{file} cannot be imported: {describe(error)}") from error
        raise
    return module


def module_name(file: Path) -> str:
    """Return the name under which `load_module` imports a file; the path must be absolute, without links."""
    package = file.parent.relative_to(package_root(file.parent)).parts
    unique = re.sub(r"\W", lambda match: f"_{ord(match[0]):x}_", str(file))  # a-b.py is not a_b.py
    return ".".join([*(package if all(map(str.isidentifier, package)) else ()), unique])


def describe(error: BaseException) -> str:
    """Return an exception in one line: its type, its message, and where it was raised."""
    message = " ".join(traceback.format_exception_only(error)[-1].split())
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        places = [(error.filename or "?", error.lineno)]
    return f"{message} ({Path(places[-1][0]).name}, line {places[-1][1]})" if places else message


def package_root(folder: Path) -> Path:
    """Return the working directory if it holds `folder`, as in AlgoPerf, else the nearest folder without `__init__.py`."""
    if folder.is_relative_to(Path.cwd()):
        return Path.cwd()
    return next(parent for parent in (folder, *folder.parents) if not (parent / "__init__.py").exists())
