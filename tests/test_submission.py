"""The submission as AlgoPerf calls it: imports, hyperparameters, loss types, masks, metrics."""

import runner  # noqa: F401  makes algoperf.spec importable

# isort: split

import shutil
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from algoperf import spec
from fake_workload import POINTS, FakeWorkload, as_point, evaluate, start, step
from torch import nn

import submission

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("loss_type", spec.LossType)
@pytest.mark.parametrize("masked", [True, False])
def test_it_trains_on_every_loss_type(loss_type, masked):
    workload, point = FakeWorkload(loss_type), as_point(learning_rate=0.02, warmup_factor=0.1, precondition_frequency=5)
    state, batch, losses = start(workload, point), workload.batch(), []
    if not masked:
        del batch["weights"]
    for t in range(30):
        state, model, _ = step(workload, state, point, batch, t, train_state={} if t % 2 else MappingProxyType({}))
        logits = model(batch["inputs"])
        losses.append(workload.loss_fn(batch["targets"], logits, batch.get("weights"))["summed"].item())
    assert losses[-1] < 0.8 * losses[0]
    assert workload.seen_dropout == {0.1}


def test_padding_does_not_move_the_weights():
    def weights_after(batch):
        workload, point = FakeWorkload(), as_point(learning_rate=0.1, warmup_factor=0.0)
        workload.model = nn.Sequential(nn.Linear(6, 5))
        step(workload, start(workload, point), point, batch)
        return workload.model[0].weight.detach()

    padded, other_padding = FakeWorkload().batch(), FakeWorkload().batch()
    other_padding["inputs"][-2:] = 9.0
    unpadded = {key: x[:-2] for key, x in padded.items()}
    assert torch.equal(weights_after(padded), weights_after(other_padding))
    torch.testing.assert_close(weights_after(padded), weights_after(unpadded))


def test_a_run_that_diverges_ends_with_training_complete():
    workload, point = FakeWorkload(), as_point(learning_rate=0.1, warmup_factor=0.0)
    workload.model = nn.Sequential(nn.Linear(6, 5))
    state, batch = start(workload, point), workload.batch()
    batch["inputs"][0, 0] = torch.nan
    before = workload.model[0].weight.detach().clone()
    for t in range(99):
        step(workload, state, point, batch, t)
    with pytest.raises(spec.TrainingCompleteError):
        step(workload, state, point, batch, 99)
    assert torch.equal(workload.model[0].weight, before)


def test_steps_are_in_full_precision_where_tf32_is_allowed():
    workload, point, seen = FakeWorkload(), as_point(), []
    state = start(workload, point)
    state["optimizer"].register_step_pre_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision("high")
    try:
        step(workload, state, point, workload.batch())
        assert (seen, torch.get_float32_matmul_precision()) == (["highest"], "high")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_gradients_are_clipped_only_where_the_point_says_so():
    norms = {}
    for clip in (..., 1e-3):
        workload, point = FakeWorkload(), as_point(grad_clip=clip)
        step(workload, start(workload, point), point, workload.batch())
        norms[clip] = submission.gradient_norm(workload.model).item()
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3)
    assert norms[...] > 0.1


def test_label_smoothing_reaches_the_loss():
    weights = []
    for smoothing in (0.0, 0.3):
        workload, point = FakeWorkload(), as_point(label_smoothing=smoothing, warmup_factor=0.0)
        step(workload, start(workload, point), point, workload.batch())
        weights.append(workload.model[0].weight.detach().clone())
    assert not torch.equal(*weights)


def test_metrics_are_logged_sparsely():
    logged = []
    workload, point = FakeWorkload(), as_point()
    workload.metrics_logger = SimpleNamespace(append_scalar_metrics=lambda metrics, step: logged.append((step, metrics)))
    state = start(workload, point)
    for t in range(101):
        step(workload, state, point, workload.batch(t), t)
    assert [t for t, _ in logged] == [0, 50, 100]
    assert all(metrics.keys() == {"loss", "grad_norm", "learning_rate"} for _, metrics in logged)
    assert all(isinstance(value, float) for _, metrics in logged for value in metrics.values())


