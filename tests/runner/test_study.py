"""Runs to a target: crossings, tables that a study goes on from, and the choice of points."""

import runner  # noqa: F401  makes algoperf.spec importable

# isort: split

import math
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
from commands import ROOT, InProcess, start_process

from runner import files, study
from runner.study import Entry, Run, complete, point_hash, read_table, steps_to_target
from runner.workloads import workload_class

TOY = f"{Path(__file__).with_name('toy_workload.py')}:Toy"
NADAMW = ROOT / "runner" / "baselines" / "nadamw" / "submission.py"
FIXED = {
    "beta1": 0.9,
    "beta2": 0.999,
    "weight_decay": 0.0,
    "warmup_factor": 0.05,
    "step_hint_factor": 1.0,
    "label_smoothing": 0.0,
    "dropout_rate": 0.0,
}


workload_class(TOY)  # tables run no files: rows count where the command named the file
real_workers = study.workers


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    monkeypatch.setattr(study, "workers", InProcess)


def entry(*rates, name="nadamw", path=NADAMW):
    return Entry(name, path, tuple({"learning_rate": rate, **FIXED} for rate in rates))


def toy_run(owner, index, seed):
    return Run(owner.name, TOY, point_hash(owner.points[index]), seed)


@pytest.mark.parametrize(
    ("curve", "higher", "expected"),
    [
        ("4 2 0.5", False, 20 + 10 * (2 - 1) / (2 - 0.5)),  # between the steps 20 and 30
        ("4 2 1", False, math.inf),  # the target must be beaten
        ("0.5 4", False, 10),  # nothing to interpolate from
        ("nan 0.5", False, 20),
        ("inf 0.5", False, 20),
        ("0 3 0", True, 10 + 10 / 3),
        ("4 4 4 0", False, 30 + 4 * 3 / 4),  # the last evaluation is at step 34
        ("nan nan", False, math.inf),
        ("", False, math.inf),
    ],
)
def test_a_crossing_is_interpolated_between_evaluations(curve, higher, expected):
    assert steps_to_target(study.read_curve(curve), 34, 1.0, higher) == pytest.approx(expected)


def test_a_run_ends_at_the_target_or_after_the_step_hint(tmp_path):
    path, fast = tmp_path / "runs.csv", entry(0.1, 1e-5)
    assert complete(path, fast, [toy_run(fast, 0, 1), toy_run(fast, 1, 1)], max_workers=1) == []
    table = read_table(path).set_index("point")
    reached, missed = (table.loc[point_hash(point)] for point in fast.points)
    curve = [float(x) for x in reached["curve"].split()]
    assert reached["ended"] == "target"
    assert curve[-1] < 0.05 <= min(curve[:-1])
    assert reached["steps"] == 10 * len(curve) < 60
    assert missed["ended"] == "steps"
    assert missed["steps"] == 60
    assert math.isinf(missed["steps_to_target"])
    assert table["seconds"].gt(0).all()


def test_the_same_seed_gives_the_same_curve_and_only_missing_runs_are_run(tmp_path, monkeypatch):
    first, second, ours = tmp_path / "first.csv", tmp_path / "second.csv", entry(0.05)
    complete(first, ours, [toy_run(ours, 0, 1)], max_workers=1)
    complete(second, ours, [toy_run(ours, 0, 2), toy_run(ours, 0, 1)], max_workers=1)
    one, two = (read_table(path).set_index("seed")["curve"] for path in (first, second))
    assert one[1] == two[1] != two[2]
    monkeypatch.setattr(study, "train", None)  # nothing is left to run
    assert complete(second, ours, [toy_run(ours, 0, 1)], max_workers=1) == []


def test_a_run_that_an_easier_target_stopped_is_repeated():
    row = {"submission": "a", "workload": TOY, "point": "p", "seed": 1, "ended": "target", "steps": 20}
    table = study.with_steps(pd.DataFrame([{**row, "curve": "3 0.06"}, {**row, "seed": 2, "curve": "3 0.04"}]))
    assert study.finished(table) == {Run("a", TOY, "p", 2)}
    assert study.finished(table.assign(ended="steps", steps=60)) == {Run("a", TOY, "p", seed) for seed in (1, 2)}


@pytest.mark.slow
def test_processes_give_the_rows_of_this_one(tmp_path, monkeypatch):
    ours, found = entry(0.2), []
    for name, pool in (("processes", real_workers), ("here", InProcess)):
        monkeypatch.setattr(study, "workers", pool)
        complete(tmp_path / name, ours, [toy_run(ours, 0, seed) for seed in (1, 2)], max_workers=2)
        found.append(read_table(tmp_path / name)[["seed", "ended", "curve"]])
    pd.testing.assert_frame_equal(*found)


