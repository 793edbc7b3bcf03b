"""Check one point of a search space, and convert it to the options of AdamWShampoo."""

from collections.abc import Mapping
from typing import Any

from .options import OPTIONS
from .roots import QR_TOLERANCE
from .rules import BOOL, Rule, check_value, integer, one_of, real
from .schedule import SCHEDULES, TAILS

# Keys that are options of the optimizer with the same rule. `exponents`, which a point may have too, overrides inverse_root.
SAME = (
    "weight_decay", "nesterov", "nadam", "block_size", "precondition_frequency", "exponent_multiplier", "grafting",
    "normalized_grafting",
)  # fmt: skip
COMPETITION: dict[str, Any] = {  # options that the competition's points leave out, at the values that they had there
    "decoupled_weight_decay": True, "cautious_decay": False, "maximize": False, "bias_correction": True, "merge_dims": True,
    "max_dim": 1_000_000, "factor_frequency": 1, "preconditioner": "shampoo", "covariance": "gram", "max_factor_ratio": None,
    "grafting_beta2": None, "unfactored_beta2": None, "relative_eps": False, "solver": "eigh", "qr_tolerance": QR_TOLERANCE,
    "stagger": False, "precondition_vectors": True, "bf16_roots": False,
}  # fmt: skip

POINT: dict[str, Rule] = {
    "learning_rate": real(0, above=True),
    "one_minus_beta1": real(0, 1, above=True),  # beta1 = betas[0]; 1: do not average gradients
    "one_minus_beta2": real(0, 1),  # beta2 = betas[1]; 0: factors are plain sums
    "epsilon": real(0, above=True),
    "one_minus_momentum": real(0, 1, above=True),  # 1: no momentum
    "start_preconditioning_step": integer(0),  # 0: precondition_frequency
    "inverse_root": integer(0),  # r: exponent 1/r for every dimension; 0: 1/(2k) for a block of order k
    "grafting_epsilon": real(0),
    "warmup_factor": real(0, 1),  # fraction of the schedule's steps
    "step_hint_factor": real(0, above=True),  # number of the schedule's steps over the workload's step hint
    "schedule_tail": one_of(*TAILS),  # of a cosine
    "label_smoothing": real(0, 1, below=True),
    "dropout_rate": real(0, 1, below=True),
    **{name: OPTIONS[name] for name in SAME},
}
OPTIONAL: dict[str, Rule] = {
    "learning_rate_steps": integer(1),  # number of steps that learning_rate is for; see submission.py
    "grad_clip": real(0, above=True),  # maximum norm of all gradients together
    "schedule": one_of(*SCHEDULES),  # "cosine" by default
    "averaging": BOOL,  # whether evaluations see averages of the weights; False by default
    **{name: OPTIONS[name] for name in ("exponents", *COMPETITION)},
}


def check_point(point: Mapping[str, Any]) -> None:
    """Raise ValueError unless the point has all keys of POINT, none but those and OPTIONAL's, and every value is allowed."""
    missing, unknown = POINT.keys() - point.keys(), point.keys() - POINT.keys() - OPTIONAL.keys()
    if missing or unknown:
        allowed = f"must have the keys {sorted(POINT)} and may have {sorted(OPTIONAL)}"
        raise ValueError(f"a point of the search space {allowed}; missing: {sorted(missing)}, unknown: {sorted(unknown)}")
    for key, value in point.items():
        check_value(f"hyperparameter {key}", value, (POINT | OPTIONAL)[key])


def optimizer_options(point: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of AdamWShampoo for a point, whatever their defaults. Raises ValueError as `check_point` does."""
    check_point(point)
    return {
        **COMPETITION,
        "lr": point["learning_rate"],
        "betas": (1 - point["one_minus_beta1"], 1 - point["one_minus_beta2"]),
        "eps": point["epsilon"],
        "momentum": 1 - point["one_minus_momentum"],
        "exponents": 1 / point["inverse_root"] if point["inverse_root"] else None,
        "grafting_eps": point["grafting_epsilon"],
        **{name: point[name] for name in OPTIONS.keys() & point.keys()},
        "start_preconditioning_step": point["start_preconditioning_step"] or None,
    }
