"""Evaluate AlgoPerf's self-tuning leaderboard of 2026: `python -m experiments.competition.self_tuning --output_dir=DIR`.

Write a page: the scores; how long trials ran; what share of a schedule fits into the time; how far point 2 of the competition's
Shampoo, with a schedule of 0.6 step hints, got before it won; and a projection of this project's entry from laptop ratios.

Trials are in published_self_tuning.csv. With `--submission_directory=LOGS --workload_targets=FILE`, first write it anew: LOGS
is logs/self_tuning of mlcommons/submissions_algorithms (branch a100_scoring, commit ec137231, June 2026), and FILE is
scoring/workload_targets.json there.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from absl import app, flags
from scipy import stats

from runner.ratios import ratios
from runner.score import MAX_RATIO, NUM_TAUS, compare
from runner.study import SELF, parse_entry, read_table, reported, steps_and_limits
from runner.times import BENCHMARKS, Benchmark, read_logs, read_targets

from . import published
from .plan import ENTRIES, GPU_HOUR_PRICE, SELF_TUNING_FACTOR
from .plan import STUDIES as PLANNED_STUDIES

FLAGS = flags.FLAGS

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("published_self_tuning.csv")
LAPTOP = ROOT / "results" / "laptop_suite" / "runs.csv"
WORKLOADS = BENCHMARKS["2026"]["workloads"]
BUDGETS = pd.Series({name: entry["max_allowed_runtime_sec"] for name, entry in WORKLOADS.items()}, dtype=float)
STEP_HINTS = pd.Series({name: entry["step_hint"] for name, entry in WORKLOADS.items()}, dtype=float)
TWINS = {
    "criteo1tb": "flights_dlrm",
    "fastmri": "mnist_unet",
    "imagenet_resnet": "mnist_resnet",
    "imagenet_vit": "mnist_vit",
    "librispeech_conformer": "fsdd_conformer",
    "librispeech_deepspeech": "fsdd_lstm",
    "finewebedu_lm": "pydoc_lm",
    "ogbg": "solubility_gnn",
    "wmt": "pydoc_lm",
}
REFERENCES = ["nadamw", "nadamw_baselinev05"]
OURS, STUDIES = "shampoo_self", 5  # in the laptop suite
LAPTOP_ENTRIES = {  # as `runner.suite` takes them, and the number of points
    "shampoo_self": (f"shampoo_self={ROOT / 'submission.py'}:{SELF}", 1),
    "shampoo": (f"shampoo={ROOT / 'submission.py'}:{ROOT / 'runner' / 'tuning_search_space.json'}", 5),
    **{
        name: (str(ROOT / "runner" / "baselines" / name / "submission.py"), 5)
        for name in ("nadamw", "muon", "schedule_free_adamw")
    },
}
GPUS = ENTRIES["self"].gpus
SLOWDOWNS = (1.0, 1.2, 1.5)
DRAWS = 10_000

PAGE = """\
# The self-tuning leaderboard of 2026

Written by `python -m experiments.competition.self_tuning` from the logs of AlgoPerf's leaderboard
(mlcommons/submissions_algorithms, branch a100_scoring, commit ec137231, June 2026): 17 entries, nine workloads, three studies,
four A100s. This project's entry is not among them.

## Scores

The target of finewebedu_lm is the leaderboard's, a perplexity of 22.2995, not 22.432 as in AlgoPerf's workload. A miss counts
as 1.5 budgets + 1 s in the speed-up.

{scores}

## How long trials run

AlgoPerf's runner and documentation (commit 2c90454f) give a self-tuning trial 1.5 times the time of an external one. Until
version 0.5 it was three times, and the leaderboard's `scoring/compute_speedups.py` still counts a miss so. The latest
evaluations of these trials are within 1.5 budgets, too.

The last column is what a schedule must allow for: a torch entry takes 0.56 step hints on imagenet_resnet and 0.69 on
imagenet_vit before its time is up. A schedule of one step hint, such as that of `self_tuning.json`, does not end there.

{fitting}

## Schedules of 0.6 step hints

In version 0.5, point 2 of the competition's Shampoo, with a schedule of 0.6 step hints, was the fastest in most studies of five
workloads. Medians of steps to the target, over the step hint and over that schedule:

{horizons}

On four of the five it won after 0.20 to 0.36 of its schedule, at three quarters of its peak rate or more: there, the length of
the schedule is not what made it faster. On imagenet_vit it won after 0.73 of it, where the rate had fallen; the other points
take 0.94 step hints there. Where the fastest point needs 0.73 to 0.90 step hints, point 2 never reached the target.

## A projection

