"""On paper: what a cheaper optimizer step would have changed: `python -m experiments.competition.projection`.

Nothing here was run on a GPU. Of version 0.5's published seconds to target T of Shampoo, n steps of s seconds each were
training steps. If the optimizer's share of a step is f, and our step takes r times theirs, the same n steps would take
T - n s f (1 - r) seconds. Printed for f = 0.05, 0.1, 0.2 and r = 0.3 to 1, with the score of these times in the
group of eleven; and the score with Shampoo's fastest and slowest study in the place of the median: how much luck decides.
"""

from typing import Any

import numpy as np
import pandas as pd
from absl import app

from runner.score import performance_profile, with_held_out
from runner.score import scores as score

from .published import HELD_OUT, SHAMPOO, best_trials, times

VERSION = "0.5"
SHARES = (0.05, 0.10, 0.20)
RATIOS = (0.3, 0.5, 0.7, 1.0)


def medians() -> pd.DataFrame:
    """For each workload Shampoo's published seconds, and steps and seconds per step: medians over the studies' best trials."""
    best = best_trials(VERSION).query("submission == 'shampoo'").groupby("workload")
    table = best[["steps_to_target", "median_step_sec"]].median()
    table.columns = ["steps", "seconds per step"]
    table.insert(0, "seconds", times(VERSION).loc[SHAMPOO[VERSION]])
    return table


def projected(share: float, ratio: float) -> pd.Series:
    """Seconds to target on each workload; a miss stays a miss."""
    table = medians()
    saved = table["steps"] * table["seconds per step"] * share * (1 - ratio)
    return (table["seconds"] - saved).where(np.isfinite(table["seconds"]), np.inf)


def score_with(seconds: pd.Series) -> float:
    """The score of Shampoo in the group of eleven, with these times."""
    group = times(VERSION)
    group.loc[SHAMPOO[VERSION], seconds.index] = seconds
    return float(score(performance_profile(with_held_out(group, HELD_OUT[VERSION])))[SHAMPOO[VERSION]])


def extremes() -> dict[str, float]:
    """The score with the fastest, the median and the slowest study of Shampoo on every workload."""
    studies = best_trials(VERSION).query("submission == 'shampoo'").groupby("workload")["time_to_target_sec"]
    chosen = {"fastest": studies.min(), "median": studies.median(), "slowest": studies.max()}
    return {name: score_with(seconds) for name, seconds in chosen.items()}


def main(_: Any) -> None:
    """Print the tables."""
    print("A projection on paper: no figure of a GPU, no run.\n")
    columns = {f"{share:.0%}, {ratio}": projected(share, ratio) for share in SHARES for ratio in RATIOS[:-1]}
    table = medians().join(pd.DataFrame(columns))
    print("Seconds to target: published, and with an optimizer share of ..., and our step ... times theirs")
    print(table.round({"seconds per step": 3}).to_string(float_format="{:.5g}".format, na_rep="-"))
    grid = pd.DataFrame({ratio: {share: score_with(projected(share, ratio)) for share in SHARES} for ratio in RATIOS})
    print(f"\nScore in the group of eleven (rows: share, columns: ratio)\n{grid.round(4).to_string()}")
    print("\nScore with Shampoo's fastest, median and slowest study on every workload:")
    print(", ".join(f"{name} {value:.4f}" for name, value in extremes().items()))
    print("Times are also seen only at evaluations, whose period is 1 to 3 % of the budgets.")


if __name__ == "__main__":
    app.run(main)