def test_a_learning_rate_for_some_steps_falls_with_the_square_root_of_the_number_of_steps():
    rates = []
    for factor in (1.0, 4.0, 100.0):
        point = as_point(learning_rate_steps=FakeWorkload.step_hint, step_hint_factor=factor)
        rates.append(start(FakeWorkload(), point)["scheduler"].base_lrs[0] / point.learning_rate)
    assert rates == pytest.approx([1, 1 / 2, 1 / 10])


def test_without_hyperparameters_it_uses_the_self_tuning_point():
    ends = []
    for point in (None, submission.self_tuning_point()):
        workload = FakeWorkload()
        state = start(workload, point)
        for t in range(12):
            step(workload, state, point, workload.batch(t), t)
        evaluate(workload, state, point)
        ends.append(list(workload.model.parameters()))
        assert "averages" in state
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


@pytest.mark.parametrize(
    ("content", "error"), [(None, "No such file"), ("[{}, {}]", "too many values"), ("[7]", "'int'"), ("{", "Expecting")]
)
def test_a_missing_or_invalid_self_tuning_point_is_named(tmp_path, monkeypatch, content, error):
    if content is not None:
        (tmp_path / "self_tuning.json").write_text(content)
    submission.self_tuning_point.cache_clear()
    monkeypatch.setattr(submission, "__file__", str(tmp_path / "submission.py"))
    words = rf"{tmp_path}/self_tuning\.json cannot be read; it must hold the point .* copy it there, or give a search space: .*"
    with pytest.raises(ValueError, match=words + error):
        start(FakeWorkload(), None)


VARIANTS = [
    {},
    {"averaging": True, "schedule": "trapezoid"},
    {"preconditioner": "soap", "solver": "qr", "max_factor_ratio": 1.0, "unfactored_beta2": 0.9, "cautious_decay": True},
    {"covariance": "kl", "exponents": 0.5, "schedule": "linear", "averaging": True},
]


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_state_is_saved_and_restored_as_algoperf_does(tmp_path, variant, evaluated):
    """Save the state_dict of every value of the optimizer state, and load it into a fresh one."""
    point = as_point(precondition_frequency=3, learning_rate=0.1, **variant)
    workload = FakeWorkload()
    state = start(workload, point)
    for t in range(7):
        step(workload, state, point, workload.batch(t), t)
    if evaluated:
        evaluate(workload, state, point)
    saved = {"model": workload.model.state_dict(), **{key: value.state_dict() for key, value in state.items()}}
    torch.save(saved, tmp_path / "checkpoint")
    resumed = FakeWorkload()
    state2 = start(resumed, point)
    loaded = torch.load(tmp_path / "checkpoint", weights_only=True)
    resumed.model.load_state_dict(loaded["model"])
    for key, value in state2.items():
        value.load_state_dict(loaded[key])
    for w, s in ((workload, state), (resumed, state2)):
        for t in range(7, 14):
            step(w, s, point, w.batch(t), t)
    assert all(torch.equal(p, q) for p, q in zip(workload.model.parameters(), resumed.model.parameters()))
    assert state["scheduler"].get_last_lr() == state2["scheduler"].get_last_lr()


@pytest.mark.parametrize("compiled", [False, True])
def test_evaluations_see_averages_that_do_not_affect_training(compiled):
    point = as_point(averaging=True, warmup_factor=0.0, learning_rate=0.1)
    plain_point = as_point(warmup_factor=0.0, learning_rate=0.1)
    workload, plain = FakeWorkload(), FakeWorkload()
    model = torch.compile(workload.model, backend="eager") if compiled else workload.model
    state, plain_state = start(workload, point, model), start(plain, plain_point)
    mean = torch.zeros_like(plain.model[0].weight)
    for t in range(6):
        step(workload, state, point, workload.batch(t), t, model)
        step(plain, plain_state, plain_point, plain.batch(t), t)
        mean.lerp_(plain.model[0].weight.detach(), 1 - (1 - 1 / (t + 1)) ** 7.94)
        if t % 2:
            evaluate(workload, state, point)
            torch.testing.assert_close(workload.model[0].weight.detach(), mean)
    assert not torch.equal(workload.model[0].weight, plain.model[0].weight)
    state["averages"].train()
    assert all(map(torch.equal, workload.model.state_dict().values(), plain.model.state_dict().values()))


