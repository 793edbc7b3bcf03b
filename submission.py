"""AdamW-style Shampoo as an AlgoPerf submission for both tuning rulesets.

AlgoPerf calls the functions below. The optimizer is in `shampoo/`. Hyperparameters come from a search space, such as
`tuning_search_space.json`; the self-tuning ruleset has none, and `self_tuning.json` stands in for it.
"""

import functools
import json
import math
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from absl import flags, logging
from algoperf import spec
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING or not __package__:  # imported as `submission` from this folder
    from shampoo import AdamWShampoo
    from shampoo.averaging import AveragedWeights
    from shampoo.hyperparameters import optimizer_options
    from shampoo.roots import full_precision
    from shampoo.schedule import SCHEDULES
else:  # imported as `submissions.external_tuning.NAME.submission` from AlgoPerf's root
    from .shampoo import AdamWShampoo
    from .shampoo.averaging import AveragedWeights
    from .shampoo.hyperparameters import optimizer_options
    from .shampoo.roots import full_precision
    from .shampoo.schedule import SCHEDULES

BATCH_SIZES = {  # as published
    "criteo1tb": 262_144,
    "fastmri": 32,
    "imagenet_resnet": 1024,
    "imagenet_resnet_silu": 512,
    "imagenet_resnet_gelu": 512,
    "imagenet_vit": 1024,
    "librispeech_conformer": 200,
    "librispeech_deepspeech": 224,
    "ogbg": 512,
    "wmt": 128,
    "finewebedu_lm": 64,
    "mnist": 16,
}
LOGGING_PERIOD = 50  # steps; reading the loss synchronizes with the device


class Shampoo(AdamWShampoo):
    """AdamWShampoo whose `state_dict()` does not wait for other ranks if their state was not gathered.

    AlgoPerf calls it on rank 0 alone. `prepare_for_eval` gathers the state, but does not run with --skip_evals.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return AdamWShampoo's state dict, or {"not_resumable": reason} if the state of other ranks was not gathered."""
        if self.gathered:
            return super().state_dict()
        reason = "the state of other ranks was not gathered"
        logging.error(f"this checkpoint cannot be resumed from: {reason}")
        return {"not_resumable": reason}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load AdamWShampoo's state dict. Raise ValueError if it was saved without the state of other ranks.

        All ranks' state is gathered at once: AlgoPerf saves a trial that had ended again, without `prepare_for_eval`.
        """
        if "not_resumable" in state_dict:
            raise ValueError(f"this checkpoint cannot be resumed from: {state_dict['not_resumable']}")
        super().load_state_dict(state_dict)
        self.consolidate_state_dict()


def get_batch_size(workload_name: str) -> int:
    """Return the global batch size. Raise ValueError for an unknown name; AlgoPerf then asks for the base workload's."""
    if workload_name not in BATCH_SIZES:
        raise ValueError(f"no batch size for the workload {workload_name!r}; it must be one of {', '.join(BATCH_SIZES)}")
    return BATCH_SIZES[workload_name]


@functools.cache
def self_tuning_point() -> spec.Hyperparameters:
    """Return the only point of `self_tuning.json`. Raise ValueError if the file is missing or invalid."""
    file = Path(__file__).with_name("self_tuning.json")
    try:
        (point,) = json.loads(file.read_text())
        return namedtuple("Hyperparameters", point)(**point)
    except (OSError, ValueError, TypeError) as error:
        needed = "it must hold the point that stands in for missing hyperparameters: copy it there, or give a search space"
        raise ValueError(f"{file} cannot be read; {needed}: {error}") from error


def init_optimizer_state(
    workload: spec.Workload,
    model_params: spec.ParameterContainer,
    model_state: spec.ModelAuxiliaryState,
    hyperparameters: spec.Hyperparameters,
    rng: spec.RandomState,
) -> spec.OptimizerState:
    """Return the optimizer, its learning rate schedule, and averages of the weights if the hyperparameter `averaging` is on.

    If there is a hyperparameter `learning_rate_steps`, the learning rate is for a schedule of that many steps, and proportional
    to 1 / sqrt(steps) for others, as in convergence analyses: one point then serves runs of any length.

    Raise ValueError for an invalid or missing hyperparameter.
    """
    hyperparameters = hyperparameters or self_tuning_point()
    options = optimizer_options(hyperparameters._asdict())
    num_steps = hyperparameters.step_hint_factor * workload.step_hint
    options["lr"] *= math.sqrt(getattr(hyperparameters, "learning_rate_steps", num_steps) / num_steps)
    optimizer = Shampoo(model_params.parameters(), **options)
    warmup_steps = int(hyperparameters.warmup_factor * num_steps)
    shape = getattr(hyperparameters, "schedule", "cosine")
    tail = {"tail": hyperparameters.schedule_tail} if shape == "cosine" else {}
    state = {"optimizer": optimizer, "scheduler": SCHEDULES[shape](optimizer, num_steps, warmup_steps, **tail)}
    if getattr(hyperparameters, "averaging", False):
        state["averages"] = AveragedWeights(model_params)
    return state


