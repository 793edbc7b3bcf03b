"""AdamWShampoo as a torch optimizer: special cases equal to known methods, state, errors, and batching."""

import copy
import io
import pickle

import pytest
import torch
from common import identical, make_params, set_gradients, train
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo import AdamWShampoo

NEVER = 10**9


SHAPES = [(6, 5), (7,), (), (4, 3, 2, 2), (20, 9)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_before_preconditioning_adam_grafting_is_adamw(weight_decay, device):
    ours, theirs = (make_params(*SHAPES, dtype=torch.float64, device=device) for _ in range(2))
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": weight_decay}  # both decay by W <- W - lr wd W
    train(AdamWShampoo(ours, start_preconditioning_step=NEVER, block_size=8, **options), ours, 30)
    train(torch.optim.AdamW(theirs, **options), theirs, 30)
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)  # bias corrections are rounded to float32


def test_before_preconditioning_nadam_follows_its_formula():
    (W,), lr, beta1, beta2 = make_params((5, 4), dtype=torch.float64), 1e-2, 0.9, 0.99
    optimizer = AdamWShampoo([W], lr, betas=(beta1, beta2), nadam=True, start_preconditioning_step=NEVER)
    expected, M, V = W.detach().clone(), torch.zeros_like(W), torch.zeros_like(W)
    for t in range(1, 21):
        set_gradients([W], t)
        G = W.grad
        M, V = beta1 * M + (1 - beta1) * G, beta2 * V + (1 - beta2) * G**2
        N = (beta1 * M + (1 - beta1) * G) / (1 - beta1**t)
        expected -= lr * N / ((V / (1 - beta2**t)).sqrt() + 1e-8)
        optimizer.step()
        torch.testing.assert_close(W.detach(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias_correction", [False, True])
def test_zero_exponents_without_grafting_are_sgd_on_an_averaged_gradient(bias_correction):
    (W,) = make_params((5, 4), dtype=torch.float64)
    optimizer = AdamWShampoo([W], 0.1, betas=(0.8, 0.9), exponents=0.0, grafting="none", bias_correction=bias_correction)
    expected, M = W.detach().clone(), torch.zeros_like(W)
    for t in range(1, 21):
        set_gradients([W], t)
        M = 0.8 * M + 0.2 * W.grad
        expected -= 0.1 * M / (1 - 0.8**t if bias_correction else 1)
        optimizer.step()
    torch.testing.assert_close(W.detach(), expected, rtol=0, atol=1e-6)


def test_zero_exponents_need_no_factors():
    (W,) = make_params((6, 5))
    one_sided, none = (AdamWShampoo([W], exponents=e).state_dict()["state"][0] for e in [(0.5, 0.0), 0.0])
    assert {key for key in one_sided if "." in key} == {"factors.0.0", "inv_roots.0.0"}
    assert not {key for key in none if "." in key}


def test_dimensions_above_max_dim_need_no_factors():
    (W,) = make_params((1_000_000, 2))
    state = AdamWShampoo([W]).state_dict()["state"][0]
    shapes = {key: tuple(x.shape) for key, x in state.items()}
    assert shapes == {"step": (), "exp_avg": (1_000_000, 2), "exp_avg_sq": (1_000_000, 2)}


def test_roots_may_be_stored_in_bfloat16():
    weights = []
    for small in (False, True):
        (W,) = params = make_params((20, 9))
        optimizer = AdamWShampoo(params, bf16_roots=small, precondition_frequency=2, lr=1e-2, merge_dims=False)
        train(optimizer, params, 10)
        state = optimizer.state_dict()["state"][0]
        assert {x.dtype for key, x in state.items() if "roots" in key} == {torch.bfloat16 if small else torch.float32}
        assert {x.dtype for key, x in state.items() if "roots" not in key} == {torch.float32}
        weights.append(W.detach())
    (start,) = make_params((20, 9))
    moved = (weights[0] - start.detach()).norm()
    assert 0 < (weights[0] - weights[1]).norm() < 0.02 * moved


class Recorder(TorchDispatchMode):
    """Records the names of dispatched operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9, "nesterov": True, "nadam": True, "weight_decay": 0.1}, {"normalized_grafting": True}]
)
def test_an_ordinary_step_is_batched_and_never_waits_for_the_device(options, device):
    def ordinary_step(blocks):
        params = make_params((8 * blocks, 8), (8 * blocks + 3, 8), device=device)
        optimizer = AdamWShampoo(params, block_size=8, precondition_frequency=4, **options)
        train(optimizer, params, 5)
        set_gradients(params, 0)
        with Recorder() as recorder:
            optimizer.step()
        return recorder.names

    few, many = ordinary_step(blocks=2), ordinary_step(blocks=32)
    assert few == many  # no loop over blocks
    assert not {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal"} & set(many)


def test_lr_follows_a_torch_scheduler():
    (W,), (expected,) = make_params((4, 4)), make_params((4, 4))
    optimizer = AdamWShampoo([W], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    by_hand = AdamWShampoo([expected], lr=0.1)
    for t in range(15):
        for p in (W, expected):
            set_gradients([p], t)
        by_hand.param_groups[0]["lr"] = 0.1 * 0.5**t
        optimizer.step(), scheduler.step(), by_hand.step()
    torch.testing.assert_close(W, expected)


def test_closure_is_called_with_gradients_enabled():
    (W,) = make_params((3,))
    optimizer = AdamWShampoo([W])

    def closure():
        optimizer.zero_grad()
        loss = (W**2).sum()
        loss.backward()
        return loss

    before = (W.detach() ** 2).sum()
    assert optimizer.step(closure) == before
    assert (W.detach() ** 2).sum() < before


def test_a_step_without_any_gradient_changes_nothing():
    params = make_params(*SHAPES)
    optimizer = AdamWShampoo(params, precondition_frequency=2, weight_decay=0.1)
    train(optimizer, params, 3)
    before = copy.deepcopy((params, optimizer.state_dict()))
    optimizer.zero_grad()
    optimizer.step()
    assert identical(before, (params, optimizer.state_dict()))


STATES = {
    "adam": {"block_size": 8},
    "qr, staggered, bfloat16 roots": {"block_size": 8, "solver": "qr", "stagger": True, "bf16_roots": True},
    "momentum": {"momentum": 0.9, "grafting": "sgd", "betas": (0.0, 0.9)},
    "one-sided, unmerged": {"exponents": (0.5, 0.0), "merge_dims": False, "block_size": 4},
    "max_dim": {"max_dim": 9, "grafting": "none"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", STATES.values(), ids=STATES)
def test_a_run_resumed_from_its_state_dict_continues_bit_for_bit(options, dtype, device):
    options = {"precondition_frequency": 3, **options}
    params = make_params(*SHAPES, dtype=dtype, device=device)
    optimizer = AdamWShampoo(params, **options)
    train(optimizer, params, 7)
    file = io.BytesIO()
    torch.save({"model": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    train(optimizer, params, 7, first=7)

    file.seek(0)
    saved = torch.load(file, weights_only=True, map_location=device)
    resumed = [torch.nn.Parameter(w) for w in saved["model"]]
    other = AdamWShampoo(resumed, lr=0.5, precondition_frequency=1)  # the options come from the checkpoint
    other.load_state_dict(saved["optimizer"])
    train(other, resumed, 7, first=7)
    assert identical(params, resumed)
    assert identical(optimizer.state_dict(), other.state_dict())
    state = [(name, x) for of_parameter in other.state_dict()["state"].values() for name, x in of_parameter.items()]
    assert all(x.dtype == torch.float32 or ("roots" in name and options.get("bf16_roots")) for name, x in state)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_copies_continue_identically(clone):
    params = make_params(*SHAPES)
    optimizer = AdamWShampoo(params, precondition_frequency=2)
    train(optimizer, params, 5)
    other_params, other = clone((params, optimizer))
    train(optimizer, params, 5)
    train(other, other_params, 5)
    assert identical(params, other_params)
    assert params[0].data_ptr() != other_params[0].data_ptr()


@pytest.mark.parametrize("act", ["step", "change an option", "add a group", "load", "pickle", "deepcopy"])
def test_foreign_state_stays_beside_ours(act):
    """A tensor that a wrapper put into the state of a parameter, as schedulefree does."""
    params = make_params((6, 5), (4, 4))
    optimizer = AdamWShampoo(params[:1], precondition_frequency=2)
    train(optimizer, params[:1], 3)
    optimizer.state[params[0]]["z"] = torch.ones(6, 5)
    if act == "change an option":
        optimizer.param_groups[0]["grafting"] = "sgd"
    elif act == "add a group":
        optimizer.add_param_group({"params": params[1:]})
    elif act == "load":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif act == "pickle":
        params, optimizer = pickle.loads(pickle.dumps((params, optimizer)))
    elif act == "deepcopy":
        params, optimizer = copy.deepcopy((params, optimizer))
    train(optimizer, params[:1], 2, first=3)
    assert torch.equal(optimizer.state[params[0]]["z"], torch.ones(6, 5))
    assert torch.equal(optimizer.state_dict()["state"][0]["z"], torch.ones(6, 5))
    assert int(optimizer.state[params[0]]["step"]) == 5


def drop(state, key):
    return {k: v for k, v in state.items() if k != key}


BAD_STATES = {
    "a group is missing": (
        lambda s: {**s, "param_groups": []},
        r"groups of \[\] parameters; this optimizer has groups of \[2\]",
    ),
    "no groups at all": (lambda s: drop(s, "param_groups"), "param_groups"),
    "a parameter is missing": (lambda s: {**s, "state": drop(s["state"], 1)}, r"parameter 1 .*exp_avg"),
    "a factor is missing": (
        lambda s: {**s, "state": {**s["state"], 0: drop(s["state"][0], "inv_roots.0.0")}},
        r"parameter 0 .*inv_roots\.0\.0",
    ),
    "another order": (lambda s: {**s, "state": {0: s["state"][1], 1: s["state"][0]}}, "parameter 0 .*exp_avg"),
    "a bad option": (lambda s: {**s, "param_groups": [{**s["param_groups"][0], "eps": -1.0}]}, "eps is -1.0"),
}


@pytest.mark.parametrize(("corrupt", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_a_bad_state_dict_is_refused_and_changes_nothing(corrupt, message):
    params = make_params((6, 5), (7,))
    optimizer = AdamWShampoo(params, precondition_frequency=2)
    train(optimizer, params, 3)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(corrupt(copy.deepcopy(before)))
    assert identical(before, optimizer.state_dict())
    train(optimizer, params, 1)


BAD_OPTIONS = {
    "lr": [-1.0, float("nan"), float("inf"), "fast", True, None],
    "betas": [(1.0, 0.9), (0.9, 1.1), (-0.1, 0.9), 0.9, (0.9,), (0.9, 0.9, 0.9)],
    "eps": [0.0, -1e-8],
    "weight_decay": [-0.1],
    "decoupled_weight_decay": [1, None],
    "momentum": [1.0, -0.1],
    "block_size": [0, -1, 2.0, True],
    "max_dim": [0],
    "precondition_frequency": [0, 1.5],
    "start_preconditioning_step": [0, -1],
    "exponents": [-0.5, (0.5,), (0.5, -0.1), "half"],
    "exponent_multiplier": [-1.0],
    "grafting": ["ADAM", None],
    "grafting_beta2": [1.5],
    "grafting_eps": [-1.0],
    "solver": ["svd"],
    "stagger": [1],
    "precondition_vectors": [None],
    "bf16_roots": [0],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_OPTIONS.items() for value in values])
def test_a_bad_option_is_named_with_its_value(name, value):
    params = make_params((2, 2))
    with pytest.raises(ValueError, match=rf"^{name} is .*; it must be "):
        AdamWShampoo(params, **{name: value})
    optimizer = AdamWShampoo(params)
    with pytest.raises(ValueError, match=rf"^{name} is "):
        optimizer.add_param_group({"params": make_params((3,)), name: value})
    assert len(optimizer.param_groups) == 1
    train(optimizer, params, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("exchange_dtype", torch.int8), ("exchange_dtype", "bf16"), ("gather_mb", 0), ("gather_mb", 1.5)),
        *(("process_group", [0, 1]), ("process_group", "gloo"), ("shard", 0)),
    ],
)
def test_a_bad_distributed_option_is_named_with_its_value(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is .*; it must be "):
        AdamWShampoo(make_params((2, 2)), **{name: value})


def test_unknown_options_and_bad_parameters_are_refused():
    with pytest.raises(TypeError, match="learning_rate"):
        AdamWShampoo(make_params((2,)), learning_rate=0.1)
    with pytest.raises(ValueError, match="weight_dcay"):
        AdamWShampoo([{"params": make_params((2,)), "weight_dcay": 0.1}])
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamWShampoo([])
    with pytest.raises(ValueError, match=r"parameter 1 of shape \(3,\) .*complex64"):
        AdamWShampoo([*make_params((2,)), torch.zeros(3, dtype=torch.complex64, requires_grad=True)])


def test_flat_parameters_of_fsdp1_are_refused():
    (flat,) = make_params((12,))
    flat._is_flat_param = True  # as FSDP1 marks them: ranks hold different parts of the same shape
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(12,\) is an FSDP1 FlatParameter.*use FSDP2"):
        AdamWShampoo([flat])


def test_a_sparse_gradient_is_refused_before_anything_changes():
    params = make_params((2, 2), (5, 3))
    optimizer = AdamWShampoo(params)
    train(optimizer, params, 1)
    before = copy.deepcopy((params, optimizer.state_dict()))
    set_gradients(params, 0)
    params[1].grad = torch.eye(5, 3).to_sparse()
    with pytest.raises(RuntimeError, match=r"parameter 1 of shape \(5, 3\) .*sparse"):
        optimizer.step()
    assert identical(before, (params, optimizer.state_dict()))


def test_a_group_added_during_a_run_is_trained():
    old, new = make_params((4, 4)), make_params((3, 5))
    optimizer = AdamWShampoo(old, precondition_frequency=2)
    train(optimizer, old, 3)
    optimizer.add_param_group({"params": new, "lr": 0.1})
    before = [p.detach().clone() for p in (*old, *new)]
    train(optimizer, [*old, *new], 3)
    assert all((p != q).any() for p, q in zip((*old, *new), before))
    assert [group["step"] for group in optimizer.param_groups] == [6, 3]


@pytest.mark.parametrize(("before", "after"), [(100, 5), (5, 100)])
def test_weights_keep_moving_when_the_frequency_changes(before, after):
    (W,) = make_params((6, 5))
    optimizer = AdamWShampoo([W], precondition_frequency=before)
    train(optimizer, [W], 12)
    optimizer.param_groups[0]["precondition_frequency"] = after
    for t in range(12, 30):
        old = W.detach().clone()
        train(optimizer, [W], 1, first=t)
        assert (W - old).norm() > 1e-4
    assert optimizer.param_groups[0]["start_preconditioning_step"] == before


def test_a_compiled_model_is_compiled_once():
    """Steps, refreshes, a schedule and load_state_dict cause no recompilation."""
    from torch._dynamo.testing import CompileCounter

    counter, model = CompileCounter(), torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    compiled = torch.compile(model, backend=counter)
    optimizer = AdamWShampoo(model.parameters(), precondition_frequency=3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    counts = []
    for t in range(12):
        optimizer.zero_grad()
        compiled(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        counts.append(counter.frame_count)
        if t == 6:
            optimizer.load_state_dict(optimizer.state_dict())
    assert counts == [1] * 12


def test_state_dict_takes_time_proportional_to_the_number_of_parameters():
    """Twice the parameters dispatch about twice the operations."""

    def operations(count):
        optimizer = AdamWShampoo(make_params(*[(3, 3)] * count))
        with Recorder() as recorder:
            optimizer.state_dict()
        return len(recorder.names)

    assert operations(80) < 2.2 * operations(40)


def test_it_learns_faster_than_adam():
    """On least squares with condition number 1e4, the loss is less than half of Adam's after the same number of steps."""

    def final_loss(make):
        generator = torch.Generator().manual_seed(0)
        A = torch.randn(20, 20, generator=generator) * torch.logspace(0, -2, 20)
        B = A @ torch.randn(20, 10, generator=generator)
        X = torch.nn.Parameter(torch.zeros(20, 10))
        optimizer = make([X])
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 300)
        for _ in range(300):
            optimizer.zero_grad()
            loss = ((A @ X - B) ** 2).mean()
            loss.backward()
            optimizer.step()
            scheduler.step()
        return loss.item()

    ours = final_loss(lambda p: AdamWShampoo(p, lr=0.05, precondition_frequency=1))
    assert ours < 0.5 * final_loss(lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0))


