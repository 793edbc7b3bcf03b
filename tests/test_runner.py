"""The local runner from outside: its files, its clock, resuming, bad input; and its workloads."""

import runner  # noqa: F401  brings algoperf.spec

# isort: split

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import networkx
import numpy as np
import pandas as pd
import pytest
import torch
from algoperf import spec

import submission
from runner import data, loop
from runner.logs import MetricLogger, append_row, experiment_folder
from runner.loop import fold_in, split
from runner.search_space import read_points
from runner.workloads import WORKLOADS, load_workload
from runner.workloads.airports_dlrm import load_airports
from runner.workloads.pydoc_lm import TEST_TOPICS, VALIDATION_TOPICS, load_topics
from runner.workloads.solubility_gnn import MAX_ATOMS, load_molecules, parse_sdf

ROOT = Path(__file__).parents[1]


def run(folder, *flags, name="e", workload="pydoc_lm", timeout=120, check=True):
    """Run the command line on one thread; the completed process."""
    command = [sys.executable, "-m", "runner", f"--workload={workload}", "--submission_path=submission.py"]
    if not any(flag.startswith("--tuning_search_space") for flag in flags):
        command.append("--tuning_search_space=tuning_search_space.json")
    command += [f"--experiment_dir={folder}", f"--experiment_name={name}", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two points, three steps each: its output and its folder."""
    folder = tmp_path_factory.mktemp("run")
    flags = ("--num_tuning_trials=2", "--max_global_steps=3", "--rng_seed=7", "--data_dir=/nowhere", "--framework=pytorch")
    return run(folder, *flags), folder / "e" / "pydoc_lm_pytorch"


def test_first_line_says_where_spec_comes_from(finished):
    result, _ = finished
    assert "algoperf" in result.stdout.splitlines()[0]
    assert "--data_dir has no meaning here" in result.stdout


def test_the_files_are_algoperfs(finished):
    _, folder = finished
    for trial in ("trial_1", "trial_2"):
        names = {re.sub(r"tfevents.*", "tfevents", path.name) for path in (folder / trial).iterdir()}
        assert names == {
            "hparams.json", "meta_data_0.json", "flags_0.json", "measurements.csv", "eval_measurements.csv", "checkpoint_3",
            "events.out.tfevents",
        }  # fmt: skip
    assert (
        json.loads((folder / "trial_2" / "hparams.json").read_text())
        == json.loads((ROOT / "tuning_search_space.json").read_text())[1]
    )


def test_the_columns_are_algoperfs(finished):
    """As AlgoPerf's own runner wrote them for mnist; its metrics there are accuracy and loss, here the loss alone."""
    evaluations = pd.read_csv(finished[1] / "trial_1" / "eval_measurements.csv")
    assert list(evaluations.columns) == [
        "accumulated_eval_time", "accumulated_logging_time", "accumulated_submission_time", "global_step", "preemption_count",
        "score", "test/loss", "test/num_examples", "total_duration", "train/loss", "validation/loss", "validation/num_examples",
    ]  # fmt: skip
    assert list(evaluations["global_step"]) == [1, 3]  # the first step is always followed by an evaluation, and the last
    assert (evaluations["score"] == evaluations["accumulated_submission_time"]).all()
    assert evaluations["score"].is_monotonic_increasing
    everything = pd.read_csv(finished[1] / "trial_1" / "measurements.csv")
    assert list(everything.columns[:4]) == ["global_step", "grad_norm", "learning_rate", "loss"]
    assert len(everything) == 1 + 2 + 1  # one logged step, two evaluations, the final score


def test_it_ends_with_a_table_and_a_picture(finished):
    result, folder = finished
    table = result.stdout[result.stdout.index("trial 1 ") :]
    assert all(row in table for row in ("learning_rate", "steps to target", "best validation/loss", "0 of 2 trials reached"))
    assert "epsilon" not in table  # only what differs
    assert (folder / "validation.png").read_bytes().startswith(b"\x89PNG")


def test_an_existing_experiment_is_not_touched(finished):
    _, folder = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    result = run(folder.parents[1], "--max_global_steps=1", check=False)
    assert result.returncode == 1
    assert all(word in result.stderr for word in (str(folder), "--resume_last_run", "--overwrite"))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_resumed_trial_equals_an_uninterrupted_one(tmp_path, name):
    """Bit for bit: weights, optimizer, batch norm's buffers; dropout and data order go on where they stopped."""
    point = read_points(ROOT / "tuning_search_space.json", 1, seed=0)[0]._replace(precondition_frequency=2)
    assert point.dropout_rate > 0

    def train_to(step, folder):
        folder.mkdir(exist_ok=True)
        settings = loop.Settings(16, step, None, True, True, False, {})
        loop.run_trial(load_workload(name), submission, point, 3, folder, settings, lambda *_: None)
        return torch.load(folder / f"checkpoint_{step}", weights_only=True)

    half = train_to(3, tmp_path / "halves")
    half["train_state"]["training_complete"] = False  # as in a checkpoint that is written on the way
    torch.save(half, tmp_path / "halves" / "checkpoint_3")
    resumed, whole = train_to(6, tmp_path / "halves"), train_to(6, tmp_path / "whole")
    assert (resumed["preemption_count"], whole["preemption_count"]) == (1, 0)
    for key, expected in whole["model_params"].items():
        assert torch.equal(resumed["model_params"][key], expected)
    for i, state in whole["optimizer_state"]["optimizer"]["state"].items():
        assert all(torch.equal(resumed["optimizer_state"]["optimizer"]["state"][i][key], x) for key, x in state.items())


def test_resume_last_run_keeps_seed_and_hyperparameters(tmp_path):
    run(tmp_path, "--max_global_steps=2")
    trial = tmp_path / "e" / "pydoc_lm_pytorch" / "trial_1"
    checkpoint = torch.load(trial / "checkpoint_2", weights_only=True)
    checkpoint["train_state"]["training_complete"] = False
    torch.save(checkpoint, trial / "checkpoint_2")
    hyperparameters = (trial / "hparams.json").read_text()
    (tmp_path / "other.json").write_text(json.dumps(json.loads((ROOT / "tuning_search_space.json").read_text())[1:]))
    run(tmp_path, "--resume_last_run", "--max_global_steps=3", f"--tuning_search_space={tmp_path / 'other.json'}")
    assert list(pd.read_csv(trial / "eval_measurements.csv")["global_step"]) == [1, 2, 3]
    assert list(pd.read_csv(trial / "eval_measurements.csv")["preemption_count"]) == [0, 0, 1]
    seeds = [json.loads((trial / f"meta_data_{i}.json").read_text())["rng_seed"] for i in (0, 1)]
    assert seeds[0] == seeds[1]
    assert (trial / "hparams.json").read_text() == hyperparameters


def test_a_trial_that_fails_leaves_the_others_running(tmp_path):
    (tmp_path / "failing.py").write_text(
        "from submission import *\n"
        "import submission\n"
        "def update_params(**arguments):\n"
        "    if arguments['hyperparameters'].grafting == 'sgd':\n"
        "        raise ArithmeticError('diverged')\n"
        "    return submission.update_params(**arguments)\n"
    )
    result = run(
        tmp_path,
        f"--submission_path={tmp_path / 'failing.py'}",
        "--num_tuning_trials=4",
        "--hparam_start_index=2",
        "--max_global_steps=1",
    )
    assert "trial 3 failed: ArithmeticError('diverged')" in result.stdout
    assert "diverged" in (tmp_path / "e/pydoc_lm_pytorch/trial_3/error.txt").read_text()
    assert "trial 4" in result.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--workload=mnist_resnt"],
            f"unknown workload 'mnist_resnt'; there are {', '.join(WORKLOADS)}; did you mean mnist_resnet?",
        ),
        (["--submission_path=nothing.py"], "the submission path is 'nothing.py'; it must be a Python file that exists"),
        (["--submission_path=runner/data.py"], "lacks get_batch_size, init_optimizer_state, update_params, data_selection"),
        (["--tuning_search_space=nothing.json"], "the search space nothing.json cannot be read"),
        (["--experiment_name=../elsewhere"], "the experiment name is '../elsewhere'; it must name a folder inside"),
    ],
)
def test_bad_flags_are_named_with_their_remedy(tmp_path, flags, message):
    result = run(tmp_path / "inside", *flags, check=False)
    assert result.returncode == 1
    assert f"error: {message}" in result.stderr or message in result.stderr
    assert "Traceback" not in result.stderr
    assert not tmp_path.exists() or not any(tmp_path.iterdir())


