"""Multiple ranks: every check runs in real processes connected by gloo."""

import pytest
import rank_checks
import rank_models
import torch
from common import largest_difference
from rank_checks import single_process

FOUR = pytest.param(4, marks=pytest.mark.slow)
needs_fsdp2 = pytest.mark.skipif(torch.__version__ < "2.6", reason="FSDP2 on CPUs needs torch 2.6")


@pytest.mark.parametrize("size", [2, FOUR])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "nesterov": True, "nadam": True},
        {"grafting": "sgd", "normalized_grafting": True, "lr": 1e-4},
        {"solver": "qr", "factor_frequency": 3},
        {"decoupled_weight_decay": False},
        {"preconditioner": "soap", "start_preconditioning_step": 1, "solver": "qr", "grafting_eps": 1e-3},
        {"covariance": "kl", "exponents": 0.5, "max_factor_ratio": 1.0, "unfactored_beta2": 0.9, "cautious_decay": True},
    ],
    ids=["adam", "momentum", "sgd", "qr", "coupled decay", "soap", "kl"],
)
def test_all_ranks_have_the_weights_of_a_single_process(pools, size, options):
    weights = pools(size).run(rank_checks.weights_after, **options)
    for other in weights[1:]:
        assert all(map(torch.equal, weights[0], other))
    assert largest_difference(weights[0], single_process(**options)) <= 1e-6


def test_without_shard_each_rank_is_a_single_process(pools):
    """Bit for bit, with all state on every rank, so that a state_dict needs no other one."""
    (single, elements), of_ranks = rank_checks.unshared(0, 1), pools(2).run(rank_checks.unshared)
    for weights, _ in of_ranks:
        assert all(map(torch.equal, weights, single))
    assert largest_difference(single, pools(2).run(rank_checks.weights_after)[0]) <= 1e-6
    assert [found for _, found in of_ranks] == [0, elements]


@pytest.mark.parametrize("size", [2, FOUR])
def test_each_rank_reports_what_it_owns(pools, size):
    check_reports(pools(size), sharded=False)


@needs_fsdp2
def test_each_rank_reports_what_it_owns_of_sharded_weights(pools):
    check_reports(pools(2), sharded=True)


def check_reports(pool, sharded):
    """Compare the diagnostics of all ranks with those of a single process."""
    of_ranks, single = pool.run(rank_checks.diagnosed, sharded=sharded), rank_checks.diagnosed(0, 1)
    assert {name for found in of_ranks for name in found} == set(single)
    assert any(set(found) != set(single) for found in of_ranks)
    for name, expected in single.items():
        reports = [found[name] for found in of_ranks if name in found]
        for figure in set(expected) - {"condition", "effective_rank", "root_residual", "roots_missing"}:
            assert [report[figure] for report in reports] == pytest.approx([expected[figure]] * len(reports), rel=1e-3)
        if name != "optimizer":  # each rank sees only the factors of its own blocks
            assert max(report["condition"] for report in reports) == pytest.approx(expected["condition"], rel=1e-3)
            assert min(report["effective_rank"] for report in reports) == pytest.approx(expected["effective_rank"], rel=1e-3)


@pytest.mark.parametrize("size", [2, FOUR])
def test_before_the_first_roots_weights_equal_a_single_process_bit_for_bit(pools, size):
    """Elementwise operations do not depend on how blocks are stacked; the rounding of batched products may."""
    weights = pools(size).run(rank_checks.weights_after, start_preconditioning_step=100)
    assert all(map(torch.equal, weights[0], single_process(start_preconditioning_step=100)))


@pytest.mark.parametrize("size", [2, FOUR])
def test_ranks_without_blocks_have_the_same_weights(pools, size):
    results = pools(size).run(rank_checks.few_blocks)
    single, _, keys = rank_checks.few_blocks(0, 1)
    assert all(torch.equal(result[0], results[0][0]) for result in results)
    assert largest_difference([results[0][0]], [single]) <= 1e-6
    assert sorted(elements > 0 for _, elements, _ in results) == [False] * (size - 1) + [True]
    assert all(result[2] == keys for result in results)


@pytest.mark.parametrize("check", [rank_checks.missing_on_one_rank, rank_checks.sharded_gradient_missing_on_one_rank])
def test_a_gradient_missing_on_one_rank_raises_on_all_ranks_one_step_later(pools, check):
    results = pools(2).run(check)
    assert [t for t, _ in results] == [4, 4]
    assert all("some ranks had a gradient where others had none" in text for _, text in results)
    assert all("mix.weight" in text or "shape (24, 20)" in text or "shape (4, 6)" in text for _, text in results)


