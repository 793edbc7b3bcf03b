"""The options stand in a signature, a typed dict, and a table of rules: the same ones, with defaults that the rules allow."""

import inspect
import json
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

from shampoo import AdamWShampoo
from shampoo.hyperparameters import optimizer_options
from shampoo.options import OPTIONS, Group, Options
from shampoo.roots import SOLVERS

OF_THE_OPTIMIZER = {"self", "params", "exchange_dtype", "max_skipped_steps", "process_group"}


def test_signature_types_and_rules_have_the_same_options():
    signature = inspect.signature(AdamWShampoo.__init__)
    assert set(signature.parameters) - OF_THE_OPTIMIZER == set(OPTIONS) == set(get_type_hints(Options))
    hints = get_type_hints(AdamWShampoo.__init__)
    assert all(hints[name] == hint for name, hint in get_type_hints(Options).items())
    assert all(OPTIONS[name][0](signature.parameters[name].default) for name in OPTIONS)


def test_a_parameter_group_has_what_its_type_says():
    (group,) = AdamWShampoo([torch.zeros(2)]).param_groups
    assert set(group) == set(get_type_hints(Group))


@pytest.mark.parametrize("name", SOLVERS)
def test_the_options_of_a_solver_are_options(name):
    assert set(SOLVERS[name].options) <= set(OPTIONS)


@pytest.mark.parametrize("point", json.loads((Path(__file__).parents[2] / "tuning_search_space.json").read_text()))
def test_a_point_sets_every_option_so_that_defaults_do_not_matter(point):
    assert optimizer_options(point).keys() == OPTIONS.keys()