def test_without_grafting_the_defaults_do_not_depend_on_the_scale_of_gradients():
    ends = []
    for scale in (1e3, 1.0, 1e-3):
        (W,) = make_params((40, 30))
        optimizer = AdamWShampoo([W], lr=1e-3, grafting="none")
        for t in range(12):
            set_gradients([W], t, scale)
            optimizer.step()
        ends.append(W.detach())
    for W in ends[1:]:
        torch.testing.assert_close(W, ends[0], rtol=1e-4, atol=1e-6)


def test_auto_can_be_set_again_between_steps():
    (W,) = make_params((40, 30))
    optimizer = AdamWShampoo([W])
    for ratio in ("auto", None, 2.0, "auto"):
        optimizer.param_groups[0]["max_factor_ratio"] = ratio
        set_gradients([W], 0)
        optimizer.step()
    assert "factors.0.0" in optimizer.state[W]


@pytest.mark.parametrize(
    "options",
    [{}, {"solver": "newton"}, {"solver": "qr"}, {"preconditioner": "soap"}, {"covariance": "kl", "exponents": 0.5}],
    ids=["defaults", "newton", "qr", "soap", "kl"],
)
def test_a_step_under_autocast_is_the_same(options, device):
    """Autocast is for the model; products of the optimizer stay in the state's dtype, as AdamW's do."""
    outside, inside = make_params(*SHAPES, device=device), make_params(*SHAPES, device=device)
    first, second = (AdamWShampoo(p, block_size=8, precondition_frequency=2, **options) for p in (outside, inside))
    for t in range(5):
        set_gradients(outside, t)
        set_gradients(inside, t)
        first.step()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            second.step()
    assert all(map(torch.equal, outside, inside))
