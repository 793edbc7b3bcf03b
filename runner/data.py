"""Data files that ship inside installed packages or next to the workloads. Their hashes are checked before they are read."""

import hashlib
import importlib.util
from pathlib import Path

WORKLOADS = Path(__file__).with_name("workloads")


class DataError(RuntimeError):
    """A data file is missing, or is not the one that the targets were set on."""


def package_file(package: str, version: str, name: str, sha256: str) -> Path:
    """Return the path of a file inside an installed package, without importing the package. Raise DataError like `checked`."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise DataError(
            f"{name} ships with the package {package}, which is not installed; run pip install --no-deps {package}=={version}"
        )
    remedy = f"run pip install --no-deps --force-reinstall {package}=={version}"
    return checked(Path(found.submodule_search_locations[0]) / name, sha256, remedy)


def workload_file(name: str, sha256: str) -> Path:
    """Return the path of a file that ships next to the workloads. Raise DataError like `checked`."""
    return checked(WORKLOADS / name, sha256, "restore the file from the repository")


def checked(path: Path, sha256: str, remedy: str) -> Path:
    """Return `path`. Raise DataError, with the remedy, if the file does not exist or has another SHA-256 hash."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; {remedy}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise DataError(f"{path} has sha256 {found}; it must have {sha256}; {remedy}")
    return path
