"""The submission as AlgoPerf calls it: imports, hyperparameters, loss types, masks, metrics, several ranks."""

import runner  # noqa: F401  brings algoperf.spec

# isort: split

import collections
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from algoperf import spec
from torch import nn

import submission

ROOT = Path(__file__).parents[1]
POINTS = json.loads((ROOT / "tuning_search_space.json").read_text())


def as_point(**changes):
    values = {**POINTS[0], **changes}
    values = {key: value for key, value in values.items() if value is not ...}
    return collections.namedtuple("Hyperparameters", values)(**values)


class FakeWorkload:
    """Random examples for each loss type, with AlgoPerf's signatures; the last two examples of a batch are padding."""

    step_hint = 40

    def __init__(self, loss_type=spec.LossType.SOFTMAX_CROSS_ENTROPY):
        self.loss_type = loss_type
        self.metrics_logger = None
        self.seen_dropout = set()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5))

    def batch(self, seed=0, size=8):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(size, 6, generator=generator)
        real = torch.rand(size, 5, generator=generator)
        targets = {
            spec.LossType.SOFTMAX_CROSS_ENTROPY: real.argmax(1),
            spec.LossType.SIGMOID_CROSS_ENTROPY: real.round(),
            spec.LossType.CTC_LOSS: (torch.randint(1, 5, (size, 2), generator=generator), torch.zeros(size, 2)),
        }.get(self.loss_type, real)
        return {"inputs": inputs, "targets": targets, "weights": (torch.arange(size) < size - 2).float()}

    def model_fn(self, params, augmented_and_preprocessed_input_batch, model_state, mode, rng, update_batch_norm, dropout_rate):
        assert params.training
        assert mode == spec.ForwardPassMode.TRAIN
        self.seen_dropout.add(dropout_rate)
        return params(augmented_and_preprocessed_input_batch["inputs"]), model_state

    def loss_fn(self, label_batch, logits_batch, mask_batch=None, label_smoothing=0.0):
        if self.loss_type == spec.LossType.SOFTMAX_CROSS_ENTROPY:
            losses = F.cross_entropy(logits_batch, label_batch, reduction="none", label_smoothing=label_smoothing)
        elif self.loss_type == spec.LossType.SIGMOID_CROSS_ENTROPY:
            losses = F.binary_cross_entropy_with_logits(logits_batch, label_batch, reduction="none").sum(1)
        elif self.loss_type == spec.LossType.CTC_LOSS:
            labels, padding = label_batch
            log_probs = logits_batch.expand(4, *logits_batch.shape).log_softmax(-1)
            lengths = torch.full((len(labels),), 4)
            losses = F.ctc_loss(log_probs, labels, lengths, (1 - padding).sum(1).long(), reduction="none", zero_infinity=True)
        else:
            power = {spec.LossType.MEAN_SQUARED_ERROR: 2, spec.LossType.MEAN_ABSOLUTE_ERROR: 1}[self.loss_type]
            losses = ((logits_batch - label_batch).abs() ** power).sum(1)
        mask = torch.ones_like(losses) if mask_batch is None else mask_batch
        return {"summed": (losses * mask).sum(), "n_valid_examples": mask.sum(), "per_example": losses * mask}


def start(workload, point, model=None):
    return submission.init_optimizer_state(workload, workload.model if model is None else model, None, point, [0, 0])


def step(workload, state, point, batch, global_step=0, model=None, **extra):
    return submission.update_params(
        workload=workload,
        current_param_container=workload.model if model is None else model,
        current_params_types={},
        model_state=None,
        hyperparameters=point,
        batch=batch,
        loss_type=workload.loss_type,
        optimizer_state=state,
        eval_results=[],
        global_step=global_step,
        rng=[0, 0],
        **extra,
    )


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


def test_a_run_that_diverged_ends_in_order():
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