def test_every_point_is_checked_before_the_first_trial(tmp_path):
    points = json.loads((ROOT / "tuning_search_space.json").read_text())
    del points[1]["epsilon"], points[0]["epsilon"], points[2]["epsilon"], points[3]["epsilon"], points[4]["epsilon"]
    (tmp_path / "space.json").write_text(json.dumps(points))
    result = run(tmp_path, f"--tuning_search_space={tmp_path / 'space.json'}", "--num_tuning_trials=2", check=False)
    assert result.returncode == 1
    assert re.search(r"space\.json, point 1: .*missing: \['epsilon'\]", result.stderr)
    assert not (tmp_path / "e").exists()


class Clock:
    """Time that passes only where the test says so."""

    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        return self.time


@pytest.fixture
def timed_trial(monkeypatch, tmp_path):
    """Run a trial in which a step takes 1 s, preparing 0.25 s and evaluating 10 s; evaluations are due every 3 s."""
    clock, calls = Clock(), []
    workload = load_workload("pydoc_lm")
    workload.eval_period_time_sec = 3

    def update_params(**arguments):
        clock.time += 1
        calls.append(("step", arguments["global_step"], dict(arguments["train_state"])))
        with pytest.raises(TypeError):
            arguments["train_state"]["is_time_remaining"] = True  # read-only
        if arguments["global_step"] == complete_at:
            raise spec.TrainingCompleteError
        return arguments["optimizer_state"], arguments["current_param_container"], arguments["model_state"]

    # The runner passes train_state only to a submission that names it.
    update_params.__signature__ = inspect.Signature([inspect.Parameter("train_state", inspect.Parameter.KEYWORD_ONLY)])

    def prepare_for_eval(**arguments):
        clock.time += 0.25
        calls.append(("prepare", arguments["global_step"], arguments.keys()))
        return arguments["optimizer_state"], arguments["current_param_container"], arguments["model_state"]

    def eval_model(*arguments):
        clock.time += 10
        calls.append(("evaluate", arguments[-1], None))
        return {f"{split}/loss": 9.0 for split in ("train", "validation", "test")}

    submission = SimpleNamespace(
        init_optimizer_state=lambda *_: {},
        data_selection=lambda *_: None,
        update_params=update_params,
        prepare_for_eval=prepare_for_eval,
    )
    monkeypatch.setattr(loop, "now", clock)
    monkeypatch.setattr(workload, "eval_model", eval_model)
    complete_at = None

    def go(budget, complete=None, every=None):
        nonlocal complete_at
        complete_at, workload.max_allowed_runtime_sec = complete, budget
        settings = loop.Settings(16, None, every, True, False, False, {})
        loop.run_trial(workload, submission, None, 0, tmp_path, settings, lambda *_: None)
        return calls, pd.read_csv(tmp_path / "eval_measurements.csv"), torch.load(next(tmp_path.glob("checkpoint_*")))

    return go