What this project's entry would score beside the 17 if its ratios of steps on the laptop held. Assumptions:

1. On each workload, it takes the steps of the faster of the two NadamW entries times the ratio to NadamW on the laptop twin
   (pydoc_lm stands in for both wmt and finewebedu_lm). On the laptop, NadamW is tuned on each workload; here, it is not.
2. Where both NadamW entries miss (imagenet_resnet, librispeech_conformer, librispeech_deepspeech), we miss, too; or, as an
   alternative, NadamW would reach the target at the step hint, or at its last step if it went further.
3. A step takes 1, 1.2, or 1.5 times the median of the torch entries. Ours has not been timed on A100s.
4. A time above 1.5 budgets is a miss. Time between evaluations is not added, and it does not matter that a schedule is cut off.
5. The interval "seeds" draws the mean ratio over the five laptop studies from its t distribution. "Transfer" also draws, for
   each workload, one of the {count} errors of the table below, published over laptop. Both leave out the spread of NadamW's.

{projection}

The best score today is {best:.2f}. Scores move in steps, since each target is a ninth.

### Did laptop ratios hold before?

Steps over NadamW's, of three methods that ran both on AlgoPerf and on the laptop: the competition's Shampoo (version 0.5, best
of five points in both), and Muon and Schedule-Free AdamW (2026, one point there, the best of five here).

{transfer}

Geometric means over these workloads:

{means}

Shampoo's log ratios differ by {shampoo:.2f} (standard deviation over workloads). The others, with one point on AlgoPerf and the
best of five here, look better here.

## What it would cost

Hours on four A100s for three studies with the budgets of 2026: at most, those that the torch entries took (median), and their
evaluations, which budgets leave out. `python -m experiments.competition.plan` prints a price, too.

{hours}

