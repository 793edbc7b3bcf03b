"""The workloads: data, splits, batches, models, losses and metrics."""

import runner  # noqa: F401  makes algoperf.spec importable

# isort: split

from collections import Counter

import networkx
import numpy as np
import pandas as pd
import pytest
import torch
from skimage import metrics
from torch import Tensor

from runner import data, distributed
from runner.loop import fold_in, split
from runner.workloads import WORKLOADS, load_workload
from runner.workloads.base import DEVICE, map_tensors, rows
from runner.workloads.flights_dlrm import CATEGORIES, NUMBERS, load_flights
from runner.workloads.mnist import shifted
from runner.workloads.mnist_unet import structural_similarity, undersampled
from runner.workloads.pydoc_lm import TEST_TOPICS, VALIDATION_TOPICS, load_topics
from runner.workloads.solubility_gnn import MAX_ATOMS, load_molecules, parse_sdf


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


def tensors(x):
    """Return the one or two tensors of a batch's inputs or targets."""
    return x if isinstance(x, tuple) else (x,)


@pytest.mark.slow
def test_splits_are_disjoint_and_reproducible(workload):
    inputs = {split: tensors(examples["inputs"])[0] for split, examples in workload._splits.items()}
    found = {split: {tuple(x.flatten().tolist()) for x in examples} for split, examples in inputs.items()}
    if type(workload).__name__ != "FlightsDLRM":  # different flights may look the same; another test compares identities
        assert not found["train"] & found["validation"]
        assert not (found["train"] | found["validation"]) & found["test"]
    assert found["eval_train"] <= found["train"]
    again = load_workload(next(name for name, cls in WORKLOADS.items() if cls == type(workload).__name__))
    for name, examples in workload._splits.items():
        for key, x in examples.items():
            assert all(torch.equal(*pair) for pair in zip(tensors(x), tensors(again._splits[name][key])))


def test_pydoc_topics_of_different_splits_share_no_passage():
    topics = load_topics()
    names = {"validation": VALIDATION_TOPICS, "test": TEST_TOPICS}
    names["train"] = tuple(topics.keys() - {*VALIDATION_TOPICS, *TEST_TOPICS})
    passages = {s: {topics[n][i : i + 60] for n in group for i in range(len(topics[n]) - 59)} for s, group in names.items()}
    assert not passages["train"] & passages["validation"]
    assert not (passages["train"] | passages["validation"]) & passages["test"]


def test_flights_are_those_whose_arrival_is_known():
    tables = load_flights()
    assert {name: len(table) for name, table in tables.items()} == {"train": 273_089, "validation": 30_000, "test": 30_000}
    everything = pd.concat(tables.values())
    assert not everything.index.duplicated().any()
    assert not everything[CATEGORIES].isna().any(axis=None)
    # Of 336,776 flights, 9,430 have no arrival delay; 8,255 of these were canceled, 2,512 of them before they had a plane.
    assert len(everything) == 336_776 - (9430 - 8255) - 2512
    assert everything["wind_speed"].max() < 50
    assert 0.249 < everything["late"].mean() < 0.251


def test_flights_are_encoded_from_the_training_split():
    train, test = (load_flights()[split] for split in ("train", "test"))
    splits = {name: map_tensors(Tensor.cpu, split) for name, split in load_workload("flights_dlrm")._splits.items()}
    codes, numbers = splits["train"]["inputs"].split([len(CATEGORIES), len(NUMBERS)], dim=1)
    torch.testing.assert_close(numbers.mean(dim=0), torch.zeros(len(NUMBERS)), atol=1e-3, rtol=0)
    known = torch.from_numpy(train[NUMBERS].notna().to_numpy())
    assert (numbers[~known] == 0).all()  # gaps get the mean
    torch.testing.assert_close(numbers[:, 0].std(), torch.tensor(1.0))
    unseen = ~test["tailnum"].isin(train["tailnum"]).to_numpy()
    assert unseen.any()
    assert (splits["test"]["inputs"][unseen, CATEGORIES.index("tailnum")] == 0).all()
    assert codes.max(dim=0).values.tolist()[2] == 3  # three airports of origin


def test_no_molecule_is_in_two_splits():
    """Isomorphic graphs have equal labels, so molecules with different labels differ."""

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
    unpadded, padded, reordered = (
        model(x) for x in (small[None, :atoms, :atoms], torch.stack([small, large]), small.flip(0, 1)[None, -atoms:, -atoms:])
    )
    torch.testing.assert_close(padded[:1], unpadded)
    torch.testing.assert_close(reordered, unpadded)