def test_steps_and_preparation_are_timed_evaluation_is_not(timed_trial):
    calls, evaluations, _ = timed_trial(budget=9)
    # After step 1 always, then as soon as 3 s have passed since the last one's end; at 9 s the time is up: no evaluation.
    assert [call[:2] for call in calls if call[0] != "step"] == [
        ("prepare", 1), ("evaluate", 1), ("prepare", 4), ("evaluate", 4), ("prepare", 7), ("evaluate", 7), ("prepare", 10),
    ]  # fmt: skip
    assert list(evaluations["score"]) == [1.25, 4.5, 7.75]
    assert list(evaluations["accumulated_eval_time"]) == [10, 20, 30]
    assert list(evaluations["total_duration"]) == [11.25, 24.5, 37.75]
    assert calls[1][2] >= {"workload", "hyperparameters", "optimizer_state", "eval_results", "rng"}
    assert not calls[1][2] & {"batch", "train_state"}
    seen = next(state for name, step, state in calls if (name, step) == ("step", 4))
    assert seen["accumulated_submission_time"] == 4.5
    assert seen["accumulated_eval_time"] == 20
    assert seen["is_time_remaining"]


def test_a_submission_may_end_its_run(timed_trial):
    calls, evaluations, checkpoint = timed_trial(budget=100, complete=2)
    assert [step for name, step, _ in calls if name == "step"] == [0, 1, 2]
    assert list(evaluations["global_step"]) == [1, 3]
    assert checkpoint["train_state"]["training_complete"]


