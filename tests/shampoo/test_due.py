"""The blocks that are due at a step, if refreshes are staggered."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from shampoo import AdamWShampoo
from shampoo.due import due_blocks

STACKS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=5)


@given(STACKS, st.integers(1, 12), st.integers(1, 30))
def test_every_block_is_due_once_per_period(stacks, frequency, start):
    stacks = tuple(stacks)
    due = [due_blocks(stacks, t, start, frequency, stagger=True) for t in range(start + 3 * frequency + 1)]
    blocks = [(i, b) for i, (count, *_) in enumerate(stacks) for b in range(count)]
    for block in blocks:
        own = [t for t, of_step in enumerate(due) for i, some in enumerate(of_step) if block in ((i, b) for b in some)]
        assert own[0] <= start
        assert own[0] > start - frequency
        assert all(1 <= later - t <= frequency for t, later in pairwise(own))
        assert all(later - t == frequency for t, later in pairwise(own) if t > start)


@given(STACKS, st.integers(1, 12))
def test_no_step_costs_more_than_its_share_plus_one_block(stacks, frequency):
    def cost(of_step):
        return sum(len(some) * (m**3 + n**3) for some, (_, m, n) in zip(of_step, stacks))

    costs = [cost(due_blocks(tuple(stacks), t, 1, frequency, stagger=True)) for t in range(frequency + 1, 2 * frequency + 1)]
    assert sum(costs) == sum(count * (m**3 + n**3) for count, m, n in stacks)
    assert max(costs) <= sum(costs) / frequency + max(m**3 + n**3 for _, m, n in stacks)


def test_staggering_does_not_change_constant_roots():
    """With a constant gradient, bias-corrected factors are constant, and so are roots, whenever they are computed."""
    torch.manual_seed(0)
    start, G = torch.randn(2, 24, 20, dtype=torch.float64)
    weights = []
    for stagger in (False, True):
        W = torch.nn.Parameter(start.clone())
        optimizer = AdamWShampoo([W], lr=0.1, block_size=6, precondition_frequency=4, stagger=stagger, betas=(0.9, 0.9))
        for _ in range(20):
            W.grad = G.clone()
            optimizer.step()
        weights.append(W.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