def test_a_failed_run_is_reported_and_not_written(tmp_path):
    path = tmp_path / "fails" / "submission.py"
    path.parent.mkdir()
    path.write_text(
        "from runner.baselines.nadamw.submission import *\n"
        "from runner import baselines\n"
        "def update_params(**arguments):\n"
        "    if arguments['hyperparameters'].learning_rate > 0.1 and arguments['global_step'] == 2:\n"
        "        raise ArithmeticError('no more')\n"
        "    return baselines.update_params(**arguments)\n"
    )
    ours = entry(0.2, 0.01, name="fails", path=path)
    failures = complete(tmp_path / "runs.csv", ours, [toy_run(ours, 0, 1), toy_run(ours, 1, 1)], max_workers=1)
    assert len(failures) == 1
    assert failures[0].endswith("ArithmeticError('no more')")
    assert set(read_table(tmp_path / "runs.csv")["point"]) == {point_hash(ours.points[1])}


def test_a_submission_that_cannot_tune_itself_is_named(tmp_path):
    ours = study.parse_entry(f"{NADAMW}:self", 5)
    run = Run(ours.name, TOY, point_hash(None), 1)
    (failure,) = complete(tmp_path / "runs.csv", ours, [run], max_workers=1)
    assert f"{NADAMW} needs the hyperparameter " in failure
    assert "so it cannot tune itself; give it a search space" in failure


def test_the_point_is_chosen_on_a_seed_that_is_not_reported(tmp_path):
    path, ours = tmp_path / "runs.csv", entry(1e-4, 0.2, 0.1, 1e-5)
    assert study.run_studies(path, [ours], [TOY], count=2, max_workers=2) == []
    table = read_table(path)
    trials = table[table["seed"].isin(study.SELECTION_SEEDS)]
    first, second = (trials[trials["seed"] == seed].set_index("point")["steps_to_target"] for seed in study.SELECTION_SEEDS)
    assert set(first.index) == {point_hash(point) for point in ours.points}
    assert set(second.index) == set(first.sort_values().index[:2]) == {point_hash(ours.points[i]) for i in (1, 2)}
    best = trials.groupby("point")["steps_to_target"].mean().idxmin()
    assert best == point_hash(ours.points[1])
    rows = study.reported(table, [ours], [TOY], count=2)
    assert set(zip(rows["point"], rows["seed"])) == {(best, study.FIRST_SEED), (best, study.FIRST_SEED + 1)}


def test_the_best_point_has_the_fewest_mean_steps_and_a_miss_counts_as_the_step_hint():
    """The second point hits once and early, the first twice. Among points that all miss, the best metric wins."""
    ours = entry(0.1, 0.2, 0.3)
    for curves, best in (
        ({0: ("3 3 0.04", "3 3 0.04"), 1: ("0.04", "3 3 3 3 3 3"), 2: ("3 3 3 3 3 3",) * 2}, 0),
        ({0: ("3 0.8", "3 0.9"), 1: ("3 0.7 nan", "3 0.8"), 2: ("3 3", "3 3")}, 1),
        ({0: ("3 0.8", "3 0.9"), 1: ("3 0.04",), 2: ("3 3", "3 3")}, 0),  # the second point failed once
    ):
        rows = [
            {
                "submission": "nadamw",
                "workload": TOY,
                "point": point_hash(ours.points[i]),
                "seed": seed,
                "steps": 60,
                "curve": text,
            }
            for i, texts in curves.items()
            for seed, text in zip(study.SELECTION_SEEDS, texts)
        ]
        found = study.best_trial(study.with_steps(pd.DataFrame(rows)), ours, TOY)
        assert found["point"] == point_hash(ours.points[best])
    assert study.best_trial(study.with_steps(pd.DataFrame(rows)), entry(0.4), TOY) is None


def test_a_run_of_another_step_hint_is_repeated():
    row = {"submission": "a", "workload": TOY, "point": "p", "seed": 1, "ended": "steps", "curve": "3 3"}
    table = study.with_steps(pd.DataFrame([{**row, "steps": 60}, {**row, "seed": 2, "steps": 20}]))
    assert study.finished(table) == {Run("a", TOY, "p", 1)}


def test_rows_of_a_workload_that_was_moved_do_no_harm(tmp_path):
    row = dict.fromkeys(study.COLUMNS, "") | {
        "submission": "a",
        "workload": "gone.py:Toy",
        "curve": "3 3",
        "seed": 1,
        "steps": 60,
        "seconds": 1.0,
    }
    study.write_table(pd.DataFrame([row]), tmp_path / "runs.csv")
    assert study.finished(read_table(tmp_path / "runs.csv")) == set()


@pytest.mark.parametrize(
    ("text", "name", "path"),
    [
        (str(NADAMW), "nadamw", NADAMW),
        (f"mine={NADAMW}", "mine", NADAMW),
        ("{}/lr=0.1/submission.py", "lr=0.1", None),
        ("mine={}/lr=0.1/submission.py", "mine", None),
    ],
)
def test_an_entry_has_a_name_and_a_file(tmp_path, text, name, path):
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    for file in ("submission.py", "tuning_search_space.json"):
        (folder / file).write_text(NADAMW.with_name(file).read_text())
    found = study.parse_entry(text.format(tmp_path), 5)
    assert (found.name, found.path, len(found.points)) == (name, path or folder / "submission.py", 5)


