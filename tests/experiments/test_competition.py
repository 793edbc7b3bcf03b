"""The commands on the published competition: medians, scores, projection, plan, check."""

import json
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

from experiments.competition import check, plan, projection, published

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("version", ["0.5", "0.6"])
def test_the_published_times_are_the_medians_of_the_published_trials(version):
    best = published.best_trials(version)
    medians = best.groupby(["submission", "workload"])["time_to_target_sec"].median().unstack()
    for name, row in medians.iterrows():
        times = published.times(version).loc[published.SHAMPOO[version] if name == "shampoo" else name, row.index]
        same = (times == row) | (np.isinf(times) & np.isinf(row)) | ((times - row).abs() < 1e-6 * row)
        # There, two trials of one study ended at the same evaluation, and the published table used the later one.
        assert set(row.index[~same]) <= {"wmt_glu_tanh"}


def test_scores_are_the_published_ones():
    assert published.scored("0.5").scores["score"].round(4)["shampoo_submission"] == 0.7784
    assert published.scored("0.6").scores["score"].round(4).to_dict() == {"shampoo": 0.6244, "baseline": 0.4590}


def test_points_win_at_most_as_often_as_they_reach_the_target():
    table = published.wins("0.5")
    cells = [cell.split(" of ") for cell in table.to_numpy().ravel() if cell != "-"]
    assert len(cells) > 20
    assert all(int(first) <= int(reached) <= 5 for first, reached in cells)
    assert table.loc["imagenet_vit", "point 2"] == "5 of 5"


def test_a_projection_without_savings_equals_the_published_score():
    assert projection.score_with(projection.projected(0.2, 1.0)) == pytest.approx(0.7784, abs=5e-5)
    published_seconds = projection.medians()["seconds"]
    cheaper = projection.projected(0.1, 0.5)
    hits = np.isfinite(published_seconds)
    assert (np.isinf(cheaper) == ~hits).all()
    # Steps take nearly all of the time, so a tenth of it at half the cost saves nearly a twentieth.
    assert ((1 - cheaper / published_seconds)[hits]).between(0.03, 0.055).all()
    assert projection.score_with(cheaper) > 0.7784
    scores = projection.extremes()
    assert scores["slowest"] < scores["median"] < scores["fastest"]


def run_plan(folder, runner):
    """Run trials.sh with a program in place of torchrun."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "torchrun").write_text(runner)
    (folder / "bin" / "torchrun").chmod(0o755)
    environment = {
        "PATH": f"{folder}/bin:/usr/bin:/bin",
        "ALGOPERF": str(folder),
        "DATA": "/data",
        "EXPERIMENTS": f"{folder}/e",
    }
    return subprocess.run(
        ["bash", folder / "trials.sh"], env=environment, capture_output=True, text=True, timeout=1200, check=False
    )


@pytest.mark.slow
def test_the_plan_runs_every_trial_once_and_resumes(tmp_path):
    (tmp_path / "trials.sh").write_text(plan.shell_script(plan.plan()))
    folder = "$(for a; do case $a in --experiment_dir=*) d=${a#*=};; --experiment_name=*) n=${a#*=};; --workload=*) w=${a#*=};;"
    folder += " --hparam_end_index=*) t=${a#*=};; esac; done; echo $d/$n/${w}_pytorch/trial_$t)"
    fails = f"#!/bin/bash\nf={folder}\nmkdir -p $f; echo x >> $f/log; [[ $f != */study_2/ogbg_pytorch/trial_3 ]]\n"
    run_plan(tmp_path, fails)
    logs = sorted((tmp_path / "e").rglob("log"))
    assert len(logs) == 120
    assert len(sorted((tmp_path / "e").rglob("finished"))) == 119
    run_plan(tmp_path, fails.replace("[[ $f != */study_2/ogbg_pytorch/trial_3 ]]", "true"))
    assert len(sorted((tmp_path / "e").rglob("finished"))) == 120
    assert {log.read_text() for log in logs} == {"x\n"}  # only the failed one started over


def test_the_plan_follows_the_benchmark(capsys):
    trials = plan.plan()
    assert len({trial.seed for trial in trials}) == len({trial.folder for trial in trials}) == 120
    assert len(json.loads((ROOT / "tuning_search_space.json").read_text())) == plan.POINTS
    words = [shlex.split(trial.command) for trial in trials]
    assert all("--save_checkpoints=False" in line and "--nproc_per_node=8" in line for line in words)
    assert plan.slurm_array(trials).count("submission_runner.py") == 120
    assert set(plan.DATA) == set(published.times("0.6").columns)


def test_the_check_names_what_is_missing(tmp_path):
    submission = tmp_path / plan.SUBMISSION
    places = {"ALGOPERF": str(tmp_path), "DATA": str(tmp_path / "data"), "EXPERIMENTS": str(tmp_path / "new" / "experiments")}
    found = {what: there for what, there, _, _ in check.check_folders(places.get)}
    assert not found["AlgoPerf's runner"]
    assert not found["this submission in AlgoPerf's checkout"]
    assert not found["data of ogbg"]
    (tmp_path / "submission_runner.py").touch()
    (submission / "shampoo").mkdir(parents=True)
    for name in (*check.FILES, *(f"shampoo/{path.name}" for path in (ROOT / "shampoo").glob("*.py"))):
        (submission / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "data" / "ogbg").mkdir(parents=True)
    (tmp_path / "data" / "ogbg" / "file").touch()
    found = {what: there for what, there, _, _ in check.check_folders(places.get)}
    assert found["AlgoPerf's runner"]
    assert found["this submission in AlgoPerf's checkout"]
    assert found["data of ogbg"]
    (submission / "shampoo" / "roots.py").write_text("other")
    words = {what: (there, remedy) for what, there, _, remedy in check.check_folders(places.get)}
    assert not words["this submission in AlgoPerf's checkout"][0]
    assert "shampoo/roots.py" in words["this submission in AlgoPerf's checkout"][1]
    assert not next(check.check_folders({}.get))[1]
