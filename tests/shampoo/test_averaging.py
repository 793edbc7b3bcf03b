import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from shampoo.averaging import AveragedWeights, update_averages


class Centered(nn.Module):
    """Subtracts a running mean. Each step assigns a new tensor to it, as in the batch norm of AlgoPerf's speech models."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))

    def forward(self, x):
        self.running_mean = 0.9 * self.running_mean + 0.1 * x.detach().mean(0)
        return x - self.running_mean


class Caches(nn.Module):
    """Assigns buffers whose shape or dtype changes, or that did not exist at first."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.zeros(1))
        self.register_buffer("low", torch.zeros(3))
        self.register_buffer("late", None)

    def forward(self, x):
        self.mask, self.low, self.late = torch.ones(len(x)), x.detach().mean(0).bfloat16(), x.detach().mean(0)
        return x


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), Centered(), nn.BatchNorm1d(3), nn.Linear(3, 2))


def train(model, averages, steps, evaluate=False):
    """Take steps with noise as gradients; return the weights and statistics after each."""
    iterates = []
    for t in steps:
        averages.train()
        torch.manual_seed(t)
        model(torch.randn(8, 4))  # updates the statistics of batch norm
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        averages.update()
        iterates.append(copy.deepcopy(model.state_dict()))
        if evaluate:
            averages.eval()
    return iterates


def assert_equal(a, b):
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_average_has_power_law_weights():
    """Unrolled, iterate s of t has the weight (1 - (1 - 1/s)^7.94) times the product of (1 - 1/r)^7.94 over r > s."""
    model = make_model()
    averages = AveragedWeights(model)
    iterates = train(model, averages, range(30))
    averages.eval()
    s = torch.arange(1, 31, dtype=torch.float64)
    weights = (1 - (1 - 1 / s) ** 7.94) * (s / 30) ** 7.94
    assert weights.sum() == pytest.approx(1)
    for name, shown in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert shown == 30
        else:
            mean = torch.einsum("t,t...->...", weights, torch.stack([x[name] for x in iterates]).double())
            torch.testing.assert_close(shown.double(), mean, rtol=1e-5, atol=1e-6)


def test_torchs_averaged_model_takes_the_function():
    model = make_model()
    averages, torchs = AveragedWeights(model), AveragedModel(model, multi_avg_fn=update_averages, use_buffers=True)
    for t in range(5):
        train(model, averages, [t])
        torchs.update_parameters(model)
    averages.eval()
    assert_equal(model.state_dict(), torchs.module.state_dict())


def test_the_window_is_a_tenth_of_the_steps():
    s = torch.arange(1, 10_001, dtype=torch.float64)
    weights = (1 - (1 - 1 / s) ** 7.94) * (s / 10_000) ** 7.94
    mean = (weights * s).sum()
    assert ((weights * (s - mean) ** 2).sum().sqrt() / 10_000).item() == pytest.approx(0.10, abs=1e-3)


def test_evaluations_do_not_affect_training():
    model, other = make_model(), make_model()
    train(model, AveragedWeights(model), range(10))
    averages = AveragedWeights(other)
    train(other, averages, range(10), evaluate=True)
    averages.eval()  # a second time
    averages.train()
    averages.train()
    assert_equal(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_checkpoint_continues_with_the_same_bits(tmp_path, evaluated):
    """Written while the model holds W, and while it holds E."""
    model, other = make_model(), make_model()
    averages = AveragedWeights(model)
    train(model, averages, range(5), evaluate=evaluated)
    torch.save({"model": model.state_dict(), "averages": averages.state_dict()}, tmp_path / "checkpoint")
    loaded = torch.load(tmp_path / "checkpoint", weights_only=True)
    other_averages = AveragedWeights(nn.ModuleDict({"module": other}))  # as wrapped in DDP
    other.load_state_dict(loaded["model"])
    other_averages.load_state_dict(loaded["averages"])
    for m, a in ((model, averages), (other, other_averages)):
        train(m, a, range(5, 9))
    assert_equal(model.state_dict(), other.state_dict())
    averages.eval()
    other_averages.eval()
    assert_equal(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("shape", [(1,), (3, 1), (1, 1, 4), (0, 1)])
def test_buffers_that_expand_repeats_are_averaged(shape):
    """Their averages are those of a copy without repetitions, and training goes on with the same elements."""
    model, copied, evaluated = nn.Module(), nn.Module(), []
    model.register_buffer("scale", torch.zeros(shape).expand(2, *[5 if n == 1 else n for n in shape]))
    copied.register_buffer("scale", model.scale.clone())
    for each in (model, copied):
        averages = AveragedWeights(each)
        for t in range(1, 4):
            averages.train()
            each.scale = torch.full(shape, float(t)).expand_as(each.scale) if each is model else torch.full_like(each.scale, t)
            averages.update()
            averages.eval()
        evaluated.append(each.scale.clone())
        averages.train()
    assert torch.equal(*evaluated)
    assert torch.equal(model.scale, torch.full_like(copied.scale, 3))
    assert model.scale.stride(0) == 0


def test_an_update_of_the_average_by_itself_is_refused():
    averages = AveragedWeights(make_model())
    averages.eval()
    with pytest.raises(RuntimeError, match="call train"):
        averages.update()


def test_buffers_that_are_new_or_have_another_shape_or_dtype_start_anew():
    model = nn.Sequential(nn.Linear(4, 3), Caches())
    averages = AveragedWeights(model)
    for size in (8, 8, 5):
        averages.train()
        model(torch.randn(size, 4))
        with torch.no_grad():
            model[0].weight.add_(1)
        averages.update()
        trained = {name: x.clone() for name, x in model.state_dict().items()}
        averages.eval()
    assert torch.equal(model[1].mask, torch.ones(5))
    assert not torch.equal(model[1].late, trained["1.late"])
    averages.train()
    assert_equal(trained, model.state_dict())