def test_state_is_saved_and_restored_as_algoperf_does(tmp_path):
    """state_dict of every value of the optimizer state, into a fresh one."""
    point = as_point(precondition_frequency=3, learning_rate=0.1)
    workload = FakeWorkload()
    state = start(workload, point)
    for t in range(7):
        step(workload, state, point, workload.batch(t), t)
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


def test_an_embedding_of_a_million_rows():
    workload, point = FakeWorkload(), as_point(warmup_factor=0.0)
    workload.model = nn.Sequential(nn.EmbeddingBag(1_048_576, 8), nn.Linear(8, 5))
    batch = {"inputs": torch.arange(40).view(8, 5), "targets": torch.zeros(8, dtype=torch.long)}
    before = workload.model[0].weight[:50].detach().clone()
    step(workload, start(workload, point), point, batch)
    assert (workload.model[0].weight[:40] != before[:40]).all()


def test_prepare_for_eval_and_data_selection_pass_on():
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


def test_batch_sizes():
    assert submission.get_batch_size("librispeech_deepspeech") == 224
    for name in ("mnist_resnet", "imagenet", "fastmri_tanh"):
        with pytest.raises(ValueError, match=name):
            submission.get_batch_size(name)
    assert all(size % 8 == 0 for size in submission.BATCH_SIZES.values())


def test_the_five_points_are_the_competitions():
    """Against the published table: lr, betas, weight decay, momentum, grafting, nadam, exponents; the schedule's factors."""
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


def test_a_point_may_choose_what_makes_steps_cheaper():
    workload, chosen = FakeWorkload(), {"solver": "qr", "stagger": True, "precondition_vectors": False, "factor_frequency": 2}
    group = start(workload, as_point(**chosen))["optimizer"].param_groups[0]
    assert {key: group[key] for key in chosen} == chosen


def test_a_point_may_choose_exponents():
    def exponents(**changes):
        return start(FakeWorkload(), as_point(**changes))["optimizer"].param_groups[0]["exponents"]

    assert exponents() is None
    assert exponents(inverse_root=2) == 0.5
    assert list(exponents(exponents=[0.5, 0.0])) == [0.5, 0.0]  # as JSON has it
    assert list(exponents(exponents=[0.5, 0.0], inverse_root=2)) == [0.5, 0.0]


def test_the_schedule_spans_the_step_hint_times_its_factor():
    workload, point = FakeWorkload(), as_point(step_hint_factor=0.5, warmup_factor=0.25)
    scheduler, rates = start(workload, point)["scheduler"], []
    for _ in range(25):
        rates.append(scheduler.get_last_lr()[0] / point.learning_rate)
        scheduler.optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(1e-10)
    assert rates[5] == pytest.approx(1.0)  # int(0.25 x 0.5 x 40) steps of warm-up
    assert rates[20] == pytest.approx(0.0, abs=1e-12)
    assert rates[24] > 0.1  # and up again, as the competition ran it


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
        ({"exponents": [0.5, -0.5]}, r"hyperparameter exponents is \[0.5, -0.5\]; it must be a number >= 0"),
    ],
)
def test_a_bad_point_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        start(FakeWorkload(), as_point(**changes))


@pytest.mark.parametrize(
    ("folder", "cwd", "module"),
    [("submissions/external_tuning/shampoo_submission", ".", "submissions.external_tuning.shampoo_submission.submission"),
     ("somewhere", "somewhere", "submission")],
)  # fmt: skip
def test_it_imports_in_both_ways_with_the_package_beside_it(tmp_path, folder, cwd, module):
    """From the harness's root, where another package named shampoo may be on the path, and from its own folder."""
    target = tmp_path / folder
    target.mkdir(parents=True)
    shutil.copy(ROOT / "submission.py", target)
    shutil.copytree(ROOT / "shampoo", target / "shampoo", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / cwd / "algoperf").mkdir()
    shutil.copy(ROOT / "runner" / "spec.py", tmp_path / cwd / "algoperf" / "spec.py")
    code = f"import {module} as s, sys; print(sys.modules[s.AdamWShampoo.__module__].__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / cwd, capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == target / "shampoo" / "optimizer.py"
