"""The methods that the experiments on orders and ranks compare, all with averages 1 - theta = 1 - beta = K^(-1/2)."""

from typing import Any

import torch

from .problems import make_optimizer, paper_shampoo

OPTIONS: dict[str, dict[str, Any]] = {  # beyond the paper's settings
    "1/4, 1/4": {"exponents": (0.25, 0.25)},
    "1/2, 0": {"exponents": (0.5, 0.0)},
    "0, 1/2": {"exponents": (0.0, 0.5)},
    "1/2, 1/2": {"exponents": (0.5, 0.5)},
    "1, 1": {"exponents": (1.0, 1.0)},
    "KL": {"exponents": (0.5, 0.5), "covariance": "kl", "bias_correction": True},  # its first factors decide its scale
    "SOAP": {"preconditioner": "soap", "grafting": "adam", "solver": "qr"},
}


def make(method: str, X: list[torch.nn.Parameter], lr: float, K: int) -> torch.optim.Optimizer:
    """Return an optimizer with averages 1 - theta = 1 - beta = K^(-1/2), SGD and Muon with the same average of gradients."""
    theta = 1 - K**-0.5
    if method == "SGD":
        optimizer = torch.optim.SGD(X, lr, momentum=theta, dampening=theta)
        for x in X:  # otherwise, it starts as the first gradient, which then has the weight of sqrt(K) others
            optimizer.state[x]["momentum_buffer"] = torch.zeros_like(x)
        return optimizer
    if method == "Muon":
        return torch.optim.Muon(X, lr, weight_decay=0.0, momentum=theta, nesterov=False)
    if method == "AdamW":
        return make_optimizer(method, X, lr, K)
    return paper_shampoo(X, lr, K, **OPTIONS[method])
