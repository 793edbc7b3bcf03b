"""Property-based: any input works as in torch's optimizers, or is refused with an error that names it and changes nothing."""

from copy import deepcopy

import pytest
import torch
from common import identical
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shampoo import AdamWShampoo

EXAMPLES = settings(derandomize=True)

NUMBERS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.integers(-2, 2000), st.booleans(), st.none(), st.text(max_size=3)
)


@settings(EXAMPLES, max_examples=200)
@given(st.sampled_from(sorted(set(AdamWShampoo([torch.zeros(1)]).defaults))), NUMBERS, st.booleans())
def test_a_bad_option_is_named_and_a_good_one_works(name, value, later):
    """In the constructor and, if `later`, in `add_param_group`, which leaves the optimizer unchanged."""
    p, q = torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(2))
    optimizer, error = AdamWShampoo([p], precondition_frequency=1) if later else None, ""
    try:
        if optimizer is not None:
            optimizer.add_param_group({"params": [q], name: value})
        else:
            optimizer = AdamWShampoo([p, q], **{"precondition_frequency": 1, name: value})
    except ValueError as refused:
        error = str(refused)
    if error:
        assert name in error or "exponents" in error
        assert optimizer is None or [len(group["params"]) for group in optimizer.param_groups] == [1]
        return
    for x in (p, q):
        x.grad = torch.ones_like(x)
    optimizer.step()
    optimizer.step()
    assert torch.isfinite(p).all() or abs(value) > 1e6


def normal(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def halves(seed):
    storage = normal(seed, 6, 4)
    return [storage[:3], storage[3:]]


ODD = {  # functions from a seed to one or more leaves
    "plain": lambda seed: [normal(seed, 5, 3)],
    "size 0": lambda seed: [normal(seed, 0, 3)],
    "0-d": lambda seed: [normal(seed)],
    "1 x 1 x 1": lambda seed: [normal(seed, 1, 1, 1)],
    "transposed": lambda seed: [normal(seed, 4, 6).T],
    "every second column": lambda seed: [normal(seed, 4, 6)[:, ::2]],
    "channels last": lambda seed: [normal(seed, 4, 3, 2, 5).to(memory_format=torch.channels_last)],
    "two in one storage": halves,
    "the same memory twice": lambda seed: [normal(seed, 3, 4)] * 2,
    "requires_grad off": lambda seed: [normal(seed, 2, 3)],
    "float64": lambda seed: [normal(seed, 5, 3, dtype=torch.float64)],
    "float16": lambda seed: [normal(seed, 5, 3, dtype=torch.float16)],
    "bfloat16": lambda seed: [normal(seed, 5, 3, dtype=torch.bfloat16)],
}
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # bias corrections are float32


@settings(EXAMPLES, max_examples=100)
@given(st.lists(st.sampled_from(sorted(ODD)), min_size=1, max_size=4), st.sampled_from([0.0, 0.1]), st.integers(1, 4))
def test_unusual_parameters_move_as_under_adamw(kinds, weight_decay, start):
    """Until the first roots, weights follow torch's AdamW in float64 on contiguous copies; then they stay finite."""
    assume(not weight_decay or "the same memory twice" not in kinds)  # AdamW decays a shared tensor twice in sequence
    params, oracle, frozen = [], [], []
    for seed, kind in enumerate(kinds):
        leaves = ODD[kind](seed)
        exact = [x.double().clone(memory_format=torch.contiguous_format) for x in leaves]
        oracle += [exact[0]] * len(exact) if kind == "the same memory twice" else exact
        params += [torch.nn.Parameter(x) for x in leaves]
        frozen += [kind == "requires_grad off"] * len(leaves)
    strides = [p.stride() for p in params]
    options = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": weight_decay}
    optimizer = AdamWShampoo(params, start_preconditioning_step=start, block_size=4, **options)
    leaves = [x.requires_grad_() for x in oracle]
    adamw = [torch.optim.AdamW([x], foreach=False, **options) for x in leaves]
    for t in range(1, start + 3):
        for i, (p, x) in enumerate(zip(params, leaves)):
            p.grad = normal(10 * t + i, *p.shape).to(p)
            x.grad = p.grad.double()
            if t < start:
                adamw[i].step()
        for p, off in zip(params, frozen):
            p.requires_grad_(not off or t < 2)  # its gradient is still used, as in torch
        optimizer.step()
        for p, x in zip(params, leaves):
            if t < start:
                torch.testing.assert_close(p.double(), x, rtol=ROUNDING[p.dtype] * t, atol=ROUNDING[p.dtype] * t)
            assert torch.isfinite(p).all()
    assert [p.stride() for p in params] == strides
    assert not optimizer.events


REFUSED = {
    "complex": lambda: torch.zeros(2, 3, dtype=torch.complex64),
    "integer": lambda: torch.zeros(2, 3, dtype=torch.int64),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "expanded": lambda: torch.zeros(1, 3).expand(2, 3),
    "overlapping": lambda: torch.zeros(5).as_strided((3, 3), (1, 1)),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_unsupported_parameters_are_refused_by_name(make):
    good = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"parameter 1 of shape \(\d, 3\)"):
        AdamWShampoo([good, make()])
    optimizer = AdamWShampoo([good])
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(\d, 3\)"):
        optimizer.add_param_group({"params": [make()]})
    assert len(optimizer.param_groups) == 1


def trained(**options):
    """Return parameters and an optimizer with two groups after three steps, with factors, roots, bases and all moments."""
    params = [torch.nn.Parameter(normal(i, *shape)) for i, shape in enumerate([(6, 5), (7,), (2, 3)])]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.1}]
    optimizer = AdamWShampoo(groups, block_size=6, precondition_frequency=2, momentum=0.5, solver="qr", **options)
    for t in range(3):
        step(params, optimizer, t)
    return params, optimizer