Training takes at most {most:.0f} hours, {most_gpu:.0f} GPU hours, and evaluations {evaluations_gpu:.0f} more. At an assumed 2
dollars per GPU hour, that is {most_price:,.0f} dollars at most, and {usual_price:,.0f} with the torch entries' hours.
"""


# Published trials


def read_published(logs: Path, benchmark: Benchmark) -> pd.DataFrame:
    """Return one row per trial: seconds and steps to the target, inf if it was missed, and those of the last evaluation.

    Raise ValueError if a trial cannot be read.
    """
    by_time, by_steps = (read_logs(logs, benchmark, by) for by in ("time", "steps"))
    if by_time.errors:
        raise ValueError("\n".join(by_time.errors))
    table = by_time.trials.rename(columns={"value": "seconds", "end": "last_seconds"})
    table[["steps", "last_step"]] = by_steps.trials[["value", "end"]]
    table["framework"] = table["folder"].str.rpartition("_")[2]
    files = [path / "eval_measurements.csv" for path in table["path"]]
    table["evaluation_seconds"] = [pd.read_csv(file)["accumulated_eval_time"].max() for file in files]
    columns = ["submission", "framework", "workload", "study", "seconds", "steps", "last_seconds", "last_step"]
    return table[[*columns, "evaluation_seconds"]].sort_values(columns[:4])


def trials() -> pd.DataFrame:
    """Return the published trials, with the seconds of a step."""
    table = pd.read_csv(TABLE)
    return table.assign(step_seconds=table["last_seconds"] / table["last_step"])


def medians(column: str) -> pd.DataFrame:
    """Return the median of a column over studies, one row per submission and one column per workload."""
    return trials().groupby(["submission", "workload"])[column].median().unstack()[list(WORKLOADS)]


def fitting() -> pd.DataFrame:
    """Return, per workload, seconds per step and the share of the step hint that fits into the self-tuning time."""
    seconds = trials().groupby(["framework", "workload"])["step_seconds"].median().unstack("framework").loc[list(WORKLOADS)]
    shares = (SELF_TUNING_FACTOR * BUDGETS / STEP_HINTS).to_numpy()[:, None] / seconds
    latest = (trials()["last_seconds"] / trials()["workload"].map(BUDGETS)).groupby(trials()["workload"]).max()
    table = pd.DataFrame({"step hint": STEP_HINTS, "budget (s)": BUDGETS, "latest evaluation over the budget": latest})
    for name in seconds:
        table[f"{name}, s per step"], table[f"{name}, step hints in 1.5 budgets"] = seconds[name], shares[name]
    return table.loc[list(WORKLOADS)].rename_axis("workload")


def horizons() -> pd.DataFrame:
    """Return, for version 0.5 and each workload, median steps to the target of point 2 and of the fastest other point.

    Steps are also given over the step hint and, for point 2, over its schedule of 0.6 step hints.
    """
    mine = published.trials("0.5").query("submission == 'shampoo'")
    hits = mine[np.isfinite(mine["time_to_target_sec"])]
    steps = hits.groupby(["workload", "trial"])["steps_to_target"].median().unstack()
    hints = pd.Series({name: e["step_hint"] for name, e in BENCHMARKS["0.5"]["workloads"].items()}, dtype=float)
    steps = steps.div(hints.loc[steps.index], axis=0)
    best = published.best_trials("0.5").query("submission == 'shampoo' and trial == 2")
    wins = best[np.isfinite(best["time_to_target_sec"])].groupby("workload").size()
    table = pd.DataFrame({"studies won by point 2": wins.reindex(steps.index, fill_value=0)})
    table["point 2 over the step hint"] = steps[2]
    table["over its schedule"] = steps[2] / 0.6
    table["fastest other point over the step hint"] = steps.drop(columns=2).min(axis=1)
    return table


# A projection


def laptop_ratios(submission: str) -> pd.DataFrame:
    """Return, per laptop workload, the mean log ratio of a submission's steps to NadamW's, and its standard error over studies.

    Both have the best of their points on each. A miss counts as the step hint.
    """
    workloads, base = sorted(set(TWINS.values())), "nadamw"
    chosen = [parse_entry(text, count) for text, count in (LAPTOP_ENTRIES[submission], LAPTOP_ENTRIES[base])]
    rows = reported(read_table(LAPTOP), chosen, workloads, STUDIES)
    table = ratios(*steps_and_limits(rows, [submission, base], workloads, STUDIES), base).loc[submission].loc[workloads]
    spread = (np.log(table["high"]) - np.log(table["low"])) / (2 * stats.t.ppf(0.975, STUDIES - 1))
    return pd.DataFrame({"mean": np.log(table["ratio"]), "error": spread})


def reference_steps(misses_count: bool) -> pd.Series:
    """Return the steps to the target of the faster of the leaderboard's NadamW entries on each workload; inf if both missed
    it, or, if `misses_count`, the step hint, or the last step of the longer run if that is more.
    """
    steps = medians("steps").loc[REFERENCES].min()
    longest = np.maximum(medians("last_step").loc[REFERENCES].max(), STEP_HINTS[steps.index])
    return steps.where(np.isfinite(steps) | (not misses_count), longest)


def transfer() -> pd.DataFrame:
    """Return the ratios of three methods' steps to NadamW's, in published runs and on the laptop twin, without misses."""
    version = published.best_trials("0.5").groupby(["submission", "workload"])["steps_to_target"].median()
    found = {
        "shampoo": version["shampoo"] / version["baseline"],
        "muon": medians("steps").loc["muon_torch"] / reference_steps(False),
        "schedule_free_adamw": medians("steps").loc["schedule_free_adamw"] / reference_steps(False),
    }
    rows = []
    for name, values in found.items():
        laptop = np.exp(laptop_ratios(name)["mean"])
        for workload, value in values.reindex(list(WORKLOADS)).items():
            if np.isfinite(value) and value > 0:
                rows.append({"method": name, "workload": workload, "published": value, "laptop": laptop[TWINS[str(workload)]]})
    return pd.DataFrame(rows)


def draw_log_ratios(errors: np.ndarray) -> np.ndarray:
    """Return DRAWS log ratios of our steps to NadamW's for each workload, (DRAWS, workloads).

    Each is that of the twin, with the mean over studies drawn from its t distribution, plus one of the errors.
    """
    table, rng = laptop_ratios(OURS).loc[list(TWINS.values())], np.random.default_rng(0)
    shape = (DRAWS, len(TWINS))
    draws: np.ndarray = rng.standard_t(STUDIES - 1, size=shape) * table["error"].to_numpy() + table["mean"].to_numpy()
    draws += rng.choice(errors, size=shape)
    return draws


def score_beside(times: np.ndarray, others: pd.DataFrame) -> np.ndarray:
    """Return the score of a submission with these times (..., workloads) beside others."""
    best = np.minimum(times, others.min().to_numpy())
    with np.errstate(invalid="ignore"):
        ratio = np.where(np.isfinite(times), times / best, np.inf)
    taus = np.linspace(1.0, MAX_RATIO, NUM_TAUS)
    profile = (ratio[..., None] <= taus).mean(axis=-2)
    area: np.ndarray = np.trapezoid(profile, taus, axis=-1) / (MAX_RATIO - 1)
    return area


def projected_times(log_ratios: np.ndarray, misses_count: bool, slowdown: float) -> np.ndarray:
    """Return our seconds to the target; inf above the time of self-tuning.

    Steps are the reference's times the ratio, and a step takes `slowdown` times the median of the torch entries.
    """
    steps = reference_steps(misses_count).to_numpy() * np.exp(log_ratios)
    step = trials().query("framework == 'pytorch'").groupby("workload")["step_seconds"].median()[list(WORKLOADS)].to_numpy()
    seconds = steps * slowdown * step
    return np.where(seconds < SELF_TUNING_FACTOR * BUDGETS.to_numpy(), seconds, np.inf)


def projection() -> pd.DataFrame:
    """Return the projected score with intervals, for each assumption on misses and on the time of a step."""
    table, others = transfer(), medians("seconds")
    point = laptop_ratios(OURS)["mean"].loc[list(TWINS.values())].to_numpy()
    errors = np.log(table["published"] / table["laptop"]).to_numpy()
    draws = {"seeds": draw_log_ratios(np.zeros(1)), "transfer": draw_log_ratios(errors)}
    rows = []
    for misses_count in (False, True):
        for slowdown in SLOWDOWNS:
            times = projected_times(point, misses_count, slowdown)
            row: dict[str, Any] = {"where NadamW misses": "it hits at the step hint" if misses_count else "we miss"}
            row |= {"time of a step": slowdown, "targets of 9": int(np.isfinite(times).sum())}
            row["score"] = f"{float(score_beside(times, others)):.2f}"
            for name, log_ratios in draws.items():
                scores = score_beside(projected_times(log_ratios, misses_count, slowdown), others)
                low, middle, high = np.quantile(scores, [0.025, 0.5, 0.975])
                row[f"{name}: median and 95 %"] = f"{middle:.2f} ({low:.2f} to {high:.2f})"
            rows.append(row)
    return pd.DataFrame(rows)


# The page


def plan_hours() -> pd.DataFrame:
    """Return the hours of three studies on four A100s, of training and evaluations, at most and as the torch entries took."""
    torch = trials().query("framework == 'pytorch'").groupby("workload")[["last_seconds", "evaluation_seconds"]].median()
    torch = torch.loc[list(WORKLOADS)]
    table = pd.DataFrame({"at most": SELF_TUNING_FACTOR * BUDGETS, "torch entries": torch["last_seconds"]})
    table["their evaluations"] = torch["evaluation_seconds"]
    table = PLANNED_STUDIES * table.loc[list(WORKLOADS)] / 3600
    table.loc["all"] = table.sum()
    return table.rename_axis("workload")


def page() -> str:
    """Return the page."""
    scores = compare(medians("seconds"), BUDGETS * SELF_TUNING_FACTOR, "nadamw_baselinev05").scores
    moved, hours = transfer(), plan_hours()
    logs = np.log(moved[["published", "laptop"]])
    shampoo = (logs["published"] - logs["laptop"])[moved["method"] == "shampoo"]
    most, usual, evaluations = hours.loc["all"]
    return PAGE.format(
        scores=scores.assign(framework=trials().groupby("submission")["framework"].first()).round(4).to_markdown(),
        fitting=fitting().round(3).to_markdown(),
        horizons=horizons().round(2).to_markdown(missingval="-"),
        count=len(moved),
        projection=projection().to_markdown(index=False),
        best=scores["score"].max(),
        transfer=moved.round(2).to_markdown(index=False),
        means=np.exp(logs.groupby(moved["method"]).mean()).round(2).to_markdown(),
        shampoo=shampoo.std(),
        hours=hours.round(1).to_markdown(),
        most=most,
        most_gpu=GPUS * most,
        evaluations_gpu=GPUS * evaluations,
        most_price=GPUS * GPU_HOUR_PRICE * (most + evaluations),
        usual_price=GPUS * GPU_HOUR_PRICE * (usual + evaluations),
    )


def main(_: Any) -> None:
    """Read the logs if there are any, and write and print the page."""
    try:
        if FLAGS.submission_directory:
            if not FLAGS.workload_targets:
                raise ValueError("--workload_targets is missing; pass the leaderboard's scoring/workload_targets.json")
            found = read_published(Path(FLAGS.submission_directory), read_targets(Path(FLAGS.workload_targets)))
            found.to_csv(TABLE, index=False, float_format="%.6g")
        output = Path(FLAGS.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        text = page()
        (output / "README.md").write_text(text)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(text)


if __name__ == "__main__":
    flags.DEFINE_string("output_dir", None, "folder for the page", required=True)
    flags.DEFINE_string("submission_directory", None, "folder with the leaderboard's logs, to write the table of trials anew")
    flags.DEFINE_string("workload_targets", None, "the leaderboard's file of targets, for the logs")
    app.run(main)