def test_evaluation_by_steps(timed_trial):
    _, evaluations, _ = timed_trial(budget=100, complete=8, every=4)
    assert list(evaluations["global_step"]) == [1, 4, 8, 9]


# Search spaces


def write(tmp_path, space):
    path = tmp_path / "space.json"
    path.write_text(json.dumps(space))
    return path


def test_a_list_space_gives_its_first_points(tmp_path):
    points = read_points(write(tmp_path, [{"a": i, "b": "x"} for i in range(5)]), 3, seed=0)
    assert [point._asdict() for point in points] == [{"a": i, "b": "x"} for i in range(3)]


def test_a_range_space_is_sampled_evenly_and_by_seed(tmp_path):
    space = {
        "lr": {"min": 1e-4, "max": 1e-1, "scaling": "log"},
        "momentum": {"min": 0.5, "max": 1.0, "scaling": "linear"},
        "grafting": {"feasible_points": ["adam", "sgd", "none"]},
    }
    path = write(tmp_path, space)
    points = read_points(path, 300, seed=1)
    assert points == read_points(path, 300, seed=1) != read_points(path, 300, seed=2)
    decades = np.histogram(np.log10([point.lr for point in points]), bins=[-4, -3, -2, -1])[0]
    halves = np.histogram([point.momentum for point in points], bins=[0.5, 0.75, 1.0])[0]
    thirds = [sum(point.grafting == name for point in points) for name in ("adam", "sgd", "none")]
    assert abs(decades - 100).max() <= 3  # random points would stray by 8
    assert abs(halves - 150).max() <= 3
    assert abs(np.array(thirds) - 100).max() <= 3


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ([{"a": 1, "b": 2}, {"a": 1}], r"point 2 must have the keys of point 1; they differ in \['b'\]"),
        ({"lr": {"min": 0.0, "max": 1.0, "scaling": "log"}}, "lr is .*; it must be"),
        ({"lr": {"min": 1.0, "max": 0.0, "scaling": "linear"}}, "lr is .*; it must be"),
        ({"lr": {"min": 1.0, "max": 2.0}}, "lr is .*; it must be"),
        ({"lr": {"feasible_points": []}}, "lr is .*; it must be"),
        ([], "must hold a list of points"),
        ("text", "must hold a list of points"),
        ([{"not a name": 1}], "not a name"),
    ],
)
def test_a_bad_space_is_refused(tmp_path, space, message):
    with pytest.raises(ValueError, match=message):
        read_points(write(tmp_path, space), 2, seed=0)


# Data and workloads


def test_a_changed_or_missing_data_file_is_named(tmp_path):
    (tmp_path / "file").write_text("changed")
    with pytest.raises(data.DataError, match=r"file has sha256 [0-9a-f]{64}; it must have abc; reinstall it"):
        data.checked(tmp_path / "file", "abc", "reinstall it")
    with pytest.raises(data.DataError, match="nothing does not exist; reinstall it"):
        data.checked(tmp_path / "nothing", "abc", "reinstall it")
    with pytest.raises(data.DataError, match=r"pip install --no-deps no_such_package==1\.2"):
        data.package_file("no_such_package", "1.2", "file", "abc")


@pytest.fixture(scope="module", params=WORKLOADS)
def workload(request):
    return load_workload(request.param)


def test_splits_are_disjoint_and_the_same_every_time(workload):
    rows = {split: {tuple(x.flatten().tolist()) for x in examples["inputs"]} for split, examples in workload._splits.items()}
    same_place = 1 if type(workload).__name__ == "AirportsDLRM" else 0  # two airports; by identity they are told apart below
    assert len(rows["train"] & rows["validation"]) == same_place
    assert not (rows["train"] | rows["validation"]) & rows["test"]
    assert rows["eval_train"] <= rows["train"]
    again = load_workload(next(name for name, cls in WORKLOADS.items() if cls == type(workload).__name__))
    assert all(torch.equal(x, again._splits[s][key]) for s, examples in workload._splits.items() for key, x in examples.items())


def test_pydoc_topics_of_different_splits_share_no_passage():
    topics = load_topics()
    names = {"validation": VALIDATION_TOPICS, "test": TEST_TOPICS}
    names["train"] = tuple(topics.keys() - {*VALIDATION_TOPICS, *TEST_TOPICS})
    passages = {s: {topics[n][i : i + 60] for n in group for i in range(len(topics[n]) - 59)} for s, group in names.items()}
    assert not passages["train"] & passages["validation"]
    assert not (passages["train"] | passages["validation"]) & passages["test"]


