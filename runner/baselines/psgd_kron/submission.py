"""PSGD with Kronecker factors (Li 2015, arXiv 1512.04202): PSGDKron of heavyball 3.2.1, at its defaults.

The preconditioner is fitted at every step for 1,000 steps, then ever more rarely.
"""

import copy
from typing import Any

import torch

from runner import baselines
from runner.baselines import data_selection, get_batch_size, prepare_for_eval, with_schedule
from runner.baselines.eager_heavyball import heavyball

__all__ = ["data_selection", "get_batch_size", "init_optimizer_state", "prepare_for_eval", "update_params"]


class PSGDKron(heavyball.PSGDKron):  # type: ignore[misc]
    """heavyball's optimizer, resumed with the same bits: torch rounds state to the weights' type, and some of it is float64."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state without rounding it."""
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        self.state.update({params[i]: copy.deepcopy(state) for i, state in state_dict["state"].items()})


def init_optimizer_state(workload: Any, model_params: Any, model_state: Any, hyperparameters: Any, rng: Any) -> dict[str, Any]:
    """Return the optimizer and its learning rate schedule."""
    h = hyperparameters
    options = {"lr": h.learning_rate, "beta": h.beta1, "weight_decay": h.weight_decay}
    optimizer = PSGDKron(model_params.parameters(), **options)
    return with_schedule(optimizer, workload, hyperparameters)


def update_params(*, rng: Any, **others: Any) -> Any:
    """Take a step. The probes of the preconditioner are drawn from `rng`, so that a resumed run draws the same ones."""
    torch.manual_seed(int(rng[0]))
    return baselines.update_params(rng=rng, **others)
