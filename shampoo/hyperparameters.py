"""One point of a search space -> the options of the optimizer, checked."""

from collections.abc import Mapping
from typing import Any

from .grafting import GRAFTING
from .options import BOOL, OPTIONS, Rule, check_value, integer, one_of, real
from .schedule import TAILS

POINT: dict[str, Rule] = {
    "learning_rate": real(0, above=True),
    "one_minus_beta1": real(0, 1, above=True),  # 1: no average of gradients
    "one_minus_beta2": real(0, 1),  # 0: factors are plain sums
    "epsilon": real(0, above=True),
    "weight_decay": real(0),  # decoupled
    "one_minus_momentum": real(0, 1, above=True),  # 1: no momentum
    "nesterov": BOOL,
    "nadam": BOOL,
    "block_size": integer(1),
    "precondition_frequency": integer(1),
    "start_preconditioning_step": integer(0),  # 0: the first multiple of the frequency
    "inverse_root": integer(0),  # 0: 2k for a block of order k; r > 0: A^(-1/r) on every dimension
    "exponent_multiplier": real(0),
    "grafting": one_of(*GRAFTING),
    "grafting_epsilon": real(0),
    "normalized_grafting": BOOL,
    "warmup_factor": real(0, 1),  # share of the schedule's steps
    "step_hint_factor": real(0, above=True),  # the schedule's steps over the workload's step hint
    "schedule_tail": one_of(*TAILS),
    "label_smoothing": real(0, 1, below=True),
    "dropout_rate": real(0, 1, below=True),
}
OPTIONAL: dict[str, Rule] = {
    "grad_clip": real(0, above=True),  # maximum norm of the whole gradient
    "exponents": OPTIONS["exponents"],  # overrides inverse_root
    **{
        name: OPTIONS[name]
        for name in (
            "solver", "qr_tolerance", "relative_eps", "stagger", "factor_frequency", "precondition_vectors", "bf16_roots",
        )
    },
}  # fmt: skip


def check_point(point: Mapping[str, Any]) -> None:
    """Raise ValueError, naming key, value and what is allowed, unless the point has the keys of POINT, all in range."""
    missing, unknown = POINT.keys() - point.keys(), point.keys() - POINT.keys() - OPTIONAL.keys()
    if missing or unknown:
        raise ValueError(
            f"a point of the search space must have the keys {sorted(POINT)} and may have {sorted(OPTIONAL)}; "
            f"missing: {sorted(missing)}, unknown: {sorted(unknown)}"
        )
    for key, value in point.items():
        check_value(f"hyperparameter {key}", value, (POINT | OPTIONAL)[key])


def optimizer_options(point: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of AdamWShampoo at a point. Raises ValueError as `check_point` does."""
    check_point(point)
    same = {name: point[name] for name in OPTIONS.keys() & point.keys()}
    return {
        "lr": point["learning_rate"],
        "betas": (1 - point["one_minus_beta1"], 1 - point["one_minus_beta2"]),
        "eps": point["epsilon"],
        "momentum": 1 - point["one_minus_momentum"],
        "exponents": 1 / point["inverse_root"] if point["inverse_root"] else None,
        "grafting_eps": point["grafting_epsilon"],
        **same,
        "start_preconditioning_step": point["start_preconditioning_step"] or None,
    }
