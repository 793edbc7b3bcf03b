"""The commands on the published competition: medians, scores, projection, plan, check."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.competition import check, leaderboard, plan, projection, published
from runner.times import BENCHMARKS

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


def run_plan(folder, script, runner, lacks=(), **variables):
    """Run a script of the plan with a program in place of torchrun, in relative folders with spaces in their names."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "torchrun").write_text(runner)
    (folder / "bin" / "torchrun").chmod(0o755)
    (folder / "script").write_text(script)
    for workload in set(plan.DATA) - set(lacks):
        (folder / "algo perf" / "algoperf" / "workloads" / workload).mkdir(parents=True, exist_ok=True)
    environment = {
        "PATH": f"{folder}/bin:/usr/bin:/bin",
        "ALGOPERF": "algo perf",
        "DATA": "my data",
        "EXPERIMENTS": "my experiments",
        **variables,
    }
    return subprocess.run(
        ["/bin/bash", "script"], env=environment, cwd=folder, capture_output=True, text=True, timeout=1200, check=False
    )


def test_the_plan_runs_every_trial_once_and_resumes(tmp_path):
    cases = {"experiment_dir": "d", "experiment_name": "n", "workload": "w", "hparam_end_index": "t"}
    cases = " ".join(f"--{flag}=*) {name}=${{a#*=}};;" for flag, name in cases.items())
    folder = f"$(for a; do case $a in {cases} esac; done; echo $d/$n/${{w}}_pytorch/trial_$t)"
    fails = f'#!/bin/bash\nf="{folder}"\nmkdir -p "$f"; echo x >> "$f/log"; [[ $f != */study_2/ogbg_pytorch/trial_3 ]]\n'
    script, output = plan.shell_script("external"), tmp_path / "my experiments"
    done = run_plan(tmp_path, script, fails, lacks=["finewebedu_lm"])
    assert set(done.stderr.splitlines()) == {"skipped: AlgoPerf's checkout lacks finewebedu_lm"}
    logs = sorted(output.rglob("log"))
    assert len(logs) == 120
    assert len(sorted(output.rglob("finished"))) == 119
    succeeds = fails.replace("[[ $f != */study_2/ogbg_pytorch/trial_3 ]]", "true")
    run_plan(tmp_path, script, succeeds, lacks=["finewebedu_lm"])
    assert len(sorted(output.rglob("finished"))) == 120
    assert {log.read_text() for log in logs} == {"x\n"}  # only the failed one started over


EXPECTED = {  # what torchrun gets for imagenet_vit in study 2, at point 3 if there is one
    "self": "--standalone --nproc_per_node=4 submission_runner.py --framework=pytorch --workload=imagenet_vit "
    "--submission_path=submissions/self_tuning/adamw_shampoo/submission.py --tuning_ruleset=self",
    "external": "--standalone --nproc_per_node=4 submission_runner.py --framework=pytorch --workload=imagenet_vit "
    "--submission_path=submissions/external_tuning/adamw_shampoo/submission.py --tuning_ruleset=external "
    "--tuning_search_space=submissions/external_tuning/adamw_shampoo/tuning_search_space_2026.json "
    "--num_tuning_trials=5 --hparam_start_index=2 --hparam_end_index=3",
    "competition": "--standalone --nproc_per_node=8 submission_runner.py --framework=pytorch --workload=imagenet_vit "
    "--submission_path=submissions/external_tuning/adamw_shampoo/submission.py --tuning_ruleset=external "
    "--tuning_search_space=submissions/external_tuning/adamw_shampoo/tuning_search_space.json "
    "--num_tuning_trials=5 --hparam_start_index=2 --hparam_end_index=3",
}


@pytest.mark.parametrize(("name", "count"), [("self", 27), ("external", 135), ("competition", 120)])
def test_the_plan_follows_the_benchmark(tmp_path, name, count):
    """The script and the job array call torchrun with AlgoPerf's flags, for each point of each workload in each study."""
    trials, entry = plan.plan(name), plan.ENTRIES[name]
    assert len({trial.seed for trial in trials}) == len(set(trials)) == count
    assert set(entry.workloads) - {"finewebedu_lm"} == set(published.times("0.6").columns)
    if entry.search_space:
        assert len(json.loads((ROOT / entry.search_space).read_text())) == entry.points
    prints = "#!/bin/bash\nprintf '%s\\n' \"$*\"; false\n"
    lines = run_plan(tmp_path, plan.shell_script(name), prints).stdout.splitlines()
    assert len(set(lines)) == count
    chosen = next(i for i, trial in enumerate(trials) if trial[:3] == (2, "imagenet_vit", min(3, entry.points)))
    expected = (
        f"{EXPECTED[name]} --rng_seed={trials[chosen].seed} --data_dir={tmp_path}/my data/imagenet/pytorch "
        f"--experiment_dir={tmp_path}/my experiments/adamw_shampoo_{name} --experiment_name=study_2 "
        f"--save_checkpoints=False --resume_last_run --imagenet_v2_data_dir={tmp_path}/my data/imagenet/pytorch"
    )
    assert lines[chosen] == expected
    of_task = run_plan(tmp_path, plan.slurm_array(name), prints, SLURM_ARRAY_TASK_ID=str(chosen + 1))
    assert of_task.stdout.splitlines() == [expected]