def test_ranks_that_differ_raise_at_construction(pools):
    for rank, errors in enumerate(pools(2).run(rank_checks.different_options)):
        assert "rank 0 has option eps = 0.0001 where rank 1 has option eps = 0.001" in errors[0]
        assert "rank 0 has parameter 0 of shape (3, 4)" in errors[1]
        assert "rank 1 has parameter 0 of shape (3, 5)" in errors[1]
        assert ("ValueError: a parameter group has" if rank else "RuntimeError: rank 1 failed: ValueError") in errors[2]
        assert "momentun" in errors[2]
        assert "rank 0 has nothing where rank 1 has group 1" in errors[3]
        assert "empty parameter list" in errors[4]


def test_ranks_that_differ_later_raise_when_they_next_communicate(pools):
    for errors in pools(2).run(rank_checks.different_later):
        for text, expected in zip(
            errors,
            [
                "rank 0 has argument to=0 where rank 1 has argument to=1",
                "to is 7; it must be one of None, 0, 1",
                "cannot be pickled or copied",
                "rank 0 has option lr = 0.001 where rank 1 has option lr = 1.001",
                "rank 0 has option lr = 0.5 where rank 1 has option lr = 1.5",
            ],
            strict=True,
        ):
            assert expected in text


@needs_fsdp2
@pytest.mark.parametrize("size", [2, FOUR])
@pytest.mark.parametrize("sizes", [(24, 40, 7), (5, 3, 2, 9)], ids=["split blocks", "uneven and empty shards"])
def test_fully_sharded_weights_equal_those_of_a_single_process(pools, size, sizes):
    results = pools(size).run(rank_checks.fully_sharded, sizes=sizes)
    weights, elements = rank_checks.train_unsharded(sizes)
    for result, _ in results:
        assert all(map(torch.equal, result, results[0][0]))
    assert largest_difference(results[0][0], weights) <= 1e-6
    assert sum(own for _, own in results) == elements
    if sizes[0] > 5:
        assert max(own for _, own in results) < 1.5 * elements / size


@needs_fsdp2
def test_fully_sharded_weights_can_be_updated_without_an_exchange(pools):
    results, (weights, elements) = (
        pools(2).run(rank_checks.fully_sharded, sizes=(24, 40, 7), shard=False),
        rank_checks.train_unsharded((24, 40, 7)),
    )
    for result, own in results:
        assert all(map(torch.equal, result, results[0][0]))
        assert own == elements
    assert largest_difference(results[0][0], weights) <= 1e-6


@pytest.mark.slow
@needs_fsdp2
@pytest.mark.parametrize("case", ["hybrid", "tensor", "both", "by hand"])
def test_dtensors_of_any_placement_move_as_in_a_single_process(pools, case):
    results = pools(4).run(rank_checks.placed, case=case)
    weights, elements = rank_checks.train_unsharded((24, 40, 7))
    assert all(all(map(torch.equal, result, results[0][0])) for result, _ in results)
    assert largest_difference(results[0][0], weights) <= 1e-6
    assert sum(own for _, own in results) == elements


@pytest.mark.slow
def test_the_exchange_takes_four_bytes_per_parameter(pools):
    for full, half in pools(4).run(rank_checks.received_bytes):
        assert 4 <= full <= 4.1
        assert 2 <= half <= 2.05


@pytest.mark.parametrize("size", [2, FOUR])
def test_a_bfloat16_exchange_keeps_ranks_equal(pools, size):
    weights = pools(size).run(rank_checks.weights_after, exchange_dtype=torch.bfloat16)
    assert all(all(map(torch.equal, weights[0], other)) for other in weights[1:])
    exact = single_process()
    moved = largest_difference(exact, single_process(steps=0))
    assert 0 < largest_difference(weights[0], exact) < 0.02 * moved


@pytest.mark.parametrize("size", [2, FOUR])
def test_staggered_and_rounded_roots_keep_ranks_equal(pools, size):
    """Each rank staggers its own blocks, so weights are close to those of a single process but not equal."""
    options = {"stagger": True, "bf16_roots": True, "precondition_frequency": 5, "start_preconditioning_step": 10}
    weights = pools(size).run(rank_checks.weights_after, **options)
    assert all(all(map(torch.equal, weights[0], other)) for other in weights[1:])
    single = single_process(**options)
    assert largest_difference(weights[0], single) < 0.1 * largest_difference(single, single_process(steps=0))


@pytest.mark.slow
def test_blocks_are_distributed_within_groups_and_replicated_between_them(pools):
    results = pools(4).run(rank_checks.replicated)
    assert all(all(map(torch.equal, results[0][0], weights)) for weights, _ in results[1:])
    assert largest_difference(results[0][0], single_process()) <= 1e-6
    assert results[0][1] == results[2][1]
    assert results[1][1] == results[3][1]


