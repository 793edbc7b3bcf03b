"""Submissions to compare with. All but the optimizer is our submission's: batches, loss, clipping, logging.

Each folder holds a submission and its search space of five points: everything at its method's published value, but the learning
rate at 1, 2, 4, 8 and 16 times that, for runs of some hundred steps want more than long ones; the middle of the ladder comes
first. Ours has such a space too, `runner/tuning_search_space.json`: the competition's first point, without dropout, with a
schedule that ends at zero, roots every 10 steps in place of 100, and blocks of 128 in place of 1024, whose roots would cost
more than these small models' steps. A method with its own way to evaluate or to step wraps the functions here.
"""

from typing import Any

from torch.optim import Optimizer

from shampoo.schedule import warmup_cosine
from submission import data_selection, get_batch_size, update_params

__all__ = ["data_selection", "get_batch_size", "prepare_for_eval", "update_params", "with_schedule"]


def prepare_for_eval(*, optimizer_state: Any, current_param_container: Any, model_state: Any, **others: Any) -> Any:
    """Nothing to prepare."""
    return optimizer_state, current_param_container, model_state


def with_schedule(optimizer: Optimizer, workload: Any, hyperparameters: Any) -> dict[str, Any]:
    """AlgoPerf's optimizer state: the optimizer, and linear warm-up and cosine to zero over the workload's step hint."""
    warmup_steps = int(hyperparameters.warmup_factor * workload.step_hint)
    return {"optimizer": optimizer, "scheduler": warmup_cosine(optimizer, workload.step_hint, warmup_steps)}