def test_an_embedding_of_a_million_rows():
    workload, point = FakeWorkload(), as_point(warmup_factor=0.0)
    workload.model = nn.Sequential(nn.EmbeddingBag(1_048_576, 8), nn.Linear(8, 5))
    batch = {"inputs": torch.arange(40).view(8, 5), "targets": torch.zeros(8, dtype=torch.long)}
    before = workload.model[0].weight[:50].detach().clone()
    step(workload, start(workload, point), point, batch)
    assert (workload.model[0].weight[:40] != before[:40]).all()


def test_prepare_for_eval_and_data_selection_pass_things_through():
    workload = FakeWorkload()
    state = start(workload, as_point())
    parts = {
        "workload": None,
        "current_param_container": "p",
        "current_params_types": None,
        "model_state": "m",
        "hyperparameters": None,
    }
    parts |= {"loss_type": None, "optimizer_state": state, "eval_results": [], "global_step": 1, "rng": None}
    assert submission.prepare_for_eval(**parts) == (state, "p", "m")
    assert submission.data_selection(None, iter([1, 2]), None, None, None, None, 0, None) == 1


def test_batch_sizes_are_those_of_known_workloads():
    assert submission.get_batch_size("librispeech_deepspeech") == 224
    for name in ("mnist_resnet", "imagenet", "fastmri_tanh"):
        with pytest.raises(ValueError, match=name):
            submission.get_batch_size(name)
    assert all(size % 8 == 0 for size in submission.BATCH_SIZES.values())


def test_the_five_points_are_the_competitions():
    """Compare with the published table: lr, betas, weight decay, momentum, grafting, nadam, exponents; schedule factors."""
    published = [
        (0.0017486387539278373, 1 - 0.06733926164, 1 - 0.00448403102, 0.08121616522670176, 0.0, "adam", True, None),
        (
            0.0014381744028656841,
            1 - 0.025337537053408913,
            1 - 0.02508024059481679,
            0.00019716633625688372,
            0.0,
            "adam",
            True,
            None,
        ),
        (4.199449275251465, 0.0, 1 - 0.0023701743773090066, 6.404237434173623e-05, 1 - 0.03150207249544311, "sgd", False, None),
        (0.0012, 1 - 0.016610699316537858, 1 - 0.005888216674053163, 0.00040349948255455174, 0.5, "adam", True, 0.5),
        (0.001308209823469072, 1 - 0.02686663061, 1 - 0.00187670778, 0.16375311233774334, 0.0, "adam", True, None),
    ]
    schedules = [
        (0.02, 0.0, 0.1, 1.0),
        (0.05, 0.2, 0.0, 0.6),
        (0.02, 0.1, 0.0, 1.0),
        (0.02, 0.1, 0.1, 1.0),
        (0.1, 0.1, 0.0, 1.0),
    ]
    names = ("weight_decay", "momentum", "grafting", "nadam", "exponents")
    for values, (lr, beta1, beta2, *others), schedule in zip(POINTS, published, schedules, strict=True):
        point = as_point(**values)
        (group,) = start(FakeWorkload(), point)["optimizer"].param_groups
        assert (group["initial_lr"], group["betas"]) == (lr, (beta1, beta2))
        assert [group[name] for name in names] == others
        assert (point.warmup_factor, point.label_smoothing, point.dropout_rate, point.step_hint_factor) == schedule
        common = {"block_size": 1024, "precondition_frequency": 100, "eps": 1e-8, "grafting_eps": 1e-8, "nesterov": True}
        common |= {"bias_correction": True, "decoupled_weight_decay": True, "start_preconditioning_step": 100}
        assert {key: group[key] for key in common} == common