def test_no_airport_is_in_two_splits_and_what_train_lacks_has_code_0():
    tables = load_airports()
    codes = {split: set(table.index) for split, table in tables.items()}
    assert [len(names) for names in codes.values()] == [22000, 3000, 3298]
    assert len(set.union(*codes.values())) == 28298
    inputs = load_workload("airports_dlrm")._splits["test"]["inputs"]
    unseen = ~tables["test"]["subd"].isin(tables["train"]["subd"]).to_numpy()
    assert unseen.any()
    assert (inputs[unseen, 1] == 0).all()


def test_no_molecule_is_in_two_splits():
    """By labels that isomorphic graphs share, so that molecules of different labels differ."""

    def label(molecule):
        atoms = int((molecule.diagonal() > 0).sum())
        graph = networkx.from_numpy_array(molecule[:atoms, :atoms].numpy())
        networkx.set_node_attributes(graph, dict(enumerate(molecule.diagonal().tolist())), "element")
        return networkx.weisfeiler_lehman_graph_hash(graph, edge_attr="weight", node_attr="element", iterations=6)

    labels = {split: {label(molecule) for molecule in examples["inputs"]} for split, examples in load_molecules().items()}
    assert not labels["train"] & labels["validation"]
    assert not (labels["train"] | labels["validation"]) & labels["test"]


SDF = """acetonitrile and a chlorine
     by hand

  4  2  0  0  0  0            999 V2000
    0.0000    0.0000    0.0000 C   0  0
    1.5000    0.0000    0.0000 C   0  0
    2.6000    0.0000    0.0000 N   0  0
    9.0000    0.0000    0.0000 Cl  0  0
  1  2  1  0
  2  3  3  0
M  END
> <SOL>
-0.25

$$$$
"""


def test_an_sdf_file_is_read():
    molecules, solubility = parse_sdf(SDF + SDF.replace("-0.25", "1.5"))
    assert molecules.shape == (2, MAX_ATOMS, MAX_ATOMS)
    assert molecules[0, :4, :4].tolist() == [[1, 1, 0, 0], [1, 1, 3, 0], [0, 3, 3, 0], [0, 0, 0, 4]]
    assert molecules[0].sum() == 1 + 1 + 3 + 4 + 2 * (1 + 3)
    assert torch.equal(molecules[0], molecules[1])
    assert solubility.tolist() == [-0.25, 1.5]


def test_neither_padding_nor_the_order_of_atoms_changes_a_prediction():
    workload = load_workload("solubility_gnn")
    model, _ = workload.init_model_fn([0, 0])
    molecules = workload._splits["test"]["inputs"]
    sizes = (molecules.diagonal(dim1=1, dim2=2) > 0).sum(1)
    small, large = molecules[sizes.argmin()], molecules[sizes.argmax()]
    atoms = int(sizes.min())
    alone, padded, reordered = (
        model(x) for x in (small[None, :atoms, :atoms], torch.stack([small, large]), small.flip(0, 1)[None, -atoms:, -atoms:])
    )
    torch.testing.assert_close(padded[:1], alone)
    torch.testing.assert_close(reordered, alone)


def test_rmse_is_in_the_units_of_log_solubility():
    workload = load_workload("solubility_gnn")
    model, _ = workload.init_model_fn([0, 0])
    found = workload._eval_model_on_split("test", 257, 100, model, None, None, "")
    test, train = (load_molecules()[split] for split in ("test", "train"))
    deviation, mean = torch.std_mean(train["targets"])
    with torch.no_grad():
        errors = model(test["inputs"]) * deviation + mean - test["targets"]
    assert found["rmse"] == pytest.approx(errors.square().mean().sqrt().item(), rel=1e-5)
    assert found["loss"] == pytest.approx((errors / deviation).square().mean().item(), rel=1e-5)


