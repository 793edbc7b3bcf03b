"""TF32 emulated on a CPU: the rounding, and where it applies."""

import numpy as np
import pytest
import torch

from experiments.tf32 import PLACES, TF32, allow_tf32, error_table, low_rank_gradients, to_tf32
from shampoo.roots import full_precision


@pytest.mark.parametrize("truncate", [False, True])
def test_rounding_keeps_ten_bits_of_mantissa(truncate):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10_000, generator=generator) * torch.logspace(-30, 30, 10_000)
    x = torch.cat([x, torch.tensor([0.0, -0.0, 1 + 2**-11, 1 + 3 * 2**-11, 3e38])])
    mantissa, exponent = np.frexp(x.double().numpy())  # in [0.5, 1): 11 bits of it with the leading one
    kept = np.trunc(mantissa * 2**11) if truncate else np.round(mantissa * 2**11)  # numpy rounds ties to even
    assert np.array_equal(to_tf32(x, truncate).double().numpy(), np.ldexp(kept / 2**11, exponent))


def test_rounding_keeps_what_is_not_finite():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert torch.equal(to_tf32(x).nan_to_num(7.0), x.nan_to_num(7.0))


@pytest.fixture
def matrices():
    """Return two stacks of matrices, float32."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 8, 8, generator=generator), torch.randn(3, 8, 8, generator=generator)


def products(A, B):
    """Return a product of each place in the optimizer."""
    with full_precision():
        root = A @ B
    return {"factors": torch.zeros(3, 8, 8).baddbmm_(A, B, beta=0.5), "roots": root, "directions": A @ B}


@pytest.mark.parametrize("variant", [variant for variant in PLACES if variant != "model_too"])
def test_products_are_rounded_at_their_places_only(matrices, variant):
    exact, rounded = products(*matrices), products(*map(to_tf32, matrices))
    with allow_tf32(TF32(PLACES[variant])):
        found = products(*matrices)
    for place in found:
        assert torch.equal(found[place], (rounded if place in PLACES[variant] else exact)[place])
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_models_products_are_rounded_forward_and_backward(matrices):
    mode, (A, B) = TF32(PLACES["model_too"]), matrices
    mode.in_model = True
    A.requires_grad_()
    with allow_tf32(mode):
        (A @ B).sum().backward()
    assert torch.allclose(A.grad, to_tf32(B).sum(dim=2).unsqueeze(1).expand_as(A))
    assert not torch.allclose(A.grad, B.sum(dim=2).unsqueeze(1).expand_as(A), rtol=1e-5)


@pytest.mark.slow
def test_directions_of_low_rank_need_full_precision_and_factors_do_not():
    table = error_table([low_rank_gradients()])
    newton, eigh = (table.loc["entry: power 1/2, relative epsilon 1e-5", solver] for solver in ("newton", "eigh"))
    assert newton.loc["factors", "factors"] < 1e-3
    assert newton.loc["roots", "factors"] < 1e-3
    assert newton.loc["directions", "factors"] < 1e-2
    assert newton.loc["directions", "directions"] > 0.1
    assert newton.loc["roots", "roots_too"] == pytest.approx(eigh.loc["roots", "roots_too"])  # from eigenvectors
