"""Malformed input to the commands: no traceback, exit status 1, a message that names the thing, and nothing changed on disk."""

import runner  # noqa: F401  makes algoperf.spec importable

# isort: split

import json
import os
import shutil

import pytest
from commands import ROOT, arguments, call, error_of
from test_resume import RUN, snapshot
from test_study import NADAMW, TOY

from runner import study

FIFO, FOLDER, HUGE = object(), object(), object()  # kinds of files
POINT = json.loads((ROOT / "tuning_search_space.json").read_text())[0]
DEEP = "[" * 200_000
LATIN = "é".encode("latin-1")
ROW = "a,{workload},p,1,0.1,,{ended},{steps},1,d,m,{curve}\n"
API = "".join(f"def {name}(*_, **__): return 8\n" for name in ("get_batch_size", "update_params", "data_selection"))
INIT = API + "def init_optimizer_state(*_): return {}\n"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        path.unlink()
    if content is FIFO:
        os.mkfifo(path)
    elif content is FOLDER:
        path.mkdir()
    elif content is HUGE:
        path.touch()
        os.truncate(path, 2**40)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def space(**changes):
    """Return the text of a search space of one point, changed."""
    return json.dumps([{**POINT, **changes}])


def ranges(text):
    return f'{{"learning_rate": {text}}}'


SPACES = {
    "": "space.json cannot be read: Expecting value",
    "{": "space.json cannot be read: Expecting property name",
    DEEP: "space.json cannot be read: maximum recursion depth exceeded",
    LATIN: "space.json cannot be read: 'utf-8' codec can't decode",
    FIFO: "space.json cannot be read: it is not a regular file",
    FOLDER: "space.json cannot be read: it is not a regular file",
    HUGE: "space.json cannot be read: it has 1,099,511,627,776 bytes; it must have at most",
    "3": "space.json must hold a list of points",
    "[]": "space.json must hold a list of points",
    "{}": "space.json must hold a list of points",
    "[[]]": "space.json must hold a list of points",
    "[{}, 1]": "space.json must hold a list of points",
    '[{"not a name": 1}]': "not a name",
    '[{"class": 1}]': "class",
    '[{"_x": 1}]': "_x",
    '[{"lr": NaN}]': "space.json cannot be read: NaN is not a finite number",
    '[{"lr": -Infinity}]': "-Infinity is not a finite number",
    '[{"lr": 1e999}]': "1e999 is not a finite number",
    '[{"lr": 1, "lr": 2}]': "the keys ['lr'] are there more than once",
    f'[{{"lr": {"1" * 5000}}}]': "space.json cannot be read: Exceeds the limit",
    ranges('{"min": null, "max": 1, "scaling": "linear"}'): "learning_rate is {'min': None, 'max': 1, 'scaling': 'linear'}",
    ranges('{"min": 0.1, "max": null, "scaling": "log"}'): "it must be",
    ranges('{"min": "0.1", "max": "0.2", "scaling": "linear"}'): "with numbers a <= b",
    ranges('{"min": true, "max": true, "scaling": "linear"}'): "with numbers a <= b",
    ranges(f'{{"min": 1, "max": {10**400}, "scaling": "log"}}'): "with numbers a <= b",
    ranges('{"min": [], "max": {}, "scaling": "log"}'): "with numbers a <= b",
    ranges('{"min": 0, "max": 1, "scaling": []}'): "with numbers a <= b",
    ranges('{"feasible_points": "abc"}'): "with at least one point",
    ranges("null"): "learning_rate is None",
    space(learning_rate=None): "space.json, point 1: ",
    space(learning_rate="0.1"): "space.json, point 1: ",
    space(epsilon=[1]): "space.json, point 1: ",
    space(learning_rates=1): "space.json, point 1: ",
}

