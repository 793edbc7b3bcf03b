"""State, groups, and checkpoints on multiple ranks, in real processes connected by gloo."""

import pytest
import rank_checks
import rank_models
import rank_state_checks
import torch
from common import identical, largest_difference

from shampoo import AdamWShampoo

needs_fsdp2 = pytest.mark.skipif(torch.__version__ < "2.6", reason="FSDP2 on CPUs needs torch 2.6")


def test_a_group_that_differs_between_ranks_is_added_on_none(pools):
    for error, groups, with_state, moved in pools(2).run(rank_state_checks.refused_group):
        assert "option eps" in error
        assert (groups, with_state, moved) == (1, 1, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float32, {"solver": "qr"}),
        (torch.float32, {"preconditioner": "soap", "start_preconditioning_step": 1, "solver": "qr", "grafting_eps": 1e-3}),
        (torch.float32, {"covariance": "kl", "exponents": 0.5, "max_factor_ratio": 1.0}),
    ],
    ids=["float32", "bfloat16", "qr", "soap", "kl"],
)
def test_a_checkpoint_of_two_ranks_resumes_on_four_and_on_one(pools, tmp_path, dtype, options):
    options = {"dtype": dtype, **options}
    uninterrupted, rates = rank_state_checks.checkpointed(0, 1, tmp_path, 0, 45, **options)
    pools(2).run(rank_state_checks.checkpointed, path=str(tmp_path), first=0, last=15, **options)
    pools(4).run(rank_state_checks.checkpointed, path=str(tmp_path), first=15, last=30, **options)
    resumed, resumed_rates = rank_state_checks.checkpointed(0, 1, tmp_path, 30, 45, **options)
    assert resumed_rates == rates
    if dtype == torch.float32:
        assert largest_difference(resumed, uninterrupted) <= 1e-6
    else:
        assert all(map(torch.equal, resumed, uninterrupted))
    state = torch.load(tmp_path / "45", weights_only=True)["optimizer"]["state"]
    assert {x.dtype for of_parameter in state.values() for x in of_parameter.values()} == {torch.float32}


@pytest.mark.parametrize("shards", [(True, False, True), (False, True, False)], ids=["sharded first", "sharded second"])
def test_checkpoints_with_and_without_shard_are_interchangeable(pools, tmp_path, shards):
    uninterrupted, _ = rank_state_checks.checkpointed(0, 1, tmp_path, 0, 45)
    for shard, first in zip(shards, (0, 15, 30)):
        weights = pools(2).run(rank_state_checks.checkpointed, path=str(tmp_path), first=first, last=first + 15, shard=shard)
    assert all(map(torch.equal, weights[0][0], weights[1][0]))
    assert largest_difference(weights[0][0], uninterrupted) <= 1e-6


def test_a_state_dict_on_all_ranks_gathers(pools):
    for found in (of_ranks := pools(2).run(rank_state_checks.state_dicts)):
        assert identical(found, of_ranks[0])
        assert identical(found[0], found[1])
        assert identical(found[2], found[3])
        assert not identical(found[0], found[2])


def test_a_state_dict_on_rank_0_alone_is_an_error_not_a_hang(pools):
    (alone, *first), second = pools(2).run(rank_state_checks.state_dict_on_rank_0_alone)
    assert "in state_dict() for the other ranks: to gather the state, call it on all ranks" in alone
    assert first == [None, None, None]
    lacks = "the state was gathered on another rank: call consolidate_state_dict(to=None) on all ranks"
    assert [error and lacks in error for error in second] == [None, True, None]


@pytest.mark.slow
def test_torchs_distributed_checkpoints_resume(pools, tmp_path):
    uninterrupted = rank_checks.weights_after(0, 1, 45, start_preconditioning_step=10, precondition_frequency=5)
    for size, first, last in ((2, 0, 15), (4, 15, 30), (2, 30, 45)):
        weights = pools(size).run(rank_state_checks.distributed_checkpoint, path=str(tmp_path), first=first, last=last)
    assert largest_difference(weights[0], uninterrupted) <= 1e-6


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
def test_distributed_checkpoints_with_a_frozen_parameter_resume(pools, tmp_path, flat):
    uninterrupted = rank_state_checks.checkpoint_with_a_frozen_parameter(0, 1, tmp_path / "one", 0, 24, flat)
    for first, last in ((0, 12), (12, 24)):
        weights = pools(2).run(
            rank_state_checks.checkpoint_with_a_frozen_parameter, path=str(tmp_path), first=first, last=last, flat=flat
        )
    assert all(map(torch.equal, *weights))
    assert largest_difference(weights[0], uninterrupted) <= 1e-6


def test_all_ranks_follow_changed_groups(pools):
    weights = pools(2).run(rank_state_checks.changed_groups)
    assert all(map(torch.equal, *weights))
    assert largest_difference(weights[0], rank_state_checks.changed_groups(0, 1)) <= 1e-6


@needs_fsdp2
def test_all_ranks_follow_changed_groups_of_sharded_parameters(pools):
    weights = pools(2).run(rank_state_checks.changed_groups, sharded=True)
    assert all(map(torch.equal, *weights))
    assert largest_difference(weights[0], rank_state_checks.changed_groups(0, 1)) <= 1e-6


def test_all_ranks_follow_changed_state(pools):
    single = rank_state_checks.changed_state(0, 1)
    assert single[2] == 14
    for weights, foreign, steps in pools(2).run(rank_state_checks.changed_state):
        assert largest_difference(weights, single[0]) <= 1e-6
        assert (foreign, steps) == (single[1], single[2])


