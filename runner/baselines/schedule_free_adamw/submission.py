"""Schedule-Free AdamW (Defazio et al. 2024): an average of the weights takes the place of the schedule.

Gradients are taken at weights y, and the average x is evaluated; the optimizer's train() and eval() turn one into the other.
The values are the package's defaults, with warm-up and decay, which are off by default there, as in AdamW's search space. The
rates are higher than AdamW's: the authors advise one to ten times those of a method with a schedule.

The running statistics of batch norm are those of y. The authors advise some forward passes at x before each evaluation;
AlgoPerf's `prepare_for_eval` has no batches for them, and the authors' own AlgoPerf submission went without. So the method is
weaker than it could be on models with batch norm. The logged learning rate is that after warm-up.
"""

from typing import Any

from schedulefree import AdamWScheduleFree
from torch.optim.lr_scheduler import ConstantLR

from runner import baselines
from runner.baselines import data_selection, get_batch_size

__all__ = ["data_selection", "get_batch_size", "init_optimizer_state", "prepare_for_eval", "update_params"]


def init_optimizer_state(workload: Any, model_params: Any, model_state: Any, hyperparameters: Any, rng: Any) -> dict[str, Any]:
    """The optimizer, and a schedule that leaves the learning rate as it is."""
    h = hyperparameters
    options = {"lr": h.learning_rate, "betas": (h.beta1, h.beta2), "weight_decay": h.weight_decay}
    warmup_steps = int(h.warmup_factor * workload.step_hint)
    optimizer = AdamWScheduleFree(model_params.parameters(), **options, warmup_steps=warmup_steps)
    return {"optimizer": optimizer, "scheduler": ConstantLR(optimizer, factor=1.0)}


def update_params(*, optimizer_state: dict[str, Any], **others: Any) -> Any:
    """A step from y, where the weights are x if an evaluation came before."""
    optimizer_state["optimizer"].train()
    return baselines.update_params(optimizer_state=optimizer_state, **others)


def prepare_for_eval(*, optimizer_state: dict[str, Any], **others: Any) -> Any:
    """The weights become x. Checkpoints are written after this, and so hold x."""
    optimizer_state["optimizer"].eval()
    return baselines.prepare_for_eval(optimizer_state=optimizer_state, **others)
