"""Fashion-MNIST for AlgoPerf's runner: IDX files, splits, and errors."""

import gzip
import struct

import numpy as np
import pytest

from experiments.competition.fashion_mnist import read_idx, read_split


def write_idx(path, array):
    """Write unsigned bytes as a gzipped IDX file."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def folder(tmp_path):
    """Return a folder with ten images of each split."""
    for name, value in (("train", 255), ("t10k", 51)):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", np.full((10, 28, 28), value, np.uint8))
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", np.arange(10, dtype=np.uint8))
    return tmp_path


@pytest.mark.parametrize(
    ("split", "value", "labels"),
    [("train[:7]", 1.0, range(7)), ("train[7:]", 1.0, range(7, 10)), ("test", 0.2, range(10))],
)
def test_splits_are_parts_of_the_files(folder, split, value, labels):
    found = read_split(folder, split)
    assert found["image"].shape == (len(labels), 28, 28, 1)
    assert found["image"].dtype == np.float32
    assert np.unique(found["image"]) == pytest.approx([value])
    assert found["label"].tolist() == list(labels)


def test_other_files_are_named(folder):
    file = folder / "t10k-labels-idx1-ubyte.gz"
    whole = gzip.decompress(file.read_bytes())
    for content in (whole[:-1], whole[:6], b"", b"\0\0\x0d" + whole[3:]):
        file.write_bytes(gzip.compress(content))
        with pytest.raises(ValueError, match="is no whole IDX file"):
            read_idx(file)
    file.write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="cannot be read"):
        read_split(folder, "test")
    with pytest.raises(ValueError, match="split is 'validation'"):
        read_split(folder, "validation")