def test_schedulefrees_wrapper_trains_on_many_ranks(pools):
    weights = pools(2).run(rank_state_checks.schedule_free)
    assert all(map(torch.equal, *weights))
    assert largest_difference(weights[0], rank_state_checks.schedule_free(0, 1)) <= 1e-6


def test_state_that_is_set_without_gathering_is_taken_or_refused_by_name(pools):
    for found in pools(2).run(rank_state_checks.set_without_gathering):
        assert "exp_avg" in found if isinstance(found, str) else found == pytest.approx(0.9)


@pytest.mark.parametrize("start", [None, 20], ids=["after the start", "before the start"])
@pytest.mark.parametrize(
    "sizes", [(2, 1, 2), (1, 2, 1), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in [(4, 2, 1), (2, 4, 2)])], ids=str
)
def test_weights_move_at_every_step_after_a_staggered_resume_on_another_number_of_ranks(pools, tmp_path, sizes, start):
    """Blocks lie in other stacks, and have other steps of refresh; the second resume is soon after the first."""
    for size, (first, last) in zip(sizes, [(0, 12), (12, 14), (14, 40)]):
        arguments = {"path": str(tmp_path), "first": first, "last": last, "start_preconditioning_step": start}
        check = rank_state_checks.staggered_resume
        results = pools(size).run(check, **arguments) if size > 1 else [check(0, 1, **arguments)]
        assert [stuck for stuck, _ in results] == [[]] * size
        if last >= (start or 7):
            assert all(roots == [] for _, roots in results)


def test_a_consolidated_state_is_not_given_out_once_a_group_is_added(pools):
    expected = {"step", "exp_avg", "exp_avg_sq", "factors.0.0", "inv_roots.0.0"}
    for state in pools(2).run(rank_state_checks.group_added_after_consolidation):
        assert all(expected <= set(entry) for entry in state.values())
        assert [entry["exp_avg"] for entry in state.values()] == [(9, 7), (8, 8)]


def test_an_optimizer_whose_process_group_is_one_rank_can_be_pickled_and_copied(pools):
    for original, *copies in pools(2).run(rank_state_checks.pickled_alone):
        for weights in copies:
            assert all(map(torch.equal, original, weights))


def test_before_the_first_step_a_state_dict_needs_no_other_rank_is_all_zero_and_loads(pools):
    (saved, again, (without, loaded)), (_, _, other) = pools(2).run(rank_state_checks.state_before_the_first_step)
    (*params,) = rank_models.parameters((9, 7), (4,))
    assert identical(saved, AdamWShampoo(params, **rank_models.COMMON).state_dict())
    assert identical(again, saved)
    assert not any(x.any() for entry in saved["state"].values() for x in entry.values())
    for weights in (loaded, *other):
        assert all(map(torch.equal, without, weights))


def test_a_state_that_was_loaded_is_gathered_again(pools):
    for saved, loaded in pools(2).run(rank_state_checks.state_after_a_load):
        assert saved["state"][0]["step"] == 3
        assert identical(saved, loaded)


def test_consolidate_is_a_deprecated_name(pools):
    text = ["DeprecationWarning: consolidate() is now consolidate_state_dict()"]
    first, second = pools(2).run(rank_state_checks.former_name)
    assert first == [1, text, None, text]
    assert second == [1, text, 1, text]
    optimizer = AdamWShampoo([torch.zeros(3, 4)])
    with pytest.deprecated_call(match="consolidate_state_dict"):
        optimizer.consolidate()


def test_a_state_of_another_block_size_is_exchanged_in_its_own_blocks(pools):
    results = pools(2).run(rank_state_checks.loaded_into_other_blocks)
    for errors, original, loaded in results:
        assert errors == [None, None]
        assert all(map(torch.equal, original, loaded))
        assert all(map(torch.equal, results[0][1], original))


def test_a_group_that_is_an_error_on_one_rank_is_added_on_none(pools):
    for rank, (error, groups, failed, moved) in enumerate(pools(2).run(rank_state_checks.group_that_one_rank_cannot_add)):
        assert error.startswith("eps is -1.0; it must be" if rank else "rank 1 failed: ValueError('eps is -1.0")
        assert groups == 1
        assert failed is None
        assert moved


def test_a_consolidated_state_is_not_given_out_once_an_option_changes_what_it_holds(pools):
    for error in pools(2).run(rank_state_checks.option_changed_after_consolidation):
        assert "parameter 0 of shape (9, 7)" in error


def test_a_moment_that_is_set_before_the_first_step_is_kept(pools):
    assert pools(2).run(rank_state_checks.state_set_before_the_first_step) == [(63, 1)] * 2


def test_a_held_entry_shows_what_is_gathered_and_its_step(pools):
    every = ["exp_avg", "exp_avg_sq", "factors.0.0", "inv_roots.0.0", "step"]
    for found, counted, steps in pools(2).run(rank_state_checks.held_entry):
        assert found == [(["step"], 2), (every, 2), (["step"], 4), (every, 4)]
        assert (counted, steps) == (9, 10)


def test_factors_that_are_edited_in_place_keep_the_edit(pools):
    single = rank_state_checks.factors_edited_in_place(0, 1)
    count = len(single) // 3
    assert all(torch.equal(2 * A, B) for A, B in zip(single[:count], single[2 * count :]))
    for factors in pools(2).run(rank_state_checks.factors_edited_in_place):
        assert all(torch.equal(2 * A, B) for A, B in zip(factors[:count], factors[2 * count :]))
        assert largest_difference(factors, single) <= 1e-6
