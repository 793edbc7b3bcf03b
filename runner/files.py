"""Files that neither a crash, a full disk, nor a second process can damage, and files of unknown origin."""

import contextlib
import errno
import itertools
import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

MAX_TEXT_BYTES = 100 * 2**20  # far above the size of any log or table of runs

PARTIAL = ".partial_"  # how the names of unfinished files begin


@contextlib.contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield the path of a new file, which takes the place of `path` at the end. If that fails, `path` stays as it was.

    If `durable`, this holds even if the machine crashes.
    """
    partial = path.with_name(f"{PARTIAL}{path.name}")
    partial.unlink(missing_ok=True)  # it may be a link to another file
    try:
        yield partial
        if durable:
            sync(partial)
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and not error.filename:
            error.filename = str(path)  # a full disk names none
        raise
    if durable:
        with contextlib.suppress(OSError):  # not all file systems can
            sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_file(path: Path, max_bytes: int) -> None:
    """Raise OSError if there is no file, and ValueError if it is larger or, like a FIFO, not a regular file."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is not a regular file")
    if found.st_size > max_bytes:
        raise ValueError(f"it has {found.st_size:,} bytes; it must have at most {max_bytes:,}")


def read_text(path: Path) -> str:
    """Return the text of a file. Raise like `check_file`, and ValueError if it is not UTF-8."""
    check_file(path, MAX_TEXT_BYTES)
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raise ValueError for any other file, and OSError if it cannot be read."""
    try:
        content = json.loads(read_text(path))
        if not isinstance(content, dict):
            raise ValueError(f"it holds {type(content).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return content


def create(folder: Path) -> None:
    """Create a folder and those around it if needed. Raise OSError with the remedy if that is impossible."""
    try:
        if any(len(os.fsencode(name)) > 255 for name in folder.parts):  # before any folder around it is created
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder} cannot be created: {error}; choose another place") from error


def set_aside(paths: Sequence[Path], folder: Path) -> Path:
    """Move files to a new folder set_aside_N in `folder`, and return it."""
    aside = next(path for n in itertools.count(1) if not (path := folder / f"set_aside_{n}").exists())
    aside.mkdir()
    for path in paths:
        path.rename(aside / path.name)
    return aside


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a file or folder with PATH.lock beside it. The system releases the lock when the process ends, even by SIGKILL.

    Raise BlockingIOError if another process holds it, and OSError if there can be no lock.
    """
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(
            f"another process is writing to {path}; wait until it has ended, or choose another place"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise OSError(f"{path}.lock cannot be locked: {error}; choose a place on another file system") from error
    try:
        yield
    finally:
        lock.release()
