"""Starting from the template, and the page docs/your_own.md, whose code is complete."""

import re
import shlex

import pytest
from absl import app
from commands import ROOT, arguments, call

from runner import new_baseline

PAGE = (ROOT / "docs" / "your_own.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def short(command):
    """Return the arguments of a printed command, for a single trial of one step."""
    flags = command[command.index("runner") + 1 :]
    return [*flags, "--num_tuning_trials=1", "--max_global_steps=1"]


def test_what_it_writes_runs_with_the_command_that_it_prints(tmp_path, capsys):
    new_baseline.main(["new_baseline", str(tmp_path / "to be" / "mine")])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"wrote {tmp_path / 'to be' / 'mine' / 'submission.py'} and ")
    command = shlex.split(printed[1])
    assert command[1:3] == ["-m", "runner"]
    output = call("runner.__main__", *short(command), f"--experiment_dir={tmp_path}")
    assert "0 of 1 trials reached the target" in output
    assert (tmp_path / "mine" / "mnist_vit_pytorch" / "trial_1" / "checkpoint_1").exists()


@pytest.mark.parametrize("name", new_baseline.NAMES)
def test_it_overwrites_nothing(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(SystemExit, match=rf"error: .*{name} exists; give another folder, or remove the file"):
        new_baseline.main(["new_baseline", str(tmp_path)])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "precious")]


@pytest.mark.parametrize("argv", [[], ["one", "two"]])
def test_it_takes_one_folder(argv):
    with pytest.raises(app.UsageError, match="give one folder"):
        new_baseline.main(["new_baseline", *argv])


def test_the_page_shows_the_template():
    assert [language for language, _ in BLOCKS] == ["python", "json", "python"]
    assert [text for _, text in BLOCKS[:2]] == [(new_baseline.TEMPLATE / name).read_text() for name in new_baseline.NAMES]


def test_the_pages_optimizer_trains_the_pages_workload(tmp_path):
    for name, (_, text) in zip((*new_baseline.NAMES, "two_spirals.py"), BLOCKS):
        (tmp_path / name).write_text(text)
    submission, space = (tmp_path / name for name in new_baseline.NAMES)
    flags = [f"--submission_path={submission}", f"--tuning_search_space={space}", "--num_tuning_trials=5", "--rng_seed=1"]
    flags += ["--hparam_start_index=4", "--max_global_steps=100", "--eval_every_steps=50"]
    output = call("runner.__main__", *arguments(tmp_path, *flags, workload=f"{tmp_path / 'two_spirals.py'}:TwoSpirals"))
    accuracies = [float(x) for x in re.findall(r"validation accuracy ([\d.]+)", output)]
    assert accuracies[-1] > max(accuracies[0], 0.6)
    assert (tmp_path / "e" / "two_spirals_pytorch" / "trial_5" / "checkpoint_100").exists()
