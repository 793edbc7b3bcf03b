"""What `--resume_last_run` and `--overwrite` do with runs that stopped at any point, and with damaged files."""

import runner  # noqa: F401  makes algoperf.spec importable

# isort: split

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
from commands import ROOT, arguments, call, error_of, start_process
from test_study import TOY

from experiments.kill_runs import contents, equal
from runner import files, logs, loop
from runner.logs import checkpoints
from runner.workloads import workload_class

RUN = ["--num_tuning_trials=2", "--max_global_steps=4", "--eval_every_steps=2", "--rng_seed=1"]
RESUME = [*RUN, "--resume_last_run"]


def argv(folder, *flags):
    return arguments(folder, *flags, workload=TOY)


def run(folder, *flags):
    """Run or resume, and return the output."""
    return call("runner.__main__", *argv(folder, *(flags or RESUME)))


def trials(folder):
    return [contents(folder / "e" / "toy_pytorch" / f"trial_{i}") for i in (1, 2)]


def snapshot(folder):
    """Return every file and folder with its content, links as they are, except for locks and the content of huge files."""

    def content(path):
        if path.is_symlink():
            return os.readlink(path)
        return path.is_file() and (path.read_bytes() if path.stat().st_size < 2**30 else path.stat())

    return {str(path.relative_to(folder)): content(path) for path in folder.rglob("*") if path.suffix != ".lock"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a run of two trials, evaluated at steps 1, 2, and 4."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder, *RUN)
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """Return the folder of a copy of that run, and that of its second trial."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy", tmp_path / "copy" / "e" / "toy_pytorch" / "trial_2"


def forget_end(trial):
    """Make a trial one that was killed before it wrote what ended it."""
    path = trial / "meta_data_0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ended": "-"}))


def test_a_trial_that_stopped_in_its_first_save_begins_anew_alone(finished, copy):
    """Its seed and point stay; what it wrote is set aside; finished trials stay as they are."""
    folder, trial = copy
    forget_end(trial)
    for path in checkpoints(trial):
        path.unlink()
    (trial / ".partial_checkpoint_1").write_bytes(b"PK")
    first = snapshot(trial.with_name("trial_1"))
    run(folder, *RESUME[:-2], "--resume_last_run")  # without the seed
    assert all(map(equal, trials(folder), trials(finished)))
    assert snapshot(trial.with_name("trial_1")) == first
    assert len(pd.read_csv(trial / "set_aside_1" / "eval_measurements.csv")) == 3
    assert not (trial / ".partial_checkpoint_1").exists()


def test_a_finished_trial_without_checkpoints_stays(tmp_path):
    run(tmp_path, *RUN, "--save_checkpoints=false")
    before = snapshot(tmp_path / "e" / "toy_pytorch" / "trial_1")
    assert "eval_measurements.csv" in before
    run(tmp_path)
    assert snapshot(tmp_path / "e" / "toy_pytorch" / "trial_1") == before


@pytest.mark.parametrize("content", [b"", b"PK\3\4", None, b"\x80\x02."])
@pytest.mark.parametrize("count", [1, 2])
def test_the_checkpoint_before_a_damaged_one_is_used_or_the_trial_begins_anew(finished, copy, content, count, caplog):
    """One that is cut in half if `content` is None, empty, or of another kind. It is named, and set aside."""
    folder, trial = copy
    forget_end(trial)
    bad = checkpoints(trial)[-count:]
    damaged = {path.name: path.read_bytes()[: path.stat().st_size // 2] if content is None else content for path in bad}
    for name, text in damaged.items():
        (trial / name).write_bytes(text)
    (trial / "checkpoint_last").write_text("of another program")
    (trial / "meta_data_1.json").write_text("{}")  # of a resumed run that was killed at once
    run(folder)
    (trial / "checkpoint_last").unlink(missing_ok=True)  # set aside with the rest if the trial began anew
    assert all(map(equal, trials(folder), trials(finished)))
    aside = {path.name: path.read_bytes() for path in trial.glob("set_aside_*/checkpoint_[0-9]*")}
    assert aside == damaged
    assert all(f"{path} is not a whole checkpoint" in caplog.text for path in bad)
    assert pd.read_csv(trial / "eval_measurements.csv")["preemption_count"].tolist() == [0, 0, 2 if count == 1 else 0]


def test_a_checkpoint_whose_name_is_not_its_step_is_set_aside(finished, copy):
    """It would seem to be later than all that follow."""
    folder, trial = copy
    forget_end(trial)
    (trial / "checkpoint_4").rename(trial / "checkpoint_999")
    run(folder)
    assert all(map(equal, trials(folder), trials(finished)))
    assert (trial / "set_aside_1" / "checkpoint_999").exists()


@pytest.mark.parametrize("lost", ["score", "ended"])
def test_a_trial_that_stopped_after_its_last_checkpoint_is_ended(finished, copy, lost):
    folder, trial = copy
    forget_end(trial)
    if lost == "score":
        lines = (trial / "measurements.csv").read_text().splitlines(keepends=True)
        (trial / "measurements.csv").write_text("".join(lines[:-1]))
    run(folder)
    assert all(map(equal, trials(folder), trials(finished)))


def test_a_trial_whose_time_was_up_before_its_first_evaluation_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(workload_class(TOY), "max_allowed_runtime_sec", 1e-9)
    ends = []
    for flags in (RUN, RESUME):
        with pytest.raises(SystemExit, match="error: no trial was evaluated"):
            run(tmp_path, *flags)
        ends.append(trials(tmp_path))
        forget_end(tmp_path / "e" / "toy_pytorch" / "trial_1")
    assert all(map(equal, *ends))
    assert ends[1][0]["ended"] == "time"


def test_what_was_logged_after_the_checkpoint_is_not_logged_twice(finished, copy):
    """The submission logs at the step of the checkpoint when it goes on from there."""
    folder, trial = copy
    forget_end(trial)
    (trial / "checkpoint_4").unlink()
    lines = (trial / "measurements.csv").read_text().splitlines(keepends=True)
    assert [line.split(",")[0] for line in lines] == ["global_step", "0", "1", "2", "4", "4"]
    (trial / "measurements.csv").write_text("".join([*lines[:4], lines[3], *lines[4:]]))
    run(folder)
    assert all(map(equal, trials(folder), trials(finished)))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("tuning_search_space_2026.json", "trial_1 was begun with the hyperparameters {"),
        ("runner/tuning_search_space.json", "'learning_rate': 0.007"),
    ],
)
def test_another_search_space_is_refused(copy, space, message):
    folder, _ = copy
    before = snapshot(folder)
    error = error_of("runner.__main__", *argv(folder, *RESUME, f"--tuning_search_space={space}"))
    assert message in error
    assert "give the search space that it was begun with" in error
    assert snapshot(folder) == before


def test_another_seed_is_refused(copy):
    folder, _ = copy
    error = error_of("runner.__main__", *argv(folder, *RESUME, "--rng_seed=8"))
    assert "was begun with --rng_seed=1, not 8; omit the flag" in error


def test_resume_and_overwrite_exclude_each_other(copy):
    folder, _ = copy
    before = snapshot(folder)
    assert "pass one to resume the run or to replace it" in error_of("runner.__main__", *argv(folder, *RESUME, "--overwrite"))
    assert snapshot(folder) == before


@pytest.mark.parametrize("name", ["e", "e/toy_pytorch"])
def test_overwrite_does_not_follow_a_link(copy, name):
    folder, _ = copy
    elsewhere = folder / "precious"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    before = snapshot(folder)
    assert "which --overwrite would replace; remove the link" in error_of("runner.__main__", *argv(folder, "--overwrite"))
    assert snapshot(folder) == before


def test_an_experiment_that_is_removed_halfway_is_not_resumed(finished, copy, monkeypatch):
    folder, trial = copy

    def interrupt(path, **_):
        if path.exists():
            shutil.move(path / "trial_1", folder)
            raise KeyboardInterrupt

    monkeypatch.setattr(logs.shutil, "rmtree", interrupt)
    with pytest.raises(KeyboardInterrupt):
        call("runner.__main__", *argv(folder, *RUN, "--overwrite"))
    assert not trial.exists()
    monkeypatch.undo()
    for flag in ("--resume_last_run", "--overwrite"):
        call("runner.__main__", *argv(folder, *RUN, flag))
    assert all(map(equal, trials(folder), trials(finished)))


def test_a_checkpoint_of_another_model_ends_the_trial_and_the_others_go_on(finished, copy):
    folder, trial = copy
    forget_end(trial)
    forget_end(trial.with_name("trial_1"))
    state = loop.read_checkpoint(trial / "checkpoint_4", loop.DEVICE)
    loop.save_checkpoint(trial.with_name("trial_1"), {**state, "model_params": {}}, keep_others=False)
    with pytest.raises(SystemExit, match="error: 1 of 2 trials failed: trial_1") as stopped:
        run(folder)
    assert "checkpoint_4 does not fit the submission or the workload: " in stopped.value.__notes__[0]
    assert "to begin the trial anew" in stopped.value.__notes__[0]
    assert equal(trials(folder)[1], trials(finished)[1])


ODD = ["with space", "ünï-ödé 漢字", "lr=0.1", ".dotted", "a.b.c", "-dash", "x" * 200, "tab\tand 'quotes'", "$HOME", "[a]*?"]


@pytest.mark.parametrize("name", ODD)
def test_any_name_of_folders_works(finished, tmp_path, name):
    """Of the experiment and of those around it, the submission, and the search space."""
    place = tmp_path / name
    place.mkdir()
    (place / "mine.py").write_text("from submission import *")
    shutil.copy(ROOT / "tuning_search_space.json", place / "space.json")
    flags = [f"--submission_path={place / 'mine.py'}", f"--tuning_search_space={place / 'space.json'}"]
    for more in ([], ["--resume_last_run"]):
        call("runner.__main__", *arguments(place / "out", *RUN, *flags, *more, name=name, workload=TOY))
    found = [contents(path) for path in sorted((place / "out" / name / "toy_pytorch").glob("trial_*"))]
    assert all(map(equal, found, trials(finished)))
    assert len(found) == 2


# A full disk


def test_a_full_disk_fails_a_trial_and_the_next_ones_run_once_there_is_room(tmp_path, monkeypatch, capfd):
    """Not even the error can be written. What is there stays, and nothing of a file."""
    write, full = Path.write_bytes, [False]

    def limited(method):
        def call(path, *args, **kwargs):
            if full[0] and "trial_1" in str(path):
                path.touch()
                raise OSError(28, "No space left on device")
            return method(path, *args, **kwargs)

        return call

    for name in ("write_bytes", "write_text"):
        monkeypatch.setattr(Path, name, limited(getattr(Path, name)))
    monkeypatch.setattr(loop, "evaluate", fill_at(loop.evaluate, 2, full))
    with pytest.raises(SystemExit, match="error: 1 of 2 trials failed: trial_1") as stopped:
        run(tmp_path, *RUN)
    trial = tmp_path / "e" / "toy_pytorch" / "trial_1"
    assert f"No space left on device: '{trial / 'checkpoint_2'}'" in stopped.value.__notes__[0]
    assert "Traceback" in capfd.readouterr().err  # in place of error.txt
    assert [path.name for path in checkpoints(trial)] == ["checkpoint_1"]
    assert not {"error.txt", ".partial_checkpoint_2", ".partial_error.txt"} & {path.name for path in trial.iterdir()}
    assert [path.name for path in checkpoints(trial.with_name("trial_2"))] == ["checkpoint_2", "checkpoint_4"]
    monkeypatch.undo()
    assert write is Path.write_bytes
    run(tmp_path)
    assert [path.name for path in checkpoints(trial)] == ["checkpoint_2", "checkpoint_4"]


def fill_at(evaluate, step, full):
    """Return `evaluate`, which sets `full[0]` when it is called at this step for the first time."""

    def filling(trial, *args):
        full[0] |= trial.global_step == step and trial.folder.name == "trial_1"
        return evaluate(trial, *args)

    return filling


# Two processes, and Ctrl-C

WAITING = """
from submission import *
import pathlib, submission, time

def update_params(**arguments):
    if arguments["global_step"] == 2:
        pathlib.Path({path!r}).touch()
        time.sleep({seconds})
    return submission.update_params(**arguments)
"""


def start_waiting(folder, seconds=600):
    """Start a run whose first trial waits after its second step, and return the process once it does."""
    (folder / "waiting.py").write_text(WAITING.format(path=str(folder / "waits"), seconds=seconds))
    process = start_process("runner", *argv(folder, *RUN, f"--submission_path={folder / 'waiting.py'}"))
    wait_for(process, folder / "waits")
    return process


def wait_for(process, path):
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.slow
def test_a_second_process_on_a_run_is_refused_and_a_killed_one_leaves_no_lock(finished, tmp_path):
    process = start_waiting(tmp_path)
    before = snapshot(tmp_path)
    for flag in ("--resume_last_run", "--overwrite"):
        error = error_of("runner.__main__", *argv(tmp_path, *RUN, flag))
        assert "another process is writing to " in error
        assert "toy_pytorch; wait until it has ended, or choose another place" in error
    assert snapshot(tmp_path) == before
    process.kill()
    process.communicate()
    run(tmp_path)
    assert all(map(equal, trials(tmp_path), trials(finished)))


@pytest.mark.slow
def test_ctrl_c_in_a_trial_ends_with_status_1_and_the_run_can_be_resumed(finished, tmp_path):
    process = start_waiting(tmp_path)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 1
    assert "interrupted in trial 1; pass --resume_last_run to go on from its last checkpoint" in output
    assert "Traceback" not in output
    run(tmp_path)
    assert all(map(equal, trials(tmp_path), trials(finished)))


@pytest.mark.slow
@pytest.mark.parametrize("module", ["runner", "runner.suite"])
def test_ctrl_c_before_training_prints_no_traceback(tmp_path, module):
    """At moments of starting up, from the first imports on."""
    place = f"--output_dir={tmp_path / 'suite'}"
    flags = argv(tmp_path, *RUN) if module == "runner" else [place, f"--workloads={TOY}"]
    for delay in (0.3, 1.0, 2.0):
        process = start_process(module, *flags)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate()
        assert process.returncode in (1, -signal.SIGINT), output
        assert "Traceback" not in output
        shutil.rmtree(tmp_path / "e", ignore_errors=True)


def test_only_one_lock_at_a_time(tmp_path):
    with (
        files.locked(tmp_path / "x"),
        pytest.raises(BlockingIOError, match="another process is writing to"),
        files.locked(tmp_path / "x"),
    ):
        pass
    with files.locked(tmp_path / "x"):
        pass
