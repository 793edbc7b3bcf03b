"""accelerate, Hugging Face's Trainer, and Lightning, killed and resumed. `make examples` runs these tests."""

from types import SimpleNamespace

import pytest
import torch
from example_runs import assert_identical, interrupted

from shampoo import AdamWShampoo
from shampoo.diagnostics import diagnostics


def stepped():
    """Return a module, and an optimizer of its parameters."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5)
    return model, AdamWShampoo(model.parameters())


def backward(model):
    model(torch.ones(3, 6)).square().sum().backward()


@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_resumes_bit_for_bit_without_a_line_for_the_optimizer(tmp_path, processes):
    pytest.importorskip("accelerate")
    from safetensors.torch import load_file

    line = interrupted("accelerate_loop", tmp_path, "--epochs", 3, processes=processes, kill_at=72 // processes)
    assert line.startswith(f"accelerate_loop: {processes} processes, epochs 2 to 3, ")
    assert_identical(
        tmp_path,
        lambda folder: load_file(folder / "3/model.safetensors"),
        lambda folder: torch.load(folder / "3/optimizer.bin", weights_only=True),
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_trainer_resumes_bit_for_bit_with_one_callback(tmp_path, processes):
    pytest.importorskip("transformers")
    from safetensors.torch import load_file

    line = interrupted("hf_trainer", tmp_path, "--steps", 60, processes=processes, kill_at=52)
    assert line.startswith(f"hf_trainer: {processes} processes, steps 41 to 60, ")
    assert_identical(
        tmp_path,
        lambda folder: load_file(folder / "checkpoint-60/model.safetensors"),
        lambda folder: torch.load(folder / "checkpoint-60/optimizer.pt", weights_only=True),
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_lightning_resumes_bit_for_bit_without_a_line_for_the_optimizer(tmp_path, processes):
    pytest.importorskip("lightning")
    epoch = 48 // processes - (processes == 1)
    line = interrupted("lightning_module", tmp_path, "--epochs", 3, processes=processes, kill_at=72 // processes)
    assert line.startswith(f"lightning_module: {processes} processes, steps {epoch + 1} to {3 * epoch}, ")

    def saved(folder):
        return torch.load(folder / "last.ckpt", weights_only=True)

    assert_identical(tmp_path, lambda folder: saved(folder)["state_dict"], lambda folder: saved(folder)["optimizer_states"][0])


@pytest.mark.parametrize(
    ("strategy", "saves", "evaluates", "each_node", "gathered"),
    [
        ("steps", True, False, False, [0]),
        ("steps", True, False, True, [None]),
        ("steps", False, True, False, []),
        ("best", False, True, False, [0]),
        ("best", False, False, False, []),
    ],
)
def test_the_callback_gathers_where_trainer_may_save(tmp_path, strategy, saves, evaluates, each_node, gathered):
    """With "best", Trainer decides after the evaluation whether it saves."""
    transformers = pytest.importorskip("transformers")
    from shampoo.integrations import GatherState

    calls = []
    optimizer = SimpleNamespace(optimizer=SimpleNamespace(consolidate_state_dict=lambda to: calls.append(to)))
    arguments = transformers.TrainingArguments(
        tmp_path, save_strategy=strategy, save_on_each_node=each_node, eval_strategy="steps", eval_steps=1, use_cpu=True
    )
    control = transformers.TrainerControl(should_save=saves, should_evaluate=evaluates)
    GatherState().on_step_end(arguments, transformers.TrainerState(), control, optimizer=optimizer)
    GatherState().on_epoch_end(arguments, transformers.TrainerState(), control, optimizer=optimizer)
    assert calls == 2 * gathered


def test_diagnostics_look_into_accelerates_optimizer():
    accelerate = pytest.importorskip("accelerate")
    model, optimizer = stepped()
    model, wrapped = accelerate.Accelerator(cpu=True).prepare(model, optimizer)
    backward(model)
    wrapped.step()
    assert wrapped is not optimizer
    assert diagnostics(wrapped) == diagnostics(optimizer)
    assert diagnostics(wrapped)["optimizer"]["steps"] == 1


def test_diagnostics_look_into_lightnings_optimizer():
    pytest.importorskip("lightning")
    from lightning.pytorch.core.optimizer import LightningOptimizer

    model, optimizer = stepped()
    wrapped = LightningOptimizer(optimizer)
    backward(model)
    optimizer.step()
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)  # makes new buckets, which the wrapper must not miss
    assert wrapped is not optimizer
    assert diagnostics(wrapped) == diagnostics(optimizer)
    assert diagnostics(wrapped)["optimizer"]["steps"] == 1