def test_all_ranks_skip_a_step_together(pools):
    first, second = pools(2).run(rank_checks.not_finite, one_rank=False)
    assert first[:3] == second[:3] == ([True, True, False, True, True, True], {"steps skipped": 1}, [5, 5])
    assert all(map(torch.equal, first[3], second[3]))


def test_a_step_that_only_one_rank_skips_raises_on_all_ranks(pools):
    for t, error in pools(2).run(rank_checks.not_finite, one_rank=True):
        assert t == 3
        assert "some ranks had gradients with NaN or Inf" in error


@pytest.mark.parametrize(("closure", "words"), [(False, "it must be dense"), (True, "index out of range")])
def test_a_rank_that_fails_stops_all_ranks(pools, closure, words):
    (first, message), (second, cause) = pools(2).run(rank_checks.failing_on_one_rank, closure=closure)
    assert (first, second) == (2, 1)
    assert "a rank failed in the last step" in message
    assert words in cause


@pytest.mark.parametrize("size", [2, FOUR])
def test_directions_that_float16_cannot_hold_are_exchanged_as_its_largest_number(pools, size):
    results = pools(size).run(rank_checks.large_directions, dtype=torch.float16)
    exact = rank_checks.large_directions(0, 1, dtype=None)
    for t in range(3):
        for result in results:
            assert all(map(torch.equal, result[t], results[0][t]))
            assert all(w.isfinite().all() for w in result[t])
    moved, exactly = ((found[0][0] - found[1][0]).abs() / 1e-6 for found in (results[0], exact))
    assert exactly[:3].max() > 65_504
    torch.testing.assert_close(moved, exactly.clamp(max=65_504.0), rtol=1e-3, atol=1.0)


def test_directions_of_two_dtypes_are_exchanged_together_and_exactly(pools):
    single = rank_checks.mixed_dtypes(0, 1)
    for weights in pools(2).run(rank_checks.mixed_dtypes):
        assert [w.dtype for w in weights] == [torch.float32, torch.float64]
        assert largest_difference(weights[:1], single[:1]) <= 1e-6
        assert largest_difference(weights[1:], single[1:]) <= 1e-12


@pytest.mark.parametrize(
    "function",
    [
        "move",
        "flat_views",
    ],
)
def test_a_failure_after_the_exchange_is_told_to_the_other_rank_within_two_steps(pools, function):
    """On rank 1 at step 3. After a timeout of the group, the other rank would raise another error."""
    (step, told), (failed, cause) = pools(2).run(rank_checks.failing_after_exchange, function=function)
    assert (failed, cause) == (3, "RuntimeError: out of memory")
    assert step in (4, 5)
    assert told == "RuntimeError: a rank failed in the last step; see the error on that rank"


@needs_fsdp2
def test_a_failure_after_the_exchange_is_told_where_weights_are_dtensors(pools):
    (step, told), (failed, cause) = pools(2).run(rank_checks.failing_after_exchange, function="add", sharded=True)
    assert (failed, cause) == (3, "RuntimeError: out of memory")
    assert step in (4, 5)
    assert told == "RuntimeError: a rank failed in the last step; see the error on that rank"


@needs_fsdp2
@pytest.mark.parametrize("decay", [0.0, 0.1], ids=["gradients alone", "gradients and weights"])
def test_a_failure_while_reading_dtensors_is_told_to_the_other_rank(pools, decay):
    (step, told), (failed, cause) = pools(2).run(rank_checks.failing_while_reading, decay=decay)
    assert (failed, cause) == (3, "RuntimeError: out of memory")
    assert step in (4, 5)
    assert told == "RuntimeError: a rank failed in the last step; see the error on that rank"


@pytest.mark.parametrize(
    "case",
    [
        *("another seed", "bfloat16", "one bit", "a sign of zero", "two rows swapped"),
        "transposed",
    ],
)
def test_weights_that_differ_between_ranks_at_construction_are_named_at_the_first_step(pools, case):
    for (step, error), moved in pools(2).run(rank_checks.different_weights, case=case):
        assert step == 0
        assert error.startswith("ValueError: all ranks must have the same parameters")
        assert ("layer2" if rank_models.NAMED else "parameter 2") in error
        assert "(5, 5)" in error
        assert not moved


def test_weights_that_are_equal_by_the_first_step_may_have_differed_at_construction(pools):
    for error, moved in pools(2).run(rank_checks.different_weights, case="repaired before the first step"):
        assert error is None
        assert moved
