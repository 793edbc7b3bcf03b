"""The suite and the comparison: what they run, print, and write."""

import runner  # noqa: F401  makes algoperf.spec importable

# isort: split

import json
import re

import numpy as np
import pandas as pd
import pytest
from commands import InProcess, call, error_of
from test_study import FIXED, NADAMW, TOY

from runner import page, study
from runner.study import parse_entry
from runner.suite import BASELINES, OURS


def space(folder, *rates):
    path = folder / f"{'_'.join(map(str, rates))}.json"
    path.write_text(json.dumps([{"learning_rate": rate, **FIXED} for rate in rates]))
    return path


@pytest.fixture(scope="module", autouse=True)
def _in_this_process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "workers", InProcess)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The output and the folder of a suite of three submissions in two studies, one of which always fails."""
    folder = tmp_path_factory.mktemp("suite")
    fails = folder / "fails" / "submission.py"
    fails.parent.mkdir()
    fails.write_text(NADAMW.read_text() + "\n\ndef update_params(**arguments):\n    raise ArithmeticError('no more')\n")
    rates = (0.2, 0.1, 0.3, 0.15, 0.25)
    names = [f"fast={NADAMW}:{space(folder, *rates)}", f"slow={NADAMW}:{space(folder, *(rate / 4 for rate in rates))}"]
    arguments = [f"--workloads={TOY}", "--studies=2", f"--output_dir={folder}", "--max_workers=2"]
    with pytest.raises(SystemExit) as stopped:
        call("runner.suite", f"--submissions={','.join([*names, f'fails={fails}:{space(folder, *rates)}'])}", *arguments)
    return stopped.value, folder, names, arguments


def test_every_submission_has_five_points_or_tunes_itself():
    assert len(BASELINES) >= 5
    for text in (*OURS[:2], *BASELINES):
        assert len({json.dumps(point, sort_keys=True) for point in parse_entry(text, 5).points}) == 5
    assert [parse_entry(text, 5).points for text in OURS[2:]] == [(None,)]


def test_a_failed_run_makes_the_exit_status_1_and_is_never_a_time(done):
    error, folder, *_ = done
    assert error.code == "error: 5 runs failed"
    text = (folder / "README.md").read_text()
    assert text.count("ArithmeticError('no more')") == 5
    assert "fails" not in set(pd.read_csv(folder / "runs.csv")["submission"])
    row = next(line for line in text.splitlines() if line.startswith("| fails"))
    assert [cell.strip() for cell in row.split("|")[2:6]] == ["0 of 1", "0 of 2", "0.000", "0.000 [0.000, 0.000]"]
    assert "failed" in row


def test_the_page_has_scores_ratios_and_pictures(done):
    _, folder, *_ = done
    text = (folder / "README.md").read_text()
    assert "| fast " in text
    assert "Studies: 2." in text
    for name in ("profile.png", "ratios.png", "curves.png"):
        assert f"]({name})" in text
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_the_same_command_only_writes_the_page_again(done, capfd):
    _, folder, names, arguments = done
    table = (folder / "runs.csv").read_bytes()
    output = call("runner.suite", f"--submissions={','.join(names)}", *arguments)
    assert (folder / "runs.csv").read_bytes() == table
    assert "fails" not in output
    assert "run/s" not in capfd.readouterr().err  # no progress line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workloads=mnist_rsnet"], "unknown workload 'mnist_rsnet'; .* did you mean mnist_resnet?"),
        (["--workloads=mnist_vit,mnist_vit"], r"the workloads have \['mnist_vit'\] more than once"),
        ([f"--submissions={NADAMW},{NADAMW}"], r"the submissions have \['nadamw'\] more than once"),
        (["--submissions=no/such.py"], r"'no/such.py' names no submission: there is no file .*no/such.py"),
    ],
)
def test_invalid_flags_are_named_before_the_first_run(tmp_path, flags, message):
    error = error_of("runner.suite", f"--output_dir={tmp_path}", *flags)
    assert re.search(message, error)
    assert not (tmp_path / "runs.csv").exists()


def test_a_space_with_too_few_points_is_refused(tmp_path):
    error = error_of("runner.suite", f"--output_dir={tmp_path}", f"--submissions={NADAMW}:{space(tmp_path, 0.1)}")
    assert "has 1 points for 5 trials; ask for fewer" in error


def test_scores_are_those_of_medians_and_of_single_studies():
    index = pd.MultiIndex.from_product([["w1", "w2"], [1, 2, 3]], names=["workload", "study"])
    steps = pd.DataFrame({"a": [10, 10, 10, 20, 20, 20], "b": [10, 40, 20, np.inf, np.inf, 20.0]}, index=index)
    table = page.score_table(steps)
    # Of b's medians, 20 is within tau = 2 of 10, two thirds of the range 1 to 4, and the other misses.
    assert table.loc["b", "score"] == pytest.approx((2 / 3) / 2, abs=0.01)
    assert table.loc["b", "mean"] == pytest.approx(((1 + 0) / 2 + 0 / 2 + (2 / 3 + 1) / 2) / 3, abs=0.01)
    assert table.loc["a", "score"] == 1.0
    assert table.loc["a", "low"] == pytest.approx(1.0)


# Comparison


def test_other_work_on_the_machine_does_not_count_as_training_time():
    table = pd.DataFrame(
        {"submission": ["a", "a", "b"], "workload": "w", "seconds": [10.0, 30.0, 8.0], "steps": [100, 150, 40]}
    )
    assert page.fastest(table).to_dict() == {("a", "w"): 0.1, ("b", "w"): 0.2}


def test_a_comparison_prints_ratios_of_variants_and_files(tmp_path):
    base = space(tmp_path, 0.1)
    output = call(
        "runner.compare",
        f"--base=base={NADAMW}:{base}",
        '--variants=slow={"learning_rate": 0.005}',
        f"--variants=same={NADAMW}:{base}",
        f"--workloads={TOY}",
        "--seeds=3",
        "--ladder=1",
        f"--output_dir={tmp_path}",
        "--max_workers=2",
    )
    ratios = output.split("steps over those of base")[1]
    assert "1.00 [1.00, 1.00]" in ratios
    assert "> " in ratios  # the slow one misses
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    table = pd.read_csv(tmp_path / "runs.csv")
    assert len(table) == 3 * (2 + 3)


@pytest.mark.parametrize("text", ['x={"learning_rate": }', "x={learning_rate: 1}"])
def test_an_invalid_variant_is_named(tmp_path, text):
    flags = [f"--base=base={NADAMW}:{space(tmp_path, 0.1)}", f"--variants={text}", f"--output_dir={tmp_path}"]
    assert f"{text!r} is not a variant" in error_of("runner.compare", *flags)


def test_what_a_table_from_elsewhere_says_is_not_markup(done, tmp_path):
    """Dates and machines are shown on the page; so are errors."""
    _, folder, names, arguments = done
    table = pd.read_csv(folder / "runs.csv", dtype=str, keep_default_na=False)
    evil = "<script>x</script> [a](javascript:b) | `c`\n\n# d"
    table.assign(machine=evil, date=evil).to_csv(tmp_path / "runs.csv", index=False)
    call("runner.suite", f"--submissions={','.join(names)}", *arguments, f"--output_dir={tmp_path}")
    text = (tmp_path / "README.md").read_text()
    assert not any(mark in text for mark in ("<script", "](javascript", "`c`", "\n# d"))
    assert page.as_code(evil) == "`<script>x</script> [a](javascript:b) | 'c' # d`"


def test_a_failed_pictures_disk_leaves_the_old_page(done, monkeypatch):
    _, folder, names, arguments = done
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def full(figure, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    error = error_of("runner.suite", f"--submissions={','.join(names)}", *arguments)
    assert error == f"error: [Errno 28] No space left on device: '{folder / 'profile.png'}'"
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
