"""Run AlgoPerf's runner on its mnist workload with Fashion-MNIST, so that nothing is downloaded.

In AlgoPerf's checkout and environment, pass this file the flags of submission_runner.py, with the folder of the gzipped IDX
files as --data_dir; Debian's package dataset-fashion-mnist has it as /usr/share/datasets/fashion-mnist. Only the workload's
call of `tfds.load` is replaced. It returns pixels divided by 255, which the workload's normalization assumes and does not do.
"""

import gzip
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from absl import app, flags

FILES = {"train": "train", "test": "t10k"}  # split: first part of the names of its files
UNSIGNED_BYTES = 8  # the type of the numbers in the header of an IDX file


def read_idx(path: Path) -> np.ndarray:
    """Return the array of unsigned bytes in a gzipped IDX file. Raise ValueError for another kind of file.

    The header is two zeros, the type of the numbers, the number of dimensions, and each dimension as four bytes.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}; --data_dir must be a folder with the gzipped IDX files of Fashion-MNIST, such as "
            "/usr/share/datasets/fashion-mnist from Debian's package dataset-fashion-mnist"
        ) from error
    dimensions = content[3] if content[:3] == bytes((0, 0, UNSIGNED_BYTES)) and len(content) > 3 else 0
    start = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:start], ">u4").tolist() if len(content) >= start else []
    if not shape or len(content) - start != np.prod(shape):
        raise ValueError(f"{path} is no whole IDX file of unsigned bytes; install Debian's package dataset-fashion-mnist again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_split(folder: Path, split: str) -> dict[str, np.ndarray]:
    """Return images (n, 28, 28, 1), float32 from 0 to 1, and labels (n,) of a split such as "test" or "train[:50000]".

    Raise ValueError for another split, or like `read_idx`.
    """
    found = re.fullmatch(r"(train|test)(?:\[(\d*):(\d*)\])?", split)
    if found is None:
        raise ValueError(f"the split is {split!r}; it must be train or test, or a part such as train[:50000]")
    first, last = (int(end) if end else None for end in found.groups()[1:])
    images, labels = (
        read_idx(folder / f"{FILES[found[1]]}-{kind}-ubyte.gz")[first:last] for kind in ("images-idx3", "labels-idx1")
    )
    return {"image": (images[..., None] / 255).astype(np.float32), "label": labels.astype(np.int64)}


def load(name: str, *, split: str, data_dir: str, **_: Any) -> Any:
    """Return a tf.data.Dataset of a split of Fashion-MNIST, whatever the name, as `tfds.load` would."""
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(read_split(Path(data_dir), split))


def main(_: Any) -> None:
    """Run AlgoPerf's runner."""
    import submission_runner
    from algoperf.workloads.mnist import workload

    workload.tfds = SimpleNamespace(load=load)
    try:
        if flags.FLAGS.workload != "mnist":
            raise ValueError(f"--workload is {flags.FLAGS.workload!r}; Fashion-MNIST feeds mnist only")
        read_split(Path(flags.FLAGS.data_dir), "test")
    except ValueError as error:
        sys.exit(f"error: {error}")
    submission_runner.main(_)


if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # AlgoPerf's checkout, in place of this file's folder
    try:
        import submission_runner  # noqa: F401  defines the flags
    except ImportError as error:
        sys.exit(f"error: {error}; run this file in AlgoPerf's checkout and environment")
    required = ["workload", "framework", "submission_path", "experiment_dir", "experiment_name"]
    flags.mark_flags_as_required(required)  # type: ignore[no-untyped-call]
    app.run(main)
