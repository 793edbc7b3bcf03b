"""Search spaces: a list of points, or a range per hyperparameter."""

import collections
import json
import math
import sys
from pathlib import Path
from typing import Any

from scipy.stats import qmc

from .files import read_text


def load_space(path: str | Path) -> Any:
    """Return the content of a search space's file. Raise ValueError if it cannot be read."""
    try:
        return parse(read_text(Path(path)))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"the search space {path} cannot be read: {error}") from error


def read_points(path: str | Path, num_trials: int, seed: int) -> list[Any]:
    """Return points of a search space as namedtuples: the first `num_trials` points of a list, or `num_trials` samples from
    ranges.

    A space of ranges maps each name to {"feasible_points": [...]} or {"min": a, "max": b, "scaling": "linear" or "log"}. It is
    sampled with scipy's scrambled Halton sequence. Raise ValueError for a file that is not a valid search space, or a list of
    fewer points.
    """
    space = load_space(path)
    if isinstance(space, list) and space and all(isinstance(point, dict) for point in space):
        if len(space) < num_trials:
            fewer = "ask for fewer (the runner's --num_tuning_trials), or add points"
            raise ValueError(f"{path} has {len(space)} points for {num_trials} trials; {fewer}")
        points = space[:num_trials]
        for i, point in enumerate(points):
            if point.keys() != points[0].keys():
                differing = sorted(point.keys() ^ points[0].keys())
                raise ValueError(f"{path}: point {i + 1} must have the keys of point 1; they differ in {differing}")
    elif isinstance(space, dict) and space:
        samples = qmc.Halton(len(space), scramble=True, seed=seed).random(num_trials)
        points = [{name: sample(path, name, space[name], x) for name, x in zip(space, row, strict=True)} for row in samples]
    else:
        raise ValueError(f"{path} must hold a list of points, or an object with a range for each hyperparameter")
    try:
        point_type = collections.namedtuple("Hyperparameters", points[0])  # type: ignore[misc]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return [point_type(**point) for point in points]


def parse(text: str) -> Any:
    """Return the content of JSON text. Raise ValueError for repeated keys, and for numbers that are not finite."""

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{number} is not a finite number")
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if repeated := [name for name, count in collections.Counter(name for name, _ in pairs).items() if count > 1]:
            raise ValueError(f"the keys {repeated} are there more than once")
        return dict(pairs)

    return json.loads(text, parse_float=finite, parse_constant=finite, object_pairs_hook=unique)


def is_number(x: Any) -> bool:
    """Return True for a number that fits into a float."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) <= sys.float_info.max


def sample(path: str | Path, name: str, space: Any, x: float) -> Any:
    """Map x in [0, 1) to a value of the hyperparameter `name`. Raise ValueError for an invalid range."""
    if isinstance(space, dict) and space.keys() == {"feasible_points"} and isinstance(space["feasible_points"], list):
        if values := space["feasible_points"]:
            return values[int(x * len(values))]
    elif isinstance(space, dict) and space.keys() == {"min", "max", "scaling"}:
        low, high, scaling = space["min"], space["max"], space["scaling"]
        if is_number(low) and is_number(high) and low <= high:
            if scaling == "linear":
                return float(low + x * (high - low))
            if scaling == "log" and low > 0:
                return float(low * math.exp(x * math.log(high / low)))
    raise ValueError(
        f'{path}: {name} is {space!r}; it must be {{"feasible_points": [...]}} with at least one point, or '
        '{"min": a, "max": b, "scaling": s} with numbers a <= b, where s is "linear", or "log" if a > 0'
    )
