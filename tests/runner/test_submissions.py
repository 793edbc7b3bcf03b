"""Loading submissions: from any folder, with modules beside them, and what is wrong with one that cannot be loaded."""

import runner  # noqa: F401  makes algoperf.spec importable

# isort: split

import shutil
import sys

import pytest
import torch
from commands import ROOT, arguments, call

from runner import spec as runner_spec
from runner.submissions import NEEDED, load_submission
from runner.workloads.base import DEVICE

API = "".join(f"def {name}(*_, **__): pass\n" for name in NEEDED)


@pytest.fixture(autouse=True)
def _clean_imports(monkeypatch, tmp_path):
    """Undo what a test adds to the import path and to the imported modules."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name, module in sys.modules.items() if str(tmp_path) in str(vars(module).get("__spec__"))]:
        del sys.modules[name]


def write(path, *lines):
    """Write a submission that starts with these lines. Return its path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, API]))
    return str(path)


def test_a_copy_of_a_baseline_runs_outside_the_repository(tmp_path):
    shutil.copytree(ROOT / "runner" / "baselines" / "adamw", tmp_path / "my copy-1.0")
    copy = tmp_path / "my copy-1.0" / "submission.py"
    space = copy.with_name("tuning_search_space.json")
    flags = [f"--submission_path={copy}", f"--tuning_search_space={space}", "--max_global_steps=1"]
    assert "0 of 1 trials reached the target" in call("runner.__main__", *arguments(tmp_path, *flags))


def test_two_files_of_one_name_are_two_modules(tmp_path):
    paths = [write(tmp_path / name / "submission.py", f"name = {name!r}") for name in "ab"]
    modules = [load_submission(path) for path in paths]
    assert [module.name for module in modules] == ["a", "b"]
    assert load_submission(paths[0]) is modules[0]
    assert "submission" not in {module.__name__ for module in modules}


def test_modules_beside_it_can_be_imported(tmp_path):
    (tmp_path / "beside.py").write_text("value = 7\n")
    assert load_submission(write(tmp_path / "submission.py", "import beside")).beside.value == 7


def test_it_gets_the_shampoo_beside_it(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "shampoo"]:
        monkeypatch.delitem(sys.modules, name)
    shutil.copy(ROOT / "submission.py", tmp_path)
    shutil.copytree(ROOT / "shampoo", tmp_path / "shampoo", ignore=shutil.ignore_patterns("__pycache__"))
    module = load_submission(str(tmp_path / "submission.py"))
    assert sys.modules[module.AdamWShampoo.__module__].__file__ == str(tmp_path / "shampoo" / "optimizer.py")


@pytest.mark.parametrize("below", [True, False])
def test_it_may_be_part_of_a_package(tmp_path, monkeypatch, below):
    """Below the working directory, as in AlgoPerf, or in a folder with `__init__.py`."""
    folder = tmp_path / "submissions" / "self_tuning" / ("below" if below else "elsewhere")
    imports = ["from .other import value", f"from submissions.self_tuning.{folder.name}.other import value as same"]
    path = write(folder / "submission.py", *imports)
    (folder / "other.py").write_text("value = 7\n")
    if below:
        monkeypatch.chdir(tmp_path)
    else:
        for parent in (folder, *folder.parents[:2]):
            (parent / "__init__.py").touch()
    module = load_submission(path)
    assert module.value is module.same


@pytest.mark.skipif(sys.modules["algoperf.spec"] is not runner_spec, reason="AlgoPerf's package is installed")
@pytest.mark.parametrize("package", ["algoperf", "algorithmic_efficiency"])
def test_algoperfs_imports_work_by_either_name_of_the_package(tmp_path, package):
    imports = [f"from {package} import spec", f"import {package}.pytorch_utils as utils"]
    module = load_submission(write(tmp_path / "submission.py", *imports))
    assert module.spec is runner_spec
    parallel, rank, device, gpus = module.utils.pytorch_setup()
    assert (parallel, rank, device.type, gpus) == (False, 0, DEVICE.type, torch.cuda.device_count())


@pytest.mark.parametrize("name", ["nothing.py", "folder", "text.txt"])
def test_a_path_that_is_no_python_file_is_named(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").touch()
    with pytest.raises(ValueError, match=rf"the submission path is '.*{name}'; it must be a Python file that exists"):
        load_submission(str(tmp_path / name))


def test_what_a_submission_lacks_is_named(tmp_path):
    path = tmp_path / "half.py"
    path.write_text("def get_batch_size(name): ...\ndef data_selection(): ...\n")
    with pytest.raises(ValueError, match=r"half\.py lacks init_optimizer_state, update_params; a submission must define get_b"):
        load_submission(str(path))


def test_a_package_that_is_not_installed_is_named(tmp_path):
    path = write(tmp_path / "submission.py", "import no_such_package")
    for _ in range(2):  # a failed import leaves nothing behind
        with pytest.raises(
            ValueError, match=r"submission\.py cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"
        ):
            load_submission(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n1 / 0", r"ZeroDivisionError: division by zero \(submission\.py, line 2\)"),
        ("def f(:", r"SyntaxError: invalid syntax \(submission\.py, line 1\)"),
        ("import sys\nsys.exit(0)", r"SystemExit: 0 \(submission\.py, line 2\)"),
    ],
)
def test_any_other_error_in_a_file_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"submission\.py cannot be imported: {message}"):
        load_submission(write(tmp_path / "submission.py", text))


def test_paths_that_differ_in_signs_only_are_different_files(tmp_path):
    for name in ("a-b", "a_b"):
        (tmp_path / name).mkdir()
        module = load_submission(write(tmp_path / name / "submission.py", f"path = {name!r}"))
        assert module.path == name