def step(params, optimizer, t):
    for i, p in enumerate(params):
        p.grad = normal(10 * t + i, *p.shape)
    optimizer.step()


def places(node, path=()):
    """Yield the paths to all values in nested dicts and lists."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


SAVED = trained()[1].state_dict()
DELETED = object()
WRONG = [DELETED, None, -1, 10**9, 0.5, "x", [], {}, torch.zeros(2, 2), torch.zeros(()), torch.zeros(7, dtype=torch.complex64)]


@settings(EXAMPLES, max_examples=300)
@given(st.sampled_from(sorted(places(SAVED), key=repr)), st.sampled_from(WRONG))
def test_a_corrupted_state_dict_is_refused_without_changes_or_works(path, value):
    params, optimizer = trained(weight_decay=0.1)
    before, corrupted = deepcopy((params, optimizer.state_dict())), deepcopy(SAVED)
    node = corrupted
    for key in path[:-1]:
        node = node[key]
    if value is DELETED:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    error = ""
    try:
        optimizer.load_state_dict(corrupted)
    except ValueError as refused:
        error = str(refused)
    if error:
        assert any(str(word) in error for word in (path[-1], "param_groups", "parameter"))
        assert identical(before, (params, optimizer.state_dict()))
    else:
        expected = deepcopy(SAVED["state"])
        if path[0] == "state" and path[-1] == "step":  # any whole number of steps may be
            expected[path[1]]["step"] = torch.tensor(float(value))
        assert identical(optimizer.state_dict()["state"], expected)
    step(params, optimizer, 3)
    assert all(torch.isfinite(p).all() for p in params)
    assert optimizer.state_dict()["state"].keys() == SAVED["state"].keys()


def test_options_that_a_state_dict_lacks_keep_their_values():
    _, optimizer = trained()
    older = deepcopy(SAVED)
    for group in older["param_groups"]:
        del group["factor_frequency"], group["qr_tolerance"]
    optimizer.param_groups[0]["qr_tolerance"] = 0.2
    optimizer.load_state_dict(older)
    assert [group["qr_tolerance"] for group in optimizer.param_groups] == [0.2, 0.3]
    assert optimizer.param_groups[1]["factor_frequency"] == 1


def test_the_state_of_another_optimizer_is_refused():
    params, optimizer = trained()
    others = torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:]}])
    step(params, others, 0)
    with pytest.raises(ValueError, match=r"group 0 of the state_dict lacks .*block_size.*another optimizer's"):
        optimizer.load_state_dict(others.state_dict())
    with pytest.raises(ValueError, match="betas is"):
        optimizer.load_state_dict({**SAVED, "param_groups": [{**g, "betas": [0.9]} for g in SAVED["param_groups"]]})


@pytest.mark.skipif(torch.__version__ < "2.6", reason="torch's optimizers take names from 2.6 on")
def test_errors_of_a_state_dict_use_parameter_names():
    def make(rows):
        layer = torch.nn.Linear(4, rows)
        return AdamWShampoo(layer.named_parameters(), block_size=8, max_factor_ratio=None)

    with pytest.raises(ValueError, match=r"parameter weight of shape \(3, 4\)"):
        make(3).load_state_dict(make(2).state_dict())
