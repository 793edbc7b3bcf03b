"""Your optimizer as a submission. The example is sign descent: momentum, then a step of the same size for every weight."""

from typing import Any

import torch

from runner.baselines import data_selection, get_batch_size, prepare_for_eval, update_params, with_schedule

__all__ = ["data_selection", "get_batch_size", "init_optimizer_state", "prepare_for_eval", "update_params"]


class YourOptimizer(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float, beta: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """W <- W - lr (sign(M) + weight_decay W) with M <- beta M + (1 - beta) G."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["beta"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(average.sign(), alpha=group["lr"])


def init_optimizer_state(workload: Any, model_params: Any, model_state: Any, hyperparameters: Any, rng: Any) -> dict[str, Any]:
    """Return the optimizer, built from a point of the search space, and its learning rate schedule."""
    h = hyperparameters
    optimizer = YourOptimizer(model_params.parameters(), lr=h.learning_rate, beta=h.beta, weight_decay=h.weight_decay)
    return with_schedule(optimizer, workload, hyperparameters)
