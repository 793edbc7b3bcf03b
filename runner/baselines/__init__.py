"""Baseline submissions. Only the optimizer differs from `submission.py`; batch sizes, loss, clipping, and logging are the same.

Each folder holds a submission and a search space of five points. They differ in the learning rate and the horizon: the number
of steps after which the schedule ends, in step hints. With l four times the method's published learning rate, because runs of a
few hundred steps need higher rates than long ones, they are (l, 1), (2l, 1), (l/2, 1), (4l, 1), and (2l, 0.6); for Muon l is
eight times as high, since 4l was best on most workloads. The other hyperparameters are at their published values.

| | published rate | source |
|---|---|---|
| `adamw` | 0.001 | torch's default |
| `nadamw`, `nadamw_averaged` | 0.002 | torch's default |
| `muon`, `muon_conv` | 0.001 | the code of Liu et al. |
| `soap`, `soap_averaged`, `soap_lookahead`, `kl_soap` | 0.003 | the authors' code |
| `psgd_kron` | 0.001 | heavyball's default |
| `schedule_free_adamw` | 0.0025 | the package's default; no horizon, so l, l/2, 2l, l/4, and 4l instead |

`runner/tuning_search_space.json` is the same kind of space for Shampoo: the competition's first point, without dropout, with a
schedule that ends at zero, roots every 10 steps instead of 100, and blocks of 128 instead of 1024, whose roots would cost more
than a step of these small models. Methods that evaluate or step differently wrap these functions.
"""

from collections.abc import Callable
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


def with_schedule(
    optimizer: Optimizer, workload: Any, hyperparameters: Any, schedule: Callable[..., Any] = warmup_cosine
) -> dict[str, Any]:
    """Return AlgoPerf's optimizer state: the optimizer, and a schedule that warms up and ends at zero after
    `step_hint_factor` times `step_hint` steps.
    """
    num_steps = hyperparameters.step_hint_factor * workload.step_hint
    warmup_steps = int(hyperparameters.warmup_factor * num_steps)
    return {"optimizer": optimizer, "scheduler": schedule(optimizer, num_steps, warmup_steps)}
