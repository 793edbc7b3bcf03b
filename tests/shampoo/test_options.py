"""The options stand in a signature, a typed dict, and a table of rules: the same ones, with defaults that the rules allow."""

import inspect
import json
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from mypy import api

from shampoo import AdamWShampoo, options
from shampoo.grafting import GRAFTING
from shampoo.hyperparameters import optimizer_options
from shampoo.options import OPTIONS, SETTINGS, Group, Options
from shampoo.preconditioner import PRECONDITIONERS
from shampoo.roots import SOLVERS

ROOT = Path(__file__).parents[2]
OF_THE_OPTIMIZER = {"self", "params", *SETTINGS, "process_group"}


def test_signature_types_and_rules_have_the_same_options():
    signature = inspect.signature(AdamWShampoo.__init__)
    assert set(signature.parameters) - OF_THE_OPTIMIZER == set(OPTIONS) == set(get_type_hints(Options))
    hints = get_type_hints(AdamWShampoo.__init__)
    assert all(hints[name] == hint for name, hint in get_type_hints(Options).items())
    assert all(rule[0](signature.parameters[name].default) for name, rule in (OPTIONS | SETTINGS).items())


@pytest.mark.parametrize(
    "name", ["block_size", "max_dim", "precondition_frequency", "factor_frequency", "start_preconditioning_step"]
)
def test_an_integer_may_be_large_but_not_larger_than_a_float(name):
    W = torch.nn.Parameter(torch.ones(2, 3))
    W.grad = torch.ones(2, 3)
    AdamWShampoo([W], **{name: sys.maxsize}).step()
    with pytest.raises(ValueError, match=rf"{name} is 10+; it must be an integer >= 1 and <= 1e\+38"):
        AdamWShampoo([W], **{name: 10**400})


def test_a_parameter_group_has_what_its_type_says():
    (group,) = AdamWShampoo([torch.zeros(2)]).param_groups
    assert set(group) == set(get_type_hints(Group))


@pytest.mark.parametrize(
    ("names", "table"),
    [
        (options.PreconditionerName, PRECONDITIONERS),
        (options.GraftingName, GRAFTING),
        (options.SolverName, SOLVERS),
    ],
)
def test_the_names_of_a_table_are_those_of_its_type(names, table):
    assert get_args(names) == tuple(table)


def test_mypy_finds_a_misspelt_name(tmp_path, monkeypatch):
    """It accepts each allowed name, and refuses all with the letters of a name swapped."""
    names = {"preconditioner": "soap", "covariance": "kl", "grafting": "rmsprop", "solver": "newton"}
    lines = ["import torch", "from shampoo import AdamWShampoo", "W = [torch.zeros(2, 2)]"]
    lines += [f'AdamWShampoo(W, {option}="{name}")' for option, name in names.items()]
    lines += [f'AdamWShampoo(W, {option}="{name[1] + name[0] + name[2:]}")' for option, name in names.items()]
    (tmp_path / "snippet.py").write_text("\n".join(lines))
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*]\nfollow_imports = skip\n")  # torch takes mypy half a minute
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    report, errors, status = api.run(["--config-file=mypy.ini", "snippet.py"])
    found = [line.partition(": error: ") for line in report.splitlines() if ": error: " in line]
    assert (status, errors, len(found)) == (1, "", 4), report
    for number, option, (place, _, message) in zip(range(8, 12), names, found):
        assert place == f"snippet.py:{number}"
        assert f'Argument "{option}" to "AdamWShampoo" has incompatible type' in message


@pytest.mark.parametrize("name", SOLVERS)
def test_the_options_of_a_solver_are_options(name):
    assert set(SOLVERS[name].options) <= set(OPTIONS)


@pytest.mark.parametrize("point", json.loads((ROOT / "tuning_search_space.json").read_text()))
def test_a_point_sets_every_option_so_that_defaults_do_not_matter(point):
    assert optimizer_options(point).keys() == OPTIONS.keys()