def test_weights_and_batches_depend_on_the_seed_alone(workload):
    rngs = split(np.array([0, 1]), 2)
    weights = [[p.detach().clone() for p in workload.init_model_fn(rng)[0].parameters()] for rng in (rngs[0], rngs[0], rngs[1])]
    assert all(torch.equal(p, q) for p, q in zip(weights[0], weights[1]))
    assert any(not torch.equal(p, q) for p, q in zip(weights[0], weights[2]))
    batches = [next(workload._build_input_queue(rng, "train", "", 8))["inputs"] for rng in (rngs[0], rngs[0], rngs[1])]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_an_epoch_holds_every_example_once_and_the_next_is_shuffled_anew(workload):
    size = workload.num_train_examples
    queue = workload._build_input_queue(fold_in(np.array([0, 1]), 5), "train", "", size // 4)
    epochs = [torch.cat([next(queue)["inputs"].flatten(1) for _ in range(4)]) for _ in range(2)]
    whole = workload._splits["train"]["inputs"].flatten(1)
    assert all(len(epoch) == size // 4 * 4 for epoch in epochs)
    if size % 4 == 0:
        assert all(torch.equal(epoch.double().sum(0), whole.double().sum(0)) for epoch in epochs)
    assert not torch.equal(*epochs)


def test_parameter_types_are_algoperfs(workload):
    model, _ = workload.init_model_fn([0, 0])
    kinds = {name: kind.name for name, kind in workload.model_params_types.items()}
    assert kinds.keys() == dict(model.named_parameters()).keys() == workload.param_shapes.keys()
    expected = {
        "MnistResNet": {
            "conv.weight": "CONV_WEIGHT",
            "bn.weight": "BATCH_NORM_SCALE",
            "blocks.2.skip.1.bias": "BATCH_NORM_BIAS",
            "output.weight": "WEIGHT",
            "output.bias": "BIAS",
        },
        "PydocLM": {
            "characters.weight": "EMBEDDING",
            "layers.0.qkv.weight": "ATTENTION_QKV",
            "layers.0.qkv.bias": "ATTENTION_BIAS",
            "layers.1.out.weight": "ATTENTION_OUT",
            "layers.1.norm1.weight": "LAYER_NORM_SCALE",
            "norm.bias": "LAYER_NORM_BIAS",
            "layers.0.up.weight": "WEIGHT",
            "output.bias": "BIAS",
        },
        "AirportsDLRM": {
            "embeddings.2.weight": "EMBEDDING",
            "bottom.0.weight": "WEIGHT",
            "top.2.bias": "BIAS",
            "output.weight": "WEIGHT",
        },
        "SolubilityGNN": {
            "elements.weight": "EMBEDDING",
            "layers.3.linear.weight": "WEIGHT",
            "layers.3.linear.bias": "BIAS",
            "layers.0.norm.weight": "LAYER_NORM_SCALE",
            "layers.0.norm.bias": "LAYER_NORM_BIAS",
            "hidden.weight": "WEIGHT",
        },
    }[type(workload).__name__]
    assert {name: kinds[name] for name in expected} == expected
    assert [name for name in kinds if workload.is_output_params(name)] == ["output.weight", "output.bias"]


def test_a_mask_leaves_examples_out(workload):
    model, _ = workload.init_model_fn([0, 0])
    batch = next(workload._build_input_queue([0, 0], "validation", "", 6))
    logits = model.eval()(batch["inputs"])
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    masked = workload.loss_fn(batch["targets"], logits, mask)
    kept = workload.loss_fn(batch["targets"][mask > 0], logits[mask > 0])
    assert masked["n_valid_examples"] == kept["n_valid_examples"] == 4
    torch.testing.assert_close(masked["summed"], kept["summed"])
    assert (masked["per_example"][mask == 0] == 0).all()


# Logs


def test_rows_are_appended_with_new_columns_behind(tmp_path):
    path = tmp_path / "m.csv"
    append_row(path, {"b": 1.0, "a": 2.0})
    append_row(path, {"c": 3.0, "a": 4.0})
    assert path.read_text() == "a,b,c\n2.0,1.0,\n4.0,,3.0\n"


def test_metrics_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = MetricLogger(tmp_path)
    logger.append_scalar_metrics({"loss": 2.0}, 0)
    logger.append_scalar_metrics({"loss": 1.5}, 50)
    logger.finish()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 2.0), (50, 1.5)]


@pytest.mark.parametrize("name", ["..", "../x", "/tmp/x", ".", ""])
def test_an_experiment_stays_inside_its_folder(tmp_path, name):
    with pytest.raises(ValueError, match="must name a folder inside"):
        experiment_folder(str(tmp_path / "a"), name, "w", resume=False, overwrite=True)