def test_a_point_may_choose_options_that_make_steps_cheaper():
    workload, chosen = FakeWorkload(), {"solver": "qr", "stagger": True, "precondition_vectors": False, "factor_frequency": 2}
    group = start(workload, as_point(**chosen))["optimizer"].param_groups[0]
    assert {key: group[key] for key in chosen} == chosen


def test_a_point_may_choose_exponents():
    def exponents(**changes):
        return start(FakeWorkload(), as_point(**changes))["optimizer"].param_groups[0]["exponents"]

    assert exponents() is None
    assert exponents(inverse_root=2) == 0.5
    assert list(exponents(exponents=[0.5, 0.0])) == [0.5, 0.0]  # a list, from JSON
    assert list(exponents(exponents=[0.5, 0.0], inverse_root=2)) == [0.5, 0.0]


def test_the_schedule_spans_the_step_hint_times_its_factor():
    workload, point = FakeWorkload(), as_point(step_hint_factor=0.5, warmup_factor=0.25)
    scheduler, rates = start(workload, point)["scheduler"], []
    for _ in range(25):
        rates.append(scheduler.get_last_lr()[0] / point.learning_rate)
        scheduler.optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(1e-10)
    assert rates[5] == pytest.approx(1.0)  # int(0.25 * 0.5 * 40) steps of warmup
    assert rates[20] == pytest.approx(0.0, abs=1e-12)
    assert rates[24] > 0.1  # the cosine rises again, as in the competition


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": -1.0}, "hyperparameter learning_rate is -1.0; it must be a number > 0"),
        ({"one_minus_beta1": 0.0}, "hyperparameter one_minus_beta1 is 0.0"),
        ({"grafting": "ADAM"}, "hyperparameter grafting is 'ADAM'; it must be one of 'none', 'sgd'"),
        ({"precondition_frequency": 2.5}, "hyperparameter precondition_frequency is 2.5; it must be an integer >= 1"),
        ({"schedule_tail": "flat"}, "hyperparameter schedule_tail is 'flat'; it must be one of 'zero', 'rise'"),
        ({"dropout_rate": ...}, r"missing: \['dropout_rate'\]"),
        ({"momentum": 0.9}, r"unknown: \['momentum'\]"),
        ({"grad_clip": 0.0}, "hyperparameter grad_clip is 0.0"),
        ({"solver": "svd"}, "hyperparameter solver is 'svd'"),
        (
            {"learning_rate_steps": 10**400},
            "hyperparameter learning_rate_steps is 10+; it must be an integer >= 1 and <= 1e\\+38",
        ),
        ({"exponents": [0.5, -0.5]}, r"hyperparameter exponents is \[0.5, -0.5\]; it must be a number >= 0"),
    ],
)
def test_a_bad_point_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        start(FakeWorkload(), as_point(**changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "cwd", "module"),
    [("submissions/external_tuning/shampoo_submission", ".", "submissions.external_tuning.shampoo_submission.submission"),
     ("somewhere", "somewhere", "submission")],
)  # fmt: skip
def test_it_imports_both_ways_with_the_package_beside_it(tmp_path, folder, cwd, module):
    """Import from the harness's root, where another package named shampoo may be on the path, and from its own folder."""
    target = tmp_path / folder
    target.mkdir(parents=True)
    shutil.copy(ROOT / "submission.py", target)
    shutil.copytree(ROOT / "shampoo", target / "shampoo", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / cwd / "algoperf").mkdir()
    shutil.copy(ROOT / "runner" / "spec.py", tmp_path / cwd / "algoperf" / "spec.py")
    code = f"import {module} as s, sys; print(sys.modules[s.AdamWShampoo.__module__].__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / cwd, capture_output=True, text=True, timeout=1200, check=False
    )
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == target / "shampoo" / "optimizer.py"
