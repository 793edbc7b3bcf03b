"""`param_groups` exempts from decay what torch's layers, timm, and transformers exempt, and keeps names."""

import pytest
import torch
from common import train
from torch import nn

from shampoo import AdamWShampoo
from shampoo.diagnostics import diagnostics
from shampoo.groups import param_groups


class Attention(nn.Module):
    """Names a parameter without decay, as timm's layers do."""

    def __init__(self):
        super().__init__()
        self.query, self.temperature = nn.Linear(8, 8, bias=False), nn.Parameter(torch.ones(2, 1, 1))

    def no_weight_decay(self):
        return {"temperature"}


class Model(nn.Module):
    """Embeddings of which one shares its weight with the output, norms of one and two dimensions, a bias table, a scalar."""

    def __init__(self):
        super().__init__()
        self.output, self.words, self.bag = nn.Linear(8, 11, bias=False), nn.Embedding(11, 8), nn.EmbeddingBag(3, 8)
        self.words.weight = self.output.weight
        self.pos_embed, self.scale = nn.Parameter(torch.zeros(1, 5, 8)), nn.Parameter(torch.tensor(1.0))
        self.position_bias_table, self.frozen = nn.Parameter(torch.zeros(9, 2)), nn.Linear(8, 8).requires_grad_(False)
        self.blocks = nn.ModuleList([Attention()])
        self.conv, self.norm, self.other = nn.Conv2d(3, 8, 3), nn.LayerNorm([5, 8]), nn.BatchNorm2d(8)
        self.debiased = nn.Linear(8, 8)  # only a parameter's own name counts

    def no_weight_decay(self):
        return {"pos_emb*"}


DECAYED = {"blocks.0.query.weight", "conv.weight", "debiased.weight"}


def by_decay(groups):
    """Return the set of names for each weight decay."""
    return {group["weight_decay"]: set(group["param_names"]) for group in groups}


def test_matrices_decay_but_not_embeddings_norms_biases_and_listed_names():
    model = Model()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert by_decay(param_groups(model, 0.3)) == {0.3: DECAYED, 0.0: trained - DECAYED}
    assert by_decay(param_groups(nn.ModuleDict({"module": model}), 0.3))[0.3] == {f"module.{name}" for name in DECAYED}


def test_each_trained_parameter_is_there_once_with_its_name():
    model = Model()
    groups = param_groups(model)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    found = {name: p for group in groups for name, p in zip(group["param_names"], group["params"], strict=True)}
    expected = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    assert all(found[name] is p for name, p in expected.items())
    assert sum(len(group["params"]) for group in groups) == len(expected)


def test_a_group_without_parameters_is_left_out():
    assert [group["weight_decay"] for group in param_groups(nn.Linear(2, 2, bias=False))] == [0.1]
    assert [group["weight_decay"] for group in param_groups(nn.BatchNorm1d(2))] == [0.0]
    assert len(param_groups(nn.Linear(2, 2), weight_decay=0.0)) == 2


def test_messages_and_diagnostics_have_the_names(caplog):
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    optimizer = AdamWShampoo(param_groups(model))
    train(optimizer, list(model.parameters()), 2)
    assert diagnostics(optimizer).keys() == {"optimizer", *dict(model.named_parameters())}
    model[0].weight.grad.fill_(torch.nan)
    optimizer.step()
    assert "parameter 0.weight of shape (3, 4)" in caplog.text
    saved = optimizer.state_dict()
    assert [group["param_names"] for group in saved["param_groups"]] == [["0.weight"], ["0.bias", "1.weight", "1.bias"]]
    AdamWShampoo(param_groups(model)).load_state_dict(saved)


def test_torchs_optimizers_take_the_groups():
    optimizer = torch.optim.AdamW(param_groups(Model(), 0.3))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet18", "convnext_atto", "mvitv2_tiny"]
)
def test_the_groups_are_those_of_timm(name):
    timm, optim = (pytest.importorskip(each, exc_type=ImportError) for each in ("timm", "timm.optim"))
    model = timm.create_model(name)
    groups = optim.param_groups_weight_decay(model, 0.1, no_weight_decay_list=getattr(model, "no_weight_decay", set)())
    names = {p: name for name, p in model.named_parameters()}
    assert by_decay(param_groups(model)) == {group["weight_decay"]: {names[p] for p in group["params"]} for group in groups}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("Bert", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}),
        ("GPT2", {"n_embd": 16, "n_layer": 1, "n_head": 2}),
        ("Llama", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}),
        ("T5", {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 8, "d_kv": 8}),
    ],
)
def test_the_groups_are_those_of_transformers_except_that_embeddings_do_not_decay(name, sizes):
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(vocab_size=32, **sizes))
    embeddings = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    decayed = set(transformers.Trainer.get_decay_parameter_names(None, model))
    expected = {name for name, p in model.named_parameters() if name in decayed and p not in embeddings}
    assert by_decay(param_groups(model))[0.1] == expected
