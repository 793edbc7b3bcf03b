"""Project what a cheaper optimizer step would have changed: `python -m experiments.competition.projection`.

Nothing here was run on a GPU. In version 0.5, Shampoo's published seconds to target T include n training steps of s seconds
each. If the optimizer takes a fraction f of a step, and our optimizer step takes r times theirs, the same n steps would bring T
down to T - n s f (1 - r). Print these times and the resulting scores among the eleven submissions for f = 0.05, 0.1, 0.2 and
r = 0.3 to 1. To show the effect of luck, also print the score with Shampoo's fastest and slowest study instead of the
median.
"""

from typing import Any

import numpy as np
import pandas as pd
from absl import app

from runner.score import performance_profile, with_held_out
from runner.score import scores as score

from .published import SHAMPOO, VERSIONS, best_trials, times

VERSION = "0.5"
SHARES = (0.05, 0.10, 0.20)
RATIOS = (0.3, 0.5, 0.7, 1.0)


def medians() -> pd.DataFrame:
    """Return Shampoo's published seconds to target, steps, and seconds per step of each workload, medians over studies."""
    best = best_trials(VERSION).query("submission == 'shampoo'").groupby("workload")
    table = best[["steps_to_target", "median_step_sec"]].median()
    table.columns = ["steps", "seconds per step"]
    table.insert(0, "seconds", times(VERSION).loc[SHAMPOO[VERSION]])
    return table


def projected(share: float, ratio: float) -> pd.Series:
    """Return the projected seconds to target of each workload; a miss stays a miss."""
    table = medians()
    saved = table["steps"] * table["seconds per step"] * share * (1 - ratio)
    return (table["seconds"] - saved).where(np.isfinite(table["seconds"]), np.inf)


def score_with(seconds: pd.Series) -> float:
    """Return Shampoo's score among the eleven submissions if its times were `seconds`."""
    table = times(VERSION)
    table.loc[SHAMPOO[VERSION], seconds.index] = seconds
    return float(score(performance_profile(with_held_out(table, VERSIONS[VERSION].held_out)))[SHAMPOO[VERSION]])


def extremes() -> dict[str, float]:
    """Return the score with Shampoo's fastest, median, and slowest study on every workload."""
    studies = best_trials(VERSION).query("submission == 'shampoo'").groupby("workload")["time_to_target_sec"]
    chosen = {"fastest": studies.min(), "median": studies.median(), "slowest": studies.max()}
    return {name: score_with(seconds) for name, seconds in chosen.items()}


def main(_: Any) -> None:
    """Print the tables."""
    print("A projection from published times; nothing was run on a GPU.\n")
    columns = {f"{share:.0%}, {ratio}": projected(share, ratio) for share in SHARES for ratio in RATIOS[:-1]}
    table = medians().join(pd.DataFrame(columns))
    print("Seconds to target: published, and for each optimizer share f and ratio r of our step time to theirs")
    print(table.round({"seconds per step": 3}).to_string(float_format="{:.5g}".format, na_rep="-"))
    grid = pd.DataFrame({ratio: {share: score_with(projected(share, ratio)) for share in SHARES} for ratio in RATIOS})
    print(f"\nScore among eleven submissions (rows: f, columns: r)\n{grid.round(4).to_string()}")
    print("\nScore with Shampoo's fastest, median, and slowest study on every workload:")
    print(", ".join(f"{name} {value:.4f}" for name, value in extremes().items()))
    print("In addition, times are only measured at evaluations, which are 1 to 3 % of the budgets apart.")


if __name__ == "__main__":
    app.run(main)
