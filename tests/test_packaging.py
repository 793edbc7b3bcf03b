"""The source distribution: it has all files of the repository, and the version of the package."""

import shutil
import subprocess
import sys
import tarfile
from email.parser import Parser
from pathlib import Path

import pytest

import shampoo

ROOT = Path(__file__).parents[1]
BUILD = "import setuptools.build_meta, sys; print(setuptools.build_meta.build_sdist(sys.argv[1]))"

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no git checkout")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The files of the repository, and the opened source distribution that is built from a copy of them."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [name for name in listed.splitlines() if (ROOT / name).exists()]
    folder = tmp_path_factory.mktemp("sdist")
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    command = [sys.executable, "-c", BUILD, str(folder)]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1200, check=True).stdout
    with tarfile.open(folder / built.splitlines()[-1]) as archive:
        yield files, archive


def test_it_has_all_files_of_the_repository(sdist):
    files, archive = sdist
    names = {name.partition("/")[2] for name in archive.getnames()}
    assert [name for name in files if name not in names] == []
    assert not [name for name in names if "__pycache__" in name]


def test_its_version_is_that_of_the_package(sdist):
    _, archive = sdist
    (name,) = [name for name in archive.getnames() if name.count("/") == 1 and name.endswith("/PKG-INFO")]
    metadata = Parser().parsestr(archive.extractfile(name).read().decode())
    assert (metadata["Name"], metadata["Version"]) == ("adamw-shampoo", shampoo.__version__)
    assert [text for text in metadata.get_all("Requires-Dist") if "extra" not in text] == ["torch>=2.5.1"]