RUNNER = [  # files, flags, message
    *(({"space.json": content}, ["--tuning_search_space={}/space.json"], message) for content, message in SPACES.items()),
    (
        {"space.json": '[{"a": 1}, {"b": 1}]'},
        ["--tuning_search_space={}/space.json", "--num_tuning_trials=2"],
        "point 2 must have the keys of point 1; they differ in ['a', 'b']",
    ),
    ({}, ["--tuning_search_space={}/space.json"], "space.json cannot be read: [Errno 2]"),
    ({}, ["--resume_last_run", "--overwrite"], "exclude each other"),
    ({}, ["--hparam_start_index=1"], "leave none of the 1 points"),
    ({}, ["--experiment_name="], "must name a folder inside"),
    ({}, ["--experiment_name=../x"], "must name a folder inside"),
    ({}, ["--experiment_name=" + "x" * 300], "File name too long"),
    ({}, ["--experiment_dir=/proc/nowhere"], "/proc/nowhere/e cannot be created: "),
    ({"out": "a file"}, [], "out/e cannot be created: [Errno 20] Not a directory"),
    ({"out/e": "a file"}, [], "out/e cannot be created: "),
    *(({"out/e/toy_pytorch": ""}, [flag], "toy_pytorch must be a folder") for flag in ("--overwrite", "--resume_last_run")),
    ({}, ["--submission_path={}/no.py"], "no.py'; it must be a Python file that exists"),
    ({"s.py": FOLDER}, ["--submission_path={}/s.py"], "s.py'; it must be a Python file that exists"),
    ({"s.py": "def f(:"}, ["--submission_path={}/s.py"], "s.py cannot be imported: SyntaxError: "),
    ({"s.py": b"\0"}, ["--submission_path={}/s.py"], "s.py cannot be imported: "),
    ({"s.py": "import sys; sys.exit()"}, ["--submission_path={}/s.py"], "s.py cannot be imported: SystemExit"),
    ({"s.py": API}, ["--submission_path={}/s.py"], "s.py lacks init_optimizer_state"),
    ({"s.py": INIT.replace("8", "'8'")}, ["--submission_path={}/s.py"], "returned '8'; it must return an integer >= 1"),
    ({"s.py": INIT.replace("8", "1 / 0")}, ["--submission_path={}/s.py"], "get_batch_size('toy') failed: ZeroDivisionError"),
    ({"s.py": INIT.replace("{}", "{}[0]")}, ["--submission_path={}/s.py"], "point 1: KeyError: 0 (s.py, line 4)"),
    ({}, ["--workload=toy"], "unknown workload 'toy'; it must be one of"),
    ({}, ["--workload={}/no.py:Toy"], "before the colon there must be a Python file that exists"),
    ({"w.py": "x = 1"}, ["--workload={}/w.py:Toy"], "has no subclass of runner.workloads.base.LaptopWorkload named 'Toy'"),
    ({"w.py": "1 / 0"}, ["--workload={}/w.py:Toy"], "w.py cannot be imported: ZeroDivisionError"),
]


def refused(tmp_path, module, files, flags, message):
    """Check that a command refuses its input as it must."""
    for name, content in files.items():
        write(tmp_path / name, content)
    before = snapshot(tmp_path)
    error = error_of(module, *(flag.replace("{}", str(tmp_path)) for flag in flags))
    assert error.startswith("error: ")
    assert message in error
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(("files", "flags", "message"), RUNNER, ids=lambda x: x if isinstance(x, str) else "")
def test_the_runner(tmp_path, files, flags, message):
    refused(tmp_path, "runner.__main__", files, [*arguments("{}/out", workload=TOY), *flags], message)