@pytest.mark.parametrize("missing", ["ALGOPERF", "DATA", "EXPERIMENTS", "torchrun"])
def test_the_plan_says_what_it_needs_before_the_first_trial(tmp_path, missing):
    variables = {"PATH": "/nowhere"} if missing == "torchrun" else {missing: ""}
    result = run_plan(tmp_path, plan.shell_script("self"), "#!/bin/bash\necho started\n", **variables)
    assert (result.returncode, result.stdout) == (1, "")
    assert missing in result.stderr


def test_a_dry_run_prints_the_script_in_short_lines_and_the_steps_of_a_submission():
    command = [sys.executable, "-m", "experiments.competition.plan", "--dry_run"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=True).stdout
    script, _, steps = output.partition("\n# To submit")
    assert script == plan.shell_script("self")
    assert max(len(line) for name in plan.ENTRIES for line in plan.shell_script(name).splitlines()) <= 128
    numbered = [line[2:4] for line in steps.splitlines()[1:] if line[2].isdigit()]
    assert numbered == [f"{number}." for number in range(1, 7)]
    assert plan.ENTRIES["self"].submission in steps


@pytest.mark.parametrize("module", ["competition.plan", "competition.published", "competition.self_tuning", "tf32"])
@pytest.mark.slow
def test_a_file_in_place_of_a_folder_is_named(tmp_path, module):
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", f"experiments.{module}", f"--output_dir={tmp_path / 'file'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert str(tmp_path / "file") in result.stderr


def test_the_longest_time_is_that_of_all_budgets():
    budgets = BENCHMARKS["2026"]["workloads"].values()
    hours = 3 * sum(workload["max_allowed_runtime_sec"] for workload in budgets) / 3600
    assert plan.hours("external") == pytest.approx(5 * hours)
    assert plan.hours("self") == pytest.approx(1.5 * hours)


def test_the_check_finds_torchrun_beside_its_python(tmp_path, monkeypatch):
    def requirement(path):
        monkeypatch.setenv("PATH", str(path))
        return next(found for found in check.check_machine(4) if found[0] == "torchrun")

    own = tmp_path / "environment" / "torchrun"
    own.parent.mkdir()
    own.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(own.with_name("python")))
    assert requirement(own.parent)[1:3] == (True, str(own))
    assert requirement("/nowhere")[1:3] == (True, f"{own}; activate its environment before you run trials.sh")
    own.unlink()
    assert requirement("/nowhere")[1:] == (False, "not installed", "install torch in the environment of this Python")


def found(environment, entry):
    """Return whether each requirement on folders is met."""
    return {what: met for what, met, _, _ in check.check_folders(environment.get, plan.ENTRIES[entry])}


def remedies(environment, entry):
    """Return the remedy for each requirement on folders."""
    return {what: remedy for what, _, _, remedy in check.check_folders(environment.get, plan.ENTRIES[entry])}


@pytest.mark.parametrize("name", ["self", "competition"])
def test_the_check_names_what_is_missing(tmp_path, name):
    entry = plan.ENTRIES[name]
    submission, workloads = tmp_path / entry.submission, tmp_path / "algoperf" / "workloads"
    places = {"ALGOPERF": str(tmp_path), "DATA": str(tmp_path / "data"), "EXPERIMENTS": str(tmp_path / "new" / "experiments")}
    met = found(places, name)
    checkout = ["AlgoPerf's runner", "all workloads in AlgoPerf's checkout", "this submission in AlgoPerf's checkout"]
    names = [*checkout, "data in ogbg"]
    assert not any(met[what] for what in names)
    assert met["10 GiB for logs"]
    (tmp_path / "submission_runner.py").touch()
    for workload in entry.workloads:
        (workloads / workload).mkdir(parents=True)
    (submission / "shampoo").mkdir(parents=True)
    for file in [*leaderboard.submission_files(ROOT), *filter(None, [entry.search_space])]:
        (submission / file).write_bytes((ROOT / file).read_bytes())
    (tmp_path / "data" / "ogbg" / "ogbg_molpcba" / "0.1.3").mkdir(parents=True)
    assert "an empty __init__.py" in remedies(places, name)["this submission in AlgoPerf's checkout"]
    (submission / "__init__.py").touch()
    assert all(found(places, name)[what] for what in names)
    (submission / "shampoo" / "roots.py").write_text("other")
    (workloads / "wmt").rmdir()
    (tmp_path / "new").touch()
    assert [what for what in names if not found(places, name)[what]] == names[1:3]
    assert "shampoo/roots.py" in remedies(places, name)["this submission in AlgoPerf's checkout"]
    assert not found(places, name)["10 GiB for logs"]
    assert not any(found({}, name).values())


def test_every_data_set_of_the_plan_is_checked():
    assert {folder for folder, *_ in map(str.split, plan.DATA.values())} == set(check.PARTS)