def test_rmse_is_in_the_units_of_log_solubility():
    workload = load_workload("solubility_gnn")
    model, _ = workload.init_model_fn([0, 0])
    found = workload._eval_model_on_split("test", 257, 100, model, None, None, "")
    test, train = (load_molecules()[split] for split in ("test", "train"))
    deviation, mean = torch.std_mean(train["targets"])
    with torch.no_grad():
        errors = model.cpu()(test["inputs"]) * deviation + mean - test["targets"]
    assert found["rmse"] == pytest.approx(errors.square().mean().sqrt().item(), rel=1e-5)
    assert found["loss"] == pytest.approx((errors / deviation).square().mean().item(), rel=1e-5)


def test_weights_and_batches_depend_only_on_the_seed(workload):
    rngs = split(np.array([0, 1]), 2)
    weights = [[p.detach().clone() for p in workload.init_model_fn(rng)[0].parameters()] for rng in (rngs[0], rngs[0], rngs[1])]
    assert all(torch.equal(p, q) for p, q in zip(weights[0], weights[1]))
    assert any(not torch.equal(p, q) for p, q in zip(weights[0], weights[2]))
    batches = [next(workload._build_input_queue(rng, "train", "", 8)) for rng in (rngs[0], rngs[0], rngs[1])]
    batches = [tensors(batch["inputs"])[0] for batch in batches]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


