"""A workload with random data and AlgoPerf's signatures, and calls of the submission as AlgoPerf makes them."""

import runner  # noqa: F401  makes algoperf.spec importable

# isort: split

import collections
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from algoperf import spec
from torch import nn

import submission

POINTS = json.loads((Path(__file__).parents[1] / "tuning_search_space.json").read_text())


def as_point(**changes):
    """Return the first point with changes; `...` removes a hyperparameter."""
    values = {**POINTS[0], **changes}
    values = {key: value for key, value in values.items() if value is not ...}
    return collections.namedtuple("Hyperparameters", values)(**values)


class FakeWorkload:
    """Random examples for each loss type; the last two examples of a batch are padding."""

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
    """Return the submission's optimizer state."""
    return submission.init_optimizer_state(workload, workload.model if model is None else model, None, point, [0, 0])


def step(workload, state, point, batch, global_step=0, model=None, **extra):
    """Call the submission's `update_params`."""
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


def evaluate(workload, state, point):
    """Call the submission's `prepare_for_eval`."""
    submission.prepare_for_eval(workload, workload.model, {}, None, point, workload.loss_type, state, [], 1, [0, 0])