@pytest.mark.parametrize("name", ["with space", "ünï-ödé 漢字", ".dotted", "a.b.c", "x" * 200, "a'b"])
def test_any_path_leads_to_a_submission(tmp_path, name):
    (tmp_path / name).mkdir()
    for file in ("submission.py", "tuning_search_space.json"):
        (tmp_path / name / file).write_text(NADAMW.with_name(file).read_text())
    ours = study.parse_entry(f"{tmp_path / name / 'submission.py'}", 1)
    assert ours.name == name
    table = tmp_path / name / "suite" / "runs.csv"
    assert complete(table, ours, [Run(name, TOY, point_hash(ours.points[0]), 1)], max_workers=1) == []
    assert read_table(table)["submission"].tolist() == [name]


def test_another_file_is_not_taken_for_a_table_of_runs(tmp_path):
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"runs.csv cannot be read; .* its columns are \['a', 'b'\]; a table of runs has"):
        read_table(tmp_path / "runs.csv")


def table_of(*rows):
    """Return the text of a table of runs."""
    defaults = dict.fromkeys(study.COLUMNS, "") | {"seed": 1, "steps": 60, "seconds": 1.0, "curve": "3 2", "ended": "steps"}
    return pd.DataFrame([defaults | row for row in rows])[study.COLUMNS].to_csv(index=False)


def test_a_table_from_elsewhere_runs_no_code(tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "runs.csv").write_text(table_of({"submission": "a", "workload": f"{tmp_path / 'evil.py'}:Toy"}))
    assert math.isnan(read_table(tmp_path / "runs.csv")["steps_to_target"][0])
    assert not (tmp_path / "ran").exists()


def test_a_table_has_one_writer(tmp_path):
    path, ours = tmp_path / "runs.csv", entry(0.05)
    with files.locked(path), pytest.raises(BlockingIOError, match=r"another process is writing to .*runs.csv; wait until"):
        complete(path, ours, [toy_run(ours, 0, 1)], max_workers=1)
    assert not path.exists()
    assert complete(path, ours, [toy_run(ours, 0, 1)], max_workers=1) == []
    with files.locked(path):  # nothing is left to write
        assert complete(path, ours, [toy_run(ours, 0, 1)], max_workers=1) == []


@pytest.mark.parametrize("full_for", [1, 2])
def test_rows_that_a_full_disk_held_up_are_written_once_there_is_room(tmp_path, monkeypatch, capsys, full_for):
    """With the next run or, for the last one, at the end."""
    path, ours, write, calls = tmp_path / "runs.csv", entry(0.05), study.write_table, []

    def limited(table, path):
        calls.append(len(table))
        if len(calls) <= full_for:
            raise OSError(28, "No space left on device", str(path))
        write(table, path)

    monkeypatch.setattr(study, "write_table", limited)
    assert complete(path, ours, [toy_run(ours, 0, 1), toy_run(ours, 0, 2)], max_workers=1) == []
    assert len(read_table(path)) == 2
    assert calls == [1, 2, 2][: full_for + 1]
    assert "not written, make room: [Errno 28] No space left on device" in capsys.readouterr().out


def test_a_table_that_cannot_be_written_at_all_is_an_error_and_stays(tmp_path, monkeypatch):
    path, ours = tmp_path / "runs.csv", entry(0.05)
    complete(path, ours, [toy_run(ours, 0, 1)], max_workers=1)
    before = path.read_bytes()

    def full(self, partial, **_):
        partial.write_text("half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(OSError, match=r"No space left on device"):
        study.write_table(read_table(path), path)
    assert path.read_bytes() == before
    assert sorted(found.name for found in tmp_path.iterdir()) == ["runs.csv", "runs.csv.lock"]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_suite_that_is_stopped_leaves_no_process_and_goes_on(tmp_path, stop):
    """The processes that it started end, too; one would keep a core busy, or wait forever."""
    waiting = tmp_path / "waits" / "submission.py"
    waiting.parent.mkdir()
    waiting.write_text(WAITS.format(folder=str(tmp_path)))
    flags = [f"--submissions={waiting}:{NADAMW.with_name('tuning_search_space.json')}", f"--workloads={TOY}"]
    process = start_process("runner.suite", *flags, f"--output_dir={tmp_path}", "--max_workers=2")
    while not (pids := [int(path.name) for path in (tmp_path / "pids").glob("*")]):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(stop)
    output = process.communicate()[0] if stop == signal.SIGINT else ""
    assert process.wait() != 0
    assert "Traceback" not in output
    for _ in range(600):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            break
        time.sleep(0.1)
    else:
        raise AssertionError(f"{pids} still run")
    with files.locked(tmp_path / "runs.csv"):
        pass


WAITS = """
import os, pathlib, time
from runner.baselines.nadamw.submission import *

def update_params(**arguments):
    pids = pathlib.Path({folder!r}) / "pids"
    pids.mkdir(exist_ok=True)
    (pids / str(os.getpid())).touch()
    time.sleep(600)
"""
