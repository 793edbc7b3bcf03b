"""The commands on the published competition: medians, scores, projection, plan, check."""

import json
import subprocess
import sys
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


def run_plan(folder, script, runner, **variables):
    """Run a script of the plan with a program in place of torchrun. The folders have spaces in their names."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "torchrun").write_text(runner)
    (folder / "bin" / "torchrun").chmod(0o755)
    (folder / "script").write_text(script)
    environment = {
        "PATH": f"{folder}/bin:/usr/bin:/bin",
        "ALGOPERF": str(folder),
        "DATA": "/my data",
        "EXPERIMENTS": f"{folder}/my experiments",
        **variables,
    }
    return subprocess.run(
        ["/bin/bash", folder / "script"], env=environment, capture_output=True, text=True, timeout=1200, check=False
    )


def test_the_plan_runs_every_trial_once_and_resumes(tmp_path):
    script = plan.shell_script(plan.plan())
    folder = "$(for a; do case $a in --experiment_dir=*) d=${a#*=};; --experiment_name=*) n=${a#*=};; --workload=*) w=${a#*=};;"
    folder += " --hparam_end_index=*) t=${a#*=};; esac; done; echo $d/$n/${w}_pytorch/trial_$t)"
    fails = f'#!/bin/bash\nf="{folder}"\nmkdir -p "$f"; echo x >> "$f/log"; [[ $f != */study_2/ogbg_pytorch/trial_3 ]]\n'
    run_plan(tmp_path, script, fails)
    logs = sorted((tmp_path / "my experiments").rglob("log"))
    assert len(logs) == 120
    assert len(sorted((tmp_path / "my experiments").rglob("finished"))) == 119
    run_plan(tmp_path, script, fails.replace("[[ $f != */study_2/ogbg_pytorch/trial_3 ]]", "true"))
    assert len(sorted((tmp_path / "my experiments").rglob("finished"))) == 120
    assert {log.read_text() for log in logs} == {"x\n"}  # only the failed one started over


def test_the_plan_follows_the_benchmark(tmp_path):
    """The script and the job array call torchrun with AlgoPerf's flags, for each point of each workload in each study."""
    trials = plan.plan()
    assert len({trial.seed for trial in trials}) == len(set(trials)) == 120
    assert len(json.loads((ROOT / "tuning_search_space.json").read_text())) == plan.POINTS
    assert set(plan.DATA) == set(published.times("0.6").columns)
    prints = "#!/bin/bash\nprintf '%s\\n' \"$*\"; false\n"
    lines = run_plan(tmp_path, plan.shell_script(trials), prints).stdout.splitlines()
    assert len(set(lines)) == 120
    chosen = next(i for i, trial in enumerate(trials) if trial[:3] == (2, "imagenet_vit", 3))
    submission = "submissions/external_tuning/adamw_shampoo"
    expected = (
        "--standalone --nproc_per_node=8 submission_runner.py --framework=pytorch --workload=imagenet_vit "
        f"--submission_path={submission}/submission.py --tuning_search_space={submission}/tuning_search_space.json "
        f"--num_tuning_trials=5 --hparam_start_index=2 --hparam_end_index=3 --rng_seed={trials[chosen].seed} "
        f"--data_dir=/my data/imagenet/pytorch --experiment_dir={tmp_path}/my experiments/adamw_shampoo "
        "--experiment_name=study_2 --save_checkpoints=False --resume_last_run --imagenet_v2_data_dir=/my data/imagenet/pytorch"
    )
    assert lines[chosen] == expected
    of_task = run_plan(tmp_path, plan.slurm_array(trials), prints, SLURM_ARRAY_TASK_ID=str(chosen + 1))
    assert of_task.stdout.splitlines() == [expected]


@pytest.mark.parametrize("missing", ["ALGOPERF", "DATA", "EXPERIMENTS", "torchrun"])
def test_the_plan_says_what_it_needs_before_the_first_trial(tmp_path, missing):
    variables = {"PATH": "/nowhere"} if missing == "torchrun" else {missing: ""}
    result = run_plan(tmp_path, plan.shell_script(plan.plan()), "#!/bin/bash\necho started\n", **variables)
    assert (result.returncode, result.stdout) == (1, "")
    assert missing in result.stderr


def test_a_dry_run_prints_the_script_in_short_lines_and_the_steps_of_a_submission():
    command = [sys.executable, "-m", "experiments.competition.plan", "--dry_run"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=True).stdout
    script, _, steps = output.partition("\n# To submit")
    assert script == plan.shell_script(plan.plan())
    assert max(map(len, output.splitlines())) <= 128
    assert [line[:4] for line in steps.splitlines()[1:]] == [f"# {number}." for number in range(1, 6)]
    assert plan.SUBMISSION in steps


def test_the_check_finds_torchrun_beside_its_python(tmp_path, monkeypatch):
    def requirement(path):
        monkeypatch.setenv("PATH", str(path))
        return next(found for found in check.check_machine() if found[0] == "torchrun")

    own = tmp_path / "environment" / "torchrun"
    own.parent.mkdir()
    own.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(own.with_name("python")))
    assert requirement(own.parent)[1:3] == (True, str(own))
    assert requirement("/nowhere")[1:3] == (True, f"{own}; activate its environment before you run trials.sh")
    own.unlink()
    assert requirement("/nowhere")[1:] == (False, "not installed", "install torch in the environment of this Python")


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