@pytest.mark.slow
def test_an_epoch_has_every_example_once_and_the_next_is_reshuffled(workload, monkeypatch):
    monkeypatch.setattr(workload, "augment", lambda batch, draw: batch)
    size = workload.num_train_examples // 4 * 4
    queue = workload._build_input_queue(fold_in(np.array([0, 1]), 5), "train", "", size // 4)
    train = [tuple(x.flatten().tolist()) for x in tensors(workload._splits["train"]["inputs"])[0]]
    epochs = [[tuple(x.flatten().tolist()) for _ in range(4) for x in tensors(next(queue)["inputs"])[0]] for _ in range(2)]
    assert all(len(epoch) == size and not Counter(epoch) - Counter(train) for epoch in epochs)  # some texts occur twice
    assert epochs[0] != epochs[1]


def test_training_batches_alone_are_augmented(workload):
    batch = rows(workload._splits["train"], slice(8))
    draws = [workload.augment(batch, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    inputs = [tensors(x["inputs"])[0] for x in (batch, *draws)]
    assert torch.equal(inputs[1], inputs[2])
    assert inputs[1].shape == inputs[0].shape
    assert all(map(torch.equal, tensors(draws[0]["targets"]), tensors(batch["targets"])))
    augmented = type(workload).__name__ in ("MnistResNet", "MnistViT", "MnistUNet", "FsddConformer", "FsddLSTM")
    assert torch.equal(inputs[1], inputs[3]) != augmented
    evaluated = next(workload._build_input_queue([0, 0], "validation", "", 8))
    assert torch.equal(tensors(evaluated["inputs"])[0], tensors(workload._splits["validation"]["inputs"])[0][:8])


@pytest.mark.parametrize("name", ["mnist_vit", "fsdd_lstm"])
def test_ranks_share_an_augmented_batch(name, monkeypatch):
    workload = load_workload(name)
    whole = next(workload._build_input_queue([0, 1], "train", "", 8))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(next(workload._build_input_queue([0, 1], "train", "", 8)))
    for key in ("inputs", "targets"):
        for x, *halves in zip(*(tensors(batch[key]) for batch in (whole, *parts))):
            assert torch.equal(torch.cat(halves), x)


def test_images_are_moved_and_zeros_move_in():
    image = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
    moved = shifted(image.expand(3, 1, 4, 4), np.array([[2, 2], [3, 2], [1, 4]]))  # by (0, 0), (1, 0), and (-1, 2)
    assert torch.equal(moved[0, 0], image[0, 0])
    assert torch.equal(moved[1, 0], torch.cat([torch.zeros(1, 4), image[0, 0, :3]]))
    assert moved[2, 0].tolist() == [[0, 0, 5, 6], [0, 0, 9, 10], [0, 0, 13, 14], [0, 0, 0, 0]]


def test_parameter_types_are_algoperfs(workload):
    model, _ = workload.init_model_fn([0, 0])
    kinds = {name: kind.name for name, kind in workload.model_params_types.items()}
    assert kinds.keys() == dict(model.named_parameters()).keys() == workload.param_shapes.keys()
    expected = {
        "FsddConformer": {
            "subsampling.conv.weight": "CONV_WEIGHT",
            "blocks.0.before.up.weight": "WEIGHT",
            "blocks.0.attention.qkv.weight": "ATTENTION_QKV",
            "blocks.1.attention.out.bias": "ATTENTION_BIAS",
            "blocks.0.convolution.depthwise.weight": "CONV_WEIGHT",
            "blocks.1.convolution.bn.weight": "BATCH_NORM_SCALE",
            "blocks.1.norm.bias": "LAYER_NORM_BIAS",
        },
        "FsddLSTM": {
            "subsampling.conv.bias": "BIAS",
            "layers.0.forwards.weight_ih_l0": "WEIGHT",
            "layers.0.backwards.weight_hh_l0": "WEIGHT",
            "layers.1.forwards.bias_ih_l0": "BIAS",
            "layers.1.bn.bias": "BATCH_NORM_BIAS",
        },
        "MnistResNet": {
            "conv.weight": "CONV_WEIGHT",
            "bn.weight": "BATCH_NORM_SCALE",
            "blocks.2.skip.1.bias": "BATCH_NORM_BIAS",
            "output.weight": "WEIGHT",
            "output.bias": "BIAS",
        },
        "MnistViT": {
            "patches.weight": "CONV_WEIGHT",
            "positions.weight": "EMBEDDING",
            "layers.2.qkv.weight": "ATTENTION_QKV",
            "layers.0.norm2.bias": "LAYER_NORM_BIAS",
        },
        "MnistUNet": {"down1.0.weight": "CONV_WEIGHT", "up2.weight": "CONV_WEIGHT", "up2.bias": "BIAS"},
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
        "FlightsDLRM": {
            "embeddings.2.weight": "EMBEDDING",
            "bottom.0.weight": "WEIGHT",
            "top.2.bias": "BIAS",
            "output.weight": "WEIGHT",
        },
        "SolubilityGNN": {
            "elements.weight": "EMBEDDING",
            "layers.2.linear.weight": "WEIGHT",
            "layers.2.linear.bias": "BIAS",
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
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], device=DEVICE)
    masked = workload.loss_fn(batch["targets"], logits, mask)
    selected = rows({"targets": batch["targets"], "logits": logits}, mask > 0)
    selected = workload.loss_fn(selected["targets"], selected["logits"])
    assert masked["n_valid_examples"] == selected["n_valid_examples"] == 4
    torch.testing.assert_close(masked["summed"], selected["summed"])
    assert (masked["per_example"][mask == 0] == 0).all()


def test_structural_similarity_follows_its_definition():
    """For a single window, compute it from means, variances and the covariance of 49 values, with the usual constants."""
    X, Y = torch.rand(2, 1, 7, 7), torch.rand(2, 1, 7, 7)
    for x, y, similarity in zip(X.flatten(1).double(), Y.flatten(1).double(), structural_similarity(X, Y)):
        covariance = ((x - x.mean()) * (y - y.mean())).sum() / 48
        luminance = (2 * x.mean() * y.mean() + 1e-4) / (x.mean() ** 2 + y.mean() ** 2 + 1e-4)
        assert similarity.item() == pytest.approx(
            (luminance * (2 * covariance + 9e-4) / (x.var() + y.var() + 9e-4)).item(), abs=1e-4
        )


def test_structural_similarity_is_that_of_scikit_image():
    """Of random, constant, and equal images, and of MNIST's with what undersampling leaves of them."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.rand(4, 1, 24, 24, generator=draw)
    zeros, ones = torch.zeros_like(noise), torch.ones_like(noise)
    digits = load_workload("mnist_unet")._splits["validation"]
    pairs = [(noise, noise.flip(0)), (noise, zeros), (noise, noise), (zeros, zeros), (zeros, ones), (ones, 0.5 * ones)]
    for X, Y in [*pairs, (digits["inputs"][:20], digits["targets"][:20])]:
        options = {"win_size": 7, "data_range": 1.0}
        expected = [metrics.structural_similarity(*pair, **options) for pair in zip(X[:, 0].numpy(), Y[:, 0].numpy())]
        torch.testing.assert_close(structural_similarity(X, Y).double(), torch.tensor(expected).double(), rtol=0, atol=1e-5)


def test_undersampling_degrades_images_as_expected():
    images = load_workload("mnist_unet")._splits["validation"]["targets"][:50]
    first, second = (undersampled(images, np.random.default_rng(seed)) for seed in (0, 1))
    restored = structural_similarity(first, images).mean()
    assert 0.3 < restored < 0.5  # 0.373 on this data
    assert not torch.equal(first, second)
