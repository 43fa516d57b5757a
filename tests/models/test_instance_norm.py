"""Instance norm and leaky ReLU in one: PyTorch's function and gradients, and more exact over large maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autosam3d.models import instance_norm
from autosam3d.models.instance_norm import norm_leaky


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("slope", [1, 0.01])
@pytest.mark.parametrize("rows", [1 << 17, 50])  # the whole map at a time, and a few rows
def test_values_and_gradients_are_pytorchs(
    affine: bool, slope: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instance_norm._NormLeaky, "MAX_ROWS", rows)
    torch.manual_seed(0)
    x = (torch.randn(2, 3, 5, 4, 6, dtype=torch.float64) * 3 + 50).requires_grad_()
    # A weight of either sign and one of 0, whose gradient is not 0.
    weight = torch.tensor([1.5, -0.5, 0.0], dtype=torch.float64, requires_grad=True) if affine else None
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True) if affine else None
    inputs = [x] if weight is None or bias is None else [x, weight, bias]
    expected = F.leaky_relu(F.instance_norm(x, weight=weight, bias=bias), slope)
    got = norm_leaky(x.to(memory_format=torch.channels_last_3d), slope, weight, bias)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    seed = torch.randn_like(expected)
    for mine, theirs in zip(*(torch.autograd.grad(y, inputs, seed) for y in (got, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


def test_float32_over_a_large_map_is_exact_to_rounding() -> None:
    """PyTorch's batch norm over one channels_last_3d sample, the nearest kernel, is off by 2e-4 here."""
    torch.manual_seed(0)
    x = (torch.randn(1, 12, 64, 64, 64) + 1).to(memory_format=torch.channels_last_3d)
    exact = F.instance_norm(x.double())
    assert float((norm_leaky(x, 1).double() - exact).abs().max()) < 2e-6


@pytest.mark.parametrize(("mean", "spread"), [(0, 1), (1, 1), (50, 3), (-300, 20)])
def test_float32_over_128_cubed_is_exact_to_a_millionth(mean: float, spread: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 1, 128, 128, 128) * spread + mean
    exact = F.instance_norm(x.double())
    assert float((norm_leaky(x, 1).double() - exact).abs().max()) < 1e-6


def test_bfloat16_has_float32_statistics_and_keeps_layout() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 16, 16, 16).bfloat16().to(memory_format=torch.channels_last_3d).requires_grad_()
    y = norm_leaky(x, 0.01)
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last_3d)
    exact = F.leaky_relu(F.instance_norm(x.float()), 0.01)
    assert (y.float() - exact).norm() < 5e-3 * exact.norm()
    seed = torch.randn_like(exact)
    got, wanted = (torch.autograd.grad(t, x, s)[0].float() for t, s in ((y, seed.bfloat16()), (exact, seed)))
    assert (got - wanted).norm() < 2e-2 * wanted.norm()


def test_a_single_voxel_and_a_constant_map_become_the_bias() -> None:
    bias = torch.tensor([0.5, -2.0])
    for x in (torch.full((1, 2, 1, 1, 1), 7.0), torch.full((1, 2, 3, 3, 3), 7.0)):
        y = norm_leaky(x.requires_grad_(), 1, torch.ones(2), bias)
        torch.testing.assert_close(y, bias[None, :, None, None, None].expand(y.shape))
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert not grad.any()


def test_the_form_for_exports_is_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small maps with PyTorch's own norm, large ones by way of blocks of 4x4x4 in ONNX, one voxel without a norm."""
    torch.manual_seed(0)
    weight, bias = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        plain = norm_leaky(x, 0.01, weight, bias)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_exporting", lambda: True)
            patch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
            patch.setattr(instance_norm, "_MANY", 1 << 9)
            return plain, norm_leaky(x, 0.01, weight, bias)

    for size in ((8, 8, 8), (8, 12, 4), (9, 8, 8), (2, 3, 4), (1, 1, 1)):
        plain, exported = both(torch.randn(2, 3, *size, dtype=torch.float64) * 5 + 20)
        torch.testing.assert_close(exported, plain, rtol=0, atol=1e-9)
