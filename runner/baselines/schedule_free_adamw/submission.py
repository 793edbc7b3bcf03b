"""Schedule-Free AdamW (Defazio et al. 2024): an average of the weights replaces the learning rate schedule.

Gradients are computed at weights y, and the average x is evaluated; the optimizer's train() and eval() switch between them.
Hyperparameters are the package's defaults, except warm-up and weight decay, which are off by default and are set here as for
AdamW. Learning rates are higher than AdamW's: the authors recommend 1 to 10 times the rate of a method with a schedule.

Batch norm's running statistics are those at y. The authors recommend a few forward passes at x before each evaluation, but
`prepare_for_eval` has no batches for them, and the authors' own AlgoPerf submission skips them too. On models with batch norm
the method is therefore weaker than it could be. The logged learning rate does not include warm-up.
"""

from typing import Any

from schedulefree import AdamWScheduleFree
from torch.optim.lr_scheduler import ConstantLR

from runner import baselines
from runner.baselines import data_selection, get_batch_size

__all__ = ["data_selection", "get_batch_size", "init_optimizer_state", "prepare_for_eval", "update_params"]


def init_optimizer_state(workload: Any, model_params: Any, model_state: Any, hyperparameters: Any, rng: Any) -> dict[str, Any]:
    """Return the optimizer and a constant learning rate schedule."""
    h = hyperparameters
    options = {"lr": h.learning_rate, "betas": (h.beta1, h.beta2), "weight_decay": h.weight_decay}
    warmup_steps = int(h.warmup_factor * workload.step_hint)
    optimizer = AdamWScheduleFree(model_params.parameters(), **options, warmup_steps=warmup_steps)
    return {"optimizer": optimizer, "scheduler": ConstantLR(optimizer, factor=1.0)}


def update_params(*, optimizer_state: dict[str, Any], **others: Any) -> Any:
    """Switch the weights to y, which an evaluation left at x, and take a step."""
    optimizer_state["optimizer"].train()
    return baselines.update_params(optimizer_state=optimizer_state, **others)


def prepare_for_eval(*, optimizer_state: dict[str, Any], **others: Any) -> Any:
    """Switch the weights to x. Checkpoints are written after this, so they hold x."""
    optimizer_state["optimizer"].eval()
    return baselines.prepare_for_eval(optimizer_state=optimizer_state, **others)