def update_params(
    workload: spec.Workload,
    current_param_container: spec.ParameterContainer,
    current_params_types: spec.ParameterTypeTree,
    model_state: spec.ModelAuxiliaryState,
    hyperparameters: spec.Hyperparameters,
    batch: dict[str, Tensor],
    loss_type: spec.LossType,
    optimizer_state: spec.OptimizerState,
    eval_results: list[tuple[int, float]],
    global_step: int,
    rng: spec.RandomState,
    train_state: dict[str, Any] | None = None,
) -> spec.UpdateReturn:
    """Compute the loss and gradients of the batch, and update the weights. Raise TrainingCompleteError like `take_step`."""
    hyperparameters = hyperparameters or self_tuning_point()
    model, optimizer, scheduler = current_param_container, optimizer_state["optimizer"], optimizer_state["scheduler"]
    if "averages" in optimizer_state:
        optimizer_state["averages"].train()
    model.train()
    optimizer.zero_grad(set_to_none=True)
    local_loss, loss, model_state = compute_loss(workload, model, model_state, hyperparameters, batch, rng)
    local_loss.backward()
    average_gradients(model)

    log = workload.metrics_logger is not None and global_step % LOGGING_PERIOD == 0
    grad_clip = getattr(hyperparameters, "grad_clip", None)
    if grad_clip is not None:
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    elif log:
        grad_norm = gradient_norm(model)
    if log:
        metrics = {"loss": loss.item(), "grad_norm": grad_norm.item(), "learning_rate": scheduler.get_last_lr()[0]}
        workload.metrics_logger.append_scalar_metrics(metrics, global_step)
    take_step(optimizer, global_step)
    scheduler.step()
    if "averages" in optimizer_state:
        optimizer_state["averages"].update()
    return optimizer_state, model, model_state


def prepare_for_eval(
    workload: spec.Workload,
    current_param_container: spec.ParameterContainer,
    current_params_types: spec.ParameterTypeTree,
    model_state: spec.ModelAuxiliaryState,
    hyperparameters: spec.Hyperparameters,
    loss_type: spec.LossType,
    optimizer_state: spec.OptimizerState,
    eval_results: list[tuple[int, float]],
    global_step: int,
    rng: spec.RandomState,
) -> spec.UpdateReturn:
    """Put averages of the weights in their place if there are any, and gather the state of all ranks on rank 0 if a checkpoint
    follows. It then holds the averages as the model, and the trained weights in the state, which `update_params` puts back.
    """
    if "averages" in optimizer_state:
        optimizer_state["averages"].eval()
    if saves_checkpoints():
        optimizer_state["optimizer"].consolidate_state_dict()
    return optimizer_state, current_param_container, model_state


def data_selection(
    workload: spec.Workload,
    input_queue: Iterator[dict[str, Tensor]],
    optimizer_state: spec.OptimizerState,
    current_param_container: spec.ParameterContainer,
    model_state: spec.ModelAuxiliaryState,
    hyperparameters: spec.Hyperparameters,
    global_step: int,
    rng: spec.RandomState,
) -> dict[str, Tensor]:
    """Return the next batch of the queue."""
    return next(input_queue)


def compute_loss(
    workload: spec.Workload,
    model: spec.ParameterContainer,
    model_state: spec.ModelAuxiliaryState,
    hyperparameters: spec.Hyperparameters,
    batch: dict[str, Tensor],
    rng: spec.RandomState,
) -> tuple[Tensor, Tensor, spec.ModelAuxiliaryState]:
    """Return the `global_loss` of a batch of this rank, and the model's new auxiliary state."""
    logits, model_state = workload.model_fn(
        params=model,
        augmented_and_preprocessed_input_batch=batch,
        model_state=model_state,
        mode=spec.ForwardPassMode.TRAIN,
        rng=rng,
        update_batch_norm=True,
        dropout_rate=hyperparameters.dropout_rate,
    )
    losses = workload.loss_fn(
        label_batch=batch["targets"],
        logits_batch=logits,
        mask_batch=batch.get("weights"),
        label_smoothing=hyperparameters.label_smoothing,
    )
    return *global_loss(losses["summed"], losses["n_valid_examples"]), model_state


def global_loss(summed: Tensor, count: Tensor | int) -> tuple[Tensor, Tensor]:
    """Return the loss to differentiate on this rank, and the mean loss over the valid examples of the global batch.

    With sums over ranks, the mean loss is sum(summed) / sum(count). The loss to differentiate is summed * ranks / sum(count),
    because DDP averages gradients over ranks.
    """
    totals = torch.stack([summed.detach().float(), torch.as_tensor(count, dtype=torch.float32, device=summed.device)])
    ranks = 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(totals)
        ranks = dist.get_world_size()
    return summed * ranks / totals[1], totals[0] / totals[1]


def take_step(optimizer: Shampoo, global_step: int) -> None:
    """Take an optimizer step, in full precision where AlgoPerf allows TF32. Raise TrainingCompleteError after too many
    consecutive steps with NaN or Inf in the gradients; it ends this trial cleanly, and other trials still run.
    """
    try:
        with full_precision():
            optimizer.step()
    except FloatingPointError as error:
        logging.error(f"training ends at step {global_step}: {error}")
        raise spec.TrainingCompleteError from error


def average_gradients(model: torch.nn.Module) -> None:
    """Average gradients over ranks unless DDP has done so: AlgoPerf does not wrap the model again when it resumes."""
    if not dist.is_initialized() or any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads]) / dist.get_world_size()
    dist.all_reduce(flat)
    means = [part.view(grad.shape) for part, grad in zip(flat.split([grad.numel() for grad in grads]), grads, strict=True)]
    torch._foreach_copy_(grads, means)


def saves_checkpoints() -> bool:
    """Return the value of the runner's --save_checkpoints flag, or True if the flag is not defined."""
    return bool(flags.FLAGS["save_checkpoints"].value) if "save_checkpoints" in flags.FLAGS else True


def gradient_norm(model: torch.nn.Module) -> Tensor:
    """Return the L2 norm of all gradients together, a 0-d tensor."""
    norms = torch._foreach_norm([p.grad for p in model.parameters() if p.grad is not None])
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm
