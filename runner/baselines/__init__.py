"""Baseline submissions. Only the optimizer differs from `submission.py`; batch sizes, loss, clipping, and logging are the same.

Each folder holds a submission and a search space of five points: hyperparameters at the method's published values, and learning
rates of 1, 2, 4, 8, and 16 times the published one, because runs of a few hundred steps need higher rates than long ones. The
middle rate comes first. `runner/tuning_search_space.json` is the same kind of space for Shampoo: the competition's first point,
without dropout, with a schedule that ends at zero, roots every 10 steps instead of 100, and blocks of 128 instead of 1024,
whose roots would cost more than a step of these small models. Methods that evaluate or step differently wrap these functions.
"""

from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from shampoo.schedule import warmup_cosine

from ..submissions import load_submission

__all__ = ["data_selection", "get_batch_size", "prepare_for_eval", "update_params", "with_schedule"]

ours = load_submission(str(Path(__file__).parents[2] / "submission.py"))
data_selection, get_batch_size, update_params = ours.data_selection, ours.get_batch_size, ours.update_params


def prepare_for_eval(*, optimizer_state: Any, current_param_container: Any, model_state: Any, **others: Any) -> Any:
    """Return optimizer state, model, and model state unchanged."""
    return optimizer_state, current_param_container, model_state


def with_schedule(optimizer: Optimizer, workload: Any, hyperparameters: Any) -> dict[str, Any]:
    """Return AlgoPerf's optimizer state: the optimizer, with linear warm-up and cosine decay to zero over `step_hint` steps."""
    warmup_steps = int(hyperparameters.warmup_factor * workload.step_hint)
    return {"optimizer": optimizer, "scheduler": warmup_cosine(optimizer, workload.step_hint, warmup_steps)}
