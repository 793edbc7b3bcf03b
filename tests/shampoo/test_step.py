"""How short a step is: Python calls, switches between files, and the way from `step` to the matrix product."""

import sys
import traceback
from itertools import pairwise
from pathlib import Path

import pytest
from common import make_params, set_gradients, train
from torch.utils._python_dispatch import TorchDispatchMode

import shampoo
from shampoo import AdamWShampoo

FOLDER = str(Path(shampoo.__file__).parent)


def prepared():
    """Return one matrix with a gradient and its optimizer, whose next step has no refresh."""
    params = make_params((64, 48))
    optimizer = AdamWShampoo(params, precondition_frequency=10, weight_decay=0.1)
    train(optimizer, params, 12)
    set_gradients(params, 0)
    return optimizer


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="Python 3.12 inlines comprehensions, so that counts differ")
def test_a_step_of_one_matrix_takes_few_python_calls_and_stays_in_few_files():
    optimizer, files = prepared(), []

    def profile(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(FOLDER):
            files.append(frame.f_code.co_filename)

    sys.setprofile(profile)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    assert 20 < len(files) <= 60
    assert sum(a != b for a, b in pairwise(files)) <= 15


def test_the_product_is_at_most_four_calls_away_from_step():
    found = []

    class Depth(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "mm" in func.overloadpacket.__name__:
                frames = [frame.name for frame in traceback.extract_stack() if frame.filename.startswith(FOLDER)]
                found.append(frames[frames.index("step") + 1 :])
            return func(*args, **(kwargs or {}))

    optimizer = prepared()
    with Depth():
        optimizer.step()
    assert len(found) == 4  # two factors, two roots
    assert all(1 <= len(calls) < 4 for calls in found), found  # the product itself is the fourth