@pytest.fixture(autouse=True)
def _no_training(monkeypatch):
    monkeypatch.setattr(study, "workers", None)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Return a folder with a run that did not end."""
    folder = tmp_path_factory.mktemp("interrupted")
    call("runner.__main__", *arguments(folder / "out", *RUN, workload=TOY))
    for trial in (1, 2):
        path = folder / f"out/e/toy_pytorch/trial_{trial}/meta_data_0.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"ended": "-"}))
    return folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("hparams.json", "", "hparams.json cannot be read: Expecting value"),
        ("hparams.json", "[1]", "hparams.json cannot be read: it holds list, not an object"),
        ("hparams.json", LATIN, "hparams.json cannot be read: 'utf-8'"),
        ("hparams.json", DEEP, "hparams.json cannot be read: maximum recursion depth"),
        ("hparams.json", FIFO, "hparams.json cannot be read: it is not a regular file"),
        ("hparams.json", HUGE, "hparams.json cannot be read: it has 1,099,511,627,776 bytes"),
        ("hparams.json", "{}", "was begun with the hyperparameters {}, not {'learning_rate': "),
        ("meta_data_0.json", "", "meta_data_0.json cannot be read: Expecting value"),
        ("meta_data_0.json", "null", "meta_data_0.json cannot be read: it holds NoneType"),
        ("meta_data_0.json", '{"rng_seed": "1"}', "meta_data_0.json has the rng_seed '1'; it must be an integer"),
        ("meta_data_0.json", FOLDER, "meta_data_0.json cannot be read: it is not a regular file"),
        ("measurements.csv", "", "measurements.csv cannot be read: No columns to parse"),
        ("measurements.csv", LATIN, "measurements.csv cannot be read: 'utf-8'"),
        ("measurements.csv", FIFO, "measurements.csv cannot be read: it is not a regular file"),
        ("measurements.csv", HUGE, "measurements.csv cannot be read: it has 1,099,511,627,776 bytes"),
        ("measurements.csv", "a,b\n1,2\n", "measurements.csv lacks the columns ['global_step']"),
        (
            "eval_measurements.csv",
            "global_step\none\n",
            "must have numbers in the columns ['global_step']",
        ),
        ("eval_measurements.csv", 'global_step\n"1\n', "eval_measurements.csv cannot be read: "),
    ],
)
def test_the_files_of_a_run_to_resume(interrupted, tmp_path, name, content, message):
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    flags = [*arguments("{}/out", *RUN, workload=TOY), "--resume_last_run"]
    file = f"out/e/toy_pytorch/trial_2/{name}"
    refused(tmp_path, "runner.__main__", {file: content}, flags, message)
    error = error_of("runner.__main__", *(flag.replace("{}", str(tmp_path)) for flag in flags))
    assert "trial_2 away to begin the trial anew" in error or "give the search space that it was begun with" in error


def test_a_file_in_place_of_a_trial(interrupted, tmp_path):
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "out/e/toy_pytorch/trial_2")
    flags = [*arguments("{}/out", *RUN, workload=TOY), "--resume_last_run"]
    refused(tmp_path, "runner.__main__", {"out/e/toy_pytorch/trial_2": ""}, flags, "trial_2 must be a folder; move the file")


def table(**changes):
    """Return the text of a table of one run, changed."""
    row = {"workload": TOY, "ended": "steps", "steps": 60, "curve": "3 2", **changes}
    return ",".join(study.COLUMNS) + "\n" + ROW.format(**row)


SUITE = [
    *(
        ({"suite/runs.csv": content}, [], message)
        for content, message in {
            "": "runs.csv cannot be read; move it away to begin a new table: No columns",
            LATIN: "runs.csv cannot be read; move it away to begin a new table: 'utf-8'",
            FIFO: "runs.csv cannot be read; move it away to begin a new table: it is not a regular file",
            FOLDER: "runs.csv cannot be read; move it away to begin a new table: it is not a regular file",
            HUGE: "runs.csv cannot be read; move it away to begin a new table: it has 1,099,511,627,776 bytes",
            "a,b\n1,2\n": "its columns are ['a', 'b']",
            table(curve="1 two 3"): "could not convert string to float: 'two'",
            table(steps="many"): "runs.csv cannot be read; move it away to begin a new table: invalid literal",
            table(steps=""): "runs.csv cannot be read; move it away to begin a new table: invalid literal",
        }.items()
    ),
    ({"suite": "a file"}, [], "suite cannot be created: [Errno 17] File exists"),
    ({}, ["--workloads="], "there are no workloads; give at least one"),
    ({}, [f"--workloads={TOY},{TOY}"], "the workloads have ['toy'] more than once"),
    ({}, [f"--submissions={NADAMW},{NADAMW}"], "the submissions have ['nadamw'] more than once"),
    *(
        ({}, [f"--submissions={name}={NADAMW}"], "the page takes letters, digits, spaces, and any of")
        for name in ("a|b", "a`b", "<script>", "[a](b)", "\x1b[2J", "a*b", "&lt;")
    ),
    ({"s.json": "[]"}, [f"--submissions={NADAMW}:{{}}/s.json"], "s.json must hold a list of points"),
    ({"s.json": space()}, [f"--submissions={NADAMW}:{{}}/s.json"], "s.json has 1 points for 5 trials; ask for fewer"),
]


@pytest.mark.parametrize(("files", "flags", "message"), SUITE, ids=lambda x: x if isinstance(x, str) else "")
def test_the_suite(tmp_path, files, flags, message):
    defaults = [f"--submissions={NADAMW}", f"--workloads={TOY}", "--output_dir={}/suite"]
    refused(tmp_path, "runner.suite", files, [*defaults, *flags], message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (['--variants=x={"a": 1, "a": 2}'], "is not a variant: the keys ['a'] are there more than once"),
        (['--variants=x={"a": NaN}'], "is not a variant: NaN is not a finite number"),
        ([f'--variants=x={{"a": {DEEP}'], "is not a variant: maximum recursion depth"),
        (['--variants=x={"learning_rate": "fast"}'], "x has no learning_rate"),
        (["--ladder=nan"], "--ladder is nan; it must be a list of positive numbers"),
        (["--ladder=1,inf"], "--ladder is 1,inf; it must be a list of positive numbers"),
    ],
)
def test_a_comparison(tmp_path, flags, message):
    defaults = [f"--base={NADAMW}", '--variants=y={"beta1": 0.8}', f"--workloads={TOY}", "--output_dir={}/compare"]
    refused(tmp_path, "runner.compare", {}, [*defaults, *flags], message)


@pytest.mark.parametrize(
    ("files", "flags", "message"),
    [
        ({"t.json": DEEP}, ["--workload_targets={}/t.json"], "t.json is no file of targets: maximum recursion depth"),
        ({"t.json": FIFO}, ["--workload_targets={}/t.json"], "t.json is no file of targets: it is not a regular file"),
        ({"t.json": LATIN}, ["--workload_targets={}/t.json"], "t.json is no file of targets: 'utf-8'"),
        (
            {"t.json": json.dumps({"a": {"target_metric_name": "wer", "validation_target_value": 10**400}})},
            ["--workload_targets={}/t.json"],
            "it must be a number",
        ),
        (
            {
                "t.json": json.dumps(
                    {
                        "workloads": {"a": {"target_metric_name": "wer", "validation_target_value": 1}},
                        "base_workloads": [["a"]],
                        "held_out_workloads": [],
                    }
                )
            },
            ["--workload_targets={}/t.json"],
            "base_workloads is [['a']]; it must be a list of names",
        ),
        ({}, ["--times_csv={}/absent.csv"], "No such file"),
        ({"t.csv": b"\xff\xfe"}, ["--times_csv={}/t.csv"], "t.csv is no table of times: 'utf-8'"),
        ({"t.csv": FIFO}, ["--times_csv={}/t.csv"], "t.csv is no table of times: it is not a regular file"),
        ({"t.csv": HUGE}, ["--times_csv={}/t.csv"], "t.csv is no table of times: it has 1,099,511,627,776 bytes"),
        ({"t.csv": "s,a\n\x1b[2J,1\n"}, ["--times_csv={}/t.csv"], "t.csv has the names ['\\x1b[2J']; each must consist of"),
        ({"t.csv": "s,a\nx,1\n", "out": ""}, ["--times_csv={}/t.csv"], "File exists"),
        (
            {"d/s\n/study/w_jax/trial_1/x": ""},
            ["--submission_directory={}/d"],
            "d has the names ['s\\n']; each must consist of",
        ),
    ],
)
def test_the_score(tmp_path, files, flags, message):
    refused(tmp_path, "runner.score", files, [*flags, "--output_dir={}/out"], message)
