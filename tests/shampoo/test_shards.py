"""DTensors: each element goes from its shards to the owner of its block and back, a bounded number of them at a time."""

from itertools import product

import pytest
import rank_shard_checks
import torch
from common import largest_difference
from hypothesis import given
from hypothesis import strategies as st

from shampoo.assignment import Cost, share_blocks
from shampoo.blocks import merge_dims
from shampoo.copies import load
from shampoo.shards import cut_all, find_blocks

FOUR = pytest.param(4, marks=pytest.mark.slow)
shapes = st.lists(st.integers(1, 9), max_size=4).map(tuple)


def shard(shape, dims, mesh):
    """Return the boxes of all ranks; `dims` has the dimension that each dimension of the mesh shards, or None."""
    boxes = []
    for coordinates in product(*map(range, mesh)):
        box = [torch.arange(size) for size in shape]
        for dim, size, i in zip(dims, mesh, coordinates):
            if dim is not None and dim < len(shape):
                parts = box[dim].chunk(size)
                box[dim] = parts[i] if i < len(parts) else box[dim][:0]
        boxes.append(tuple(range(int(x[0]), int(x[-1]) + 1) if len(x) else range(0) for x in box))
    return boxes


@given(
    shapes=st.lists(shapes, min_size=1, max_size=4),
    mesh=st.sampled_from([(2,), (3,), (2, 2), (3, 2)]),
    dims=st.lists(st.sampled_from([None, 0, 1, 2]), min_size=2, max_size=2),
    block_size=st.integers(1, 10),
    ratio=st.sampled_from([None, 1.0, 2.0]),
    merge=st.booleans(),
)
def test_every_element_of_a_block_comes_from_each_shard_that_has_it(shapes, mesh, dims, block_size, ratio, merge):
    size, tensors = torch.Size(mesh).numel(), [torch.randn(shape) for shape in shapes]
    merged = [merge_dims(shape, block_size, ratio) if merge else shape or (1,) for shape in shapes]
    layouts, _ = share_blocks(merged, block_size, loads=[Cost(0.0, 0)] * size)
    of_params = [shard(shape, dims, mesh) for shape in shapes]
    boxes = [[of_param[rank] for of_param in of_params] for rank in range(size)]
    held = [[X[tuple(slice(r.start, r.stop) for r in box)] for X, box in zip(tensors, of_rank)] for of_rank in boxes]
    cuts = [cut_all(find_blocks(layouts, shapes), boxes, rank) for rank in range(size)]
    for owner, layout in enumerate(layouts):
        flat, times = torch.zeros(layout.numel), torch.zeros(layout.numel)
        for holder in range(size):
            sent, received = cuts[holder][0][owner], cuts[owner][1][holder]
            for (i, indices, _), (_, _, view) in zip(sent, received, strict=True):
                flat.as_strided(*view).copy_(held[holder][i][indices])
                times.as_strided(*view).add_(1)
        expected, _ = load(layout, tensors, torch.float32, torch.device("cpu"))
        copies = [X.new_full(X.shape, sum(x[i].numel() for x in held) / X.numel()) for i, X in enumerate(tensors)]
        assert torch.equal(flat, expected)
        assert torch.equal(times, load(layout, copies, torch.float32, torch.device("cpu"))[0])


OPTIONS = {
    "defaults": {},
    "momentum": {"momentum": 0.9, "nesterov": True, "nadam": True, "maximize": True},
    "coupled decay": {"decoupled_weight_decay": False},
    "cautious decay, bfloat16 exchange": {"cautious_decay": True, "exchange_dtype": torch.bfloat16},
    "soap": {"preconditioner": "soap", "start_preconditioning_step": 1, "solver": "qr"},
    "bfloat16": {"dtype": torch.bfloat16, "exchange_dtype": torch.float16},
}


@pytest.mark.parametrize("size", [2, FOUR])
@pytest.mark.parametrize(
    ("case", "options"),
    [*(("rows", name) for name in OPTIONS), *((case, "defaults") for case in ("columns", "replicated", "hybrid", "both"))],
)
def test_dtensors_get_the_weights_of_whole_tensors_bit_for_bit(pools, size, case, options):
    """Weights and gradients are sent in several runs of blocks."""
    for different, skipped, spread in pools(size).run(rank_shard_checks.beside_whole_tensors, case=case, **OPTIONS[options]):
        assert different == []
        assert skipped == [1, 1]
        assert 0.9 < spread < 1.1  # of finite weights


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("size", [2, FOUR])
def test_a_step_holds_at_most_twice_the_limit_besides_what_a_rank_owns(pools, size, decay):
    """A rank owns 6 MB, and buffers may take 1 MB. Those of the last all-to-all may still be there: gloo frees them later."""
    own_weights = 6 if decay else 0
    for reading, moving, step, between in pools(size).run(rank_shard_checks.peak_memory, gather_mb=1, decay=decay):
        assert 0.5 < reading <= 2.01
        assert 0.5 < moving <= 2.01
        assert step <= own_weights + 2.01
        assert between < 0.1
    for reading, moving, _, _ in pools(size).run(rank_shard_checks.peak_memory, gather_mb=256, decay=decay):
        assert min(reading, moving) > 2.01


@pytest.mark.slow
def test_a_process_group_without_all_shards_is_refused(pools):
    for error in pools(4).run(rank_shard_checks.lacking):
        assert error.startswith("process_group lacks ranks that hold shards of parameter 0 of shape (8, 5)")


@pytest.mark.parametrize("case", ["rows", "columns", "replicated"])
def test_one_rank_with_all_state_moves_its_shards(pools, case):
    for weights, expected in pools(2).run(rank_shard_checks.alone, case=case):
        assert largest_difference(weights, expected) <= 1e-6
