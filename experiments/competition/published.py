"""Evaluate the published results of the competition: `python -m experiments.competition.published --output_dir=DIR`.

Write a page with figures, for versions 0.5 and 0.6: the scores, from the published times to target of all submissions, and the
best trial of each study of Shampoo and the baseline, with its point, steps, and seconds per step. Seconds and steps are from
AlgoPerf's logs (mlcommons/submissions_algorithms).
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from absl import app, flags

from runner.plots import colors, plot_profile
from runner.score import Comparison, compare
from runner.times import BENCHMARKS, parse_benchmark, read_times

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FLAGS = flags.FLAGS

HERE = Path(__file__).parent
VERSIONS = {version: parse_benchmark(BENCHMARKS[version]) for version in ("0.5", "0.6")}
SHAMPOO = {"0.5": "shampoo_submission", "0.6": "shampoo"}

COMMANDS = """\
One command computes the scores of a version from these times, and another one from the evaluation logs themselves, which are in
mlcommons/submissions_algorithms (previous_leaderboards/algoperf_v05/logs/external_tuning) and not in this project:
```
python -m runner.score --benchmark=0.5 --output_dir=OUT --times_csv=experiments/competition/published_times_v05.csv
python -m runner.score --benchmark=0.5 --output_dir=OUT --submission_directory=LOGS
```
For version 0.6, write 0.6 and v06. Both commands give the published scores to four digits. From the logs, all times equal those
of AlgoPerf's scorer but nine of 154 in version 0.5, where trials of a study tie: these differ by up to 7 s. The speed-up is the
baseline's time over a submission's, by geometric mean over the base workloads; a miss counts as the version's budget + 1 s."""


def times(version: str) -> pd.DataFrame:
    """Return the published seconds to target, one row per submission and one column per workload; inf is a miss."""
    return read_times(HERE / f"published_times_v{version.replace('.', '')}.csv")


def trials(version: str) -> pd.DataFrame:
    """Return all published trials of Shampoo and the baseline on the scored workloads. Points count from 1."""
    table = pd.read_csv(HERE / "published_trials.csv", dtype={"version": str})
    scored = table["workload"].isin(times(version).columns) & (table["version"] == version)
    return table[scored].assign(submission=lambda t: t["submission"].replace({SHAMPOO[version]: "shampoo"}))


def budgets(version: str) -> pd.Series:
    """Return the time budget of each workload in seconds."""
    return pd.Series({name: target.budget for name, target in VERSIONS[version].targets.items()}, dtype=float)


def scored(version: str) -> Comparison:
    """Compare all submissions: performance profile, scores, and speed-ups over the baseline."""
    return compare(times(version), budgets(version), "baseline", VERSIONS[version].held_out)


def best_trials(version: str) -> pd.DataFrame:
    """Return the fastest trial of each study to reach the target or, if none did, the one with the most steps."""
    ordered = trials(version).sort_values(["time_to_target_sec", "last_step"], ascending=[True, False], kind="stable")
    return ordered.groupby(["submission", "workload", "study"], as_index=False).first()


def study_table(version: str) -> pd.DataFrame:
    """Return one row per submission and workload: seconds to target of each study, their median, points, steps, step time."""
    rows = []
    for (submission, workload), studies in best_trials(version).groupby(["submission", "workload"]):
        hits = np.isfinite(studies["time_to_target_sec"])
        row: dict[str, Any] = {"submission": submission, "workload": workload}
        row["seconds in each study"] = join_numbers(studies["time_to_target_sec"])
        row["median"] = join_numbers([studies["time_to_target_sec"].median()])
        row["point"] = " ".join(str(trial) if hit else "-" for trial, hit in zip(studies["trial"], hits, strict=True))
        row["steps"] = join_numbers(studies["steps_to_target"].where(hits, np.inf))
        row["seconds per step"] = f"{studies['median_step_sec'].median():.3f}"
        rows.append(row)
    return pd.DataFrame(rows)


def join_numbers(values: Any) -> str:
    """Format values as integers, and infinite ones, which are misses, as dashes."""
    return " ".join(f"{value:.0f}" if np.isfinite(value) else "-" for value in values)


def wins(version: str) -> pd.DataFrame:
    """Return, per workload and point of Shampoo, "W of R": of R studies in which it reached the target, it was first in W."""
    mine = trials(version).query("submission == 'shampoo'")
    reached = mine[np.isfinite(mine["time_to_target_sec"])].groupby(["workload", "trial"]).size()
    best = best_trials(version).query("submission == 'shampoo'")
    first = best[np.isfinite(best["time_to_target_sec"])].groupby(["workload", "trial"]).size()
    counts = pd.DataFrame({"first": first, "reached": reached}).fillna(0).astype(int)
    text = counts["first"].astype(str) + " of " + counts["reached"].astype(str)
    table = text.unstack("trial").reindex(sorted(mine["workload"].unique()))
    return table.reindex(columns=range(1, 6)).fillna("-").rename(columns="point {}".format)


def draw_trials(version: str, path: Path) -> None:
    """Plot the seconds to target of every trial of Shampoo over the baseline's published seconds, one color per point."""
    mine = trials(version).query("submission == 'shampoo'")
    names = sorted(mine["workload"].unique())
    published = times(version).loc["baseline", names]
    reference = published.where(np.isfinite(published), budgets(version).reindex(names)).fillna(np.inf)
    figure, axes = plt.subplots(figsize=(11, 4.8), layout="constrained")
    for point, rows in mine.groupby("trial"):
        x = rows["workload"].map(names.index) + 0.12 * (point - 3)
        ratio = rows["time_to_target_sec"] / rows["workload"].map(reference)
        axes.plot(x, ratio.where(np.isfinite(ratio)), "o", alpha=0.7, label=f"point {point}")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), names, rotation=25, ha="right")
    axes.set(ylabel="seconds to target over the baseline's", ylim=(0, None), title=f"version {version}; misses are left out")
    axes.grid(alpha=0.3, axis="y")
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def page(output: Path) -> str:
    """Draw the figures into `output` and return the page."""
    parts = [
        "# The published results",
        "Written by `python -m experiments.competition.published` from AlgoPerf's published logs: the times to target of all "
        "submissions to the external tuning track, and all trials of Shampoo and the baseline (NadamW).",
        COMMANDS,
    ]
    for version in VERSIONS:
        comparison = scored(version)
        color = colors(comparison.times.index)
        plot_profile(comparison.profile, comparison.scores["score"], "time", color, output / f"profile_{version}.png")
        draw_trials(version, output / f"trials_{version}.png")
        parts += [
            f"## Version {version}",
            comparison.scores.round(4).to_markdown(floatfmt=("", ".4f", ".2f")),
            f"![performance profiles](profile_{version}.png)",
            "The best trial of each study. A dash marks a study, or a median over studies, that missed the target.",
            study_table(version).to_markdown(index=False, disable_numparse=True),
            "Shampoo's five points: in how many studies each reached the target first, out of those in which it reached it.",
            wins(version).to_markdown(disable_numparse=True),
            "Every trial of Shampoo that reached the target: its time over the baseline's (the budget if the baseline missed).",
            f"![trials of Shampoo](trials_{version}.png)",
        ]
    return "\n\n".join(parts) + "\n"


def main(_: Any) -> None:
    """Write and print the page."""
    output = Path(FLAGS.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: --output_dir is {output}, which cannot be made a folder: {error}; choose another")
    text = page(output)
    (output / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    flags.DEFINE_string("output_dir", None, "folder for the page and the figures", required=True)
    app.run(main)
