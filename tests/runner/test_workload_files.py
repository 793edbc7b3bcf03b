"""Workloads in other files, named by path and class."""

import runner  # noqa: F401  makes algoperf.spec importable

# isort: split

import json

import pytest
from commands import arguments, call, error_of

from runner.workloads import short_name, workload_class

FILE = """
import torch
from algoperf import spec

from runner.workloads.base import LaptopWorkload
from runner.workloads.mnist_vit import MnistViT


class FewDigits(MnistViT):
    eval_batch_size = 75

    def load_splits(self):
        splits = super().load_splits()
        return {name: {key: x[::10] for key, x in split.items()} for name, split in splits.items()}


class Empty(LaptopWorkload):
    loss_type = spec.LossType.MEAN_SQUARED_ERROR

    def build_model(self):
        return torch.nn.Linear(1, 1)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "digits.py"
    path.write_text(FILE)
    return path


def test_a_workload_in_a_file_runs(file, tmp_path):
    output = call("runner.__main__", *arguments(tmp_path, "--max_global_steps=1", workload=f"{file}:FewDigits"))
    assert "0 of 1 trials reached the target, validation loss < " in output
    trial = tmp_path / "e" / "few_digits_pytorch" / "trial_1"
    assert json.loads((trial / "meta_data_0.json").read_text())["workload.num_train_examples"] == 300


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.py:Some", "the workload is 'nothing.py:Some'; before the colon there must be a Python file that exists"),
        ("{}:Nothing", "has no subclass of runner.workloads.base.LaptopWorkload named 'Nothing'"),
        ("{}:torch", "has no subclass of runner.workloads.base.LaptopWorkload named 'torch'"),
        ("{}", "digits.py'; it must be one of"),
        (
            "{}:Empty",
            "lacks default_batch_size, higher_is_better, load_splits, metric_sums, per_example_loss, step_hint, "
            "target_metric_name, validation_target_value; a workload must define them in its class",
        ),
    ],
)
def test_a_workload_that_is_not_there_or_not_complete_is_named(file, tmp_path, name, message):
    error = error_of("runner.__main__", *arguments(tmp_path, workload=name.format(file)))
    assert message in error


def test_it_is_the_same_class_every_time(file):
    assert workload_class(f"{file}:FewDigits") is workload_class(f"{file}:FewDigits")


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("some/file.py:TwoMoons", "two_moons"), ("file.py:MyMLP2", "my_mlp2"), ("x.py:CIFAR10", "cifar10"), ("mnist_vit",) * 2
    ],
)  # fmt: skip
def test_its_folder_is_named_after_its_class(name, short):
    assert short_name(name) == short
