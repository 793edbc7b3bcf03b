"""`python -m runner.suite`: compare submissions on workloads by steps to target, score them as AlgoPerf does, and write a page.

The page and its pictures are in OUTPUT_DIR, with the table of runs, runs.csv (see `runner.study`). Repeat the command to
continue: it runs only what the table lacks.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from .command import run
from .page import write_page
from .study import SELF, check_entries, parse_entry, run_studies
from .workloads import WORKLOADS

RUNNER = Path(__file__).parent
SUBMISSION = RUNNER.parent / "submission.py"
OURS = [
    f"shampoo={SUBMISSION}:{RUNNER / 'tuning_search_space.json'}",
    f"shampoo_2026={SUBMISSION}:{SUBMISSION.with_name('tuning_search_space_2026.json')}",
    f"shampoo_self={SUBMISSION}:{SELF}",
]
BASELINES = sorted(str(path) for path in RUNNER.glob("baselines/*/submission.py"))
NUM_POINTS = 5
QUICK = ["mnist_unet", "solubility_gnn"], 2  # workloads, points
REFERENCE = "nadamw"

FLAGS = flags.FLAGS


def main(_: Sequence[str]) -> None:
    """Check the flags, run what is missing, and write the page. Exit with status 1 if a run failed."""
    workloads, num_points = QUICK if FLAGS.quick else (FLAGS.workloads, NUM_POINTS)
    folder = Path(FLAGS.output_dir).expanduser().resolve()
    try:
        entries = [parse_entry(text, num_points) for text in FLAGS.submissions]
        check_entries(entries, workloads)
        failures = run_studies(folder / "runs.csv", entries, workloads, FLAGS.studies, FLAGS.max_workers)
        base = REFERENCE if REFERENCE in {entry.name for entry in entries} else entries[0].name
        summary = write_page(folder, entries, workloads, FLAGS.studies, base, failures)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"\n{summary}\npage: {folder / 'README.md'}")
    if failures:
        sys.exit(f"error: {len(failures)} runs failed")


def define_flags() -> None:
    """Define the flags of this command."""
    flags.DEFINE_list("submissions", [*OURS, *BASELINES], "submissions to run, each as [NAME=]PATH[:SEARCH_SPACE or :self]")
    flags.DEFINE_list("workloads", list(WORKLOADS), "workloads to run: names, or PATH.py:CLASS")
    flags.DEFINE_integer("studies", 1, "number of seeds that each submission's best point runs on", lower_bound=1)
    flags.DEFINE_integer("max_workers", os.cpu_count() or 1, "number of single-threaded processes", lower_bound=1)
    flags.DEFINE_boolean("quick", False, f"run {', '.join(QUICK[0])}, with {QUICK[1]} points; ignore --workloads")
    flags.DEFINE_string("output_dir", None, "folder for the table of runs and the page", required=True)


if __name__ == "__main__":
    define_flags()
    run(main)
