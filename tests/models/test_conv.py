"""The convolution that avoids broken bfloat16 kernels."""

from __future__ import annotations

import itertools
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autosam3d.models.conv import Conv3d, conv3d


@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize("autocast", [True, False])
def test_gradients_in_bfloat16_are_those_of_float64(groups: int, autocast: bool) -> None:
    """Also over a depth of 2, where the library's own kernel returns what lay in memory before."""
    torch.manual_seed(0)
    for size in itertools.product((1, 2, 3), (2, 5), (2,)):
        x, weight = torch.randn(1, 16, *size).bfloat16(), torch.randn(16, 16 // groups, 3, 3, 3).bfloat16()
        grad = torch.randn(1, 16, *size).bfloat16()
        exact = [t.double().requires_grad_() for t in (x, weight)]
        F.conv3d(exact[0], exact[1], padding=1, groups=groups).backward(grad.double())
        # Under autocast the tensors come in as float32 and leave as bfloat16.
        low = [(t.float() if autocast else t).requires_grad_() for t in (x, weight)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = conv3d(low[0], low[1], padding=1, groups=groups)
        assert y.dtype == torch.bfloat16
        y.backward(grad)
        for got, wanted in zip(low, exact, strict=True):
            assert got.grad is not None
            assert wanted.grad is not None
            assert (got.grad.double() - wanted.grad).norm() < 0.02 * wanted.grad.norm(), size


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("depth", [7, 8, 12])
def test_halves_of_a_single_sample_are_the_whole(depth: int, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, depth, 5, 6).to(memory_format=layout).requires_grad_()
    conv = Conv3d(4, 3, 3, padding=1)
    inputs = [x, conv.weight, conv.bias]
    weight = torch.randn(1, 3, depth, 5, 6)
    wanted = F.conv3d(x.double(), conv.weight.double(), cast(torch.Tensor, conv.bias).double(), padding=1)
    torch.testing.assert_close(conv(x), wanted.float(), rtol=0, atol=1e-5)
    gradients = [torch.autograd.grad((y * weight).sum(), inputs) for y in (conv(x), wanted)]
    for got, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-4)


def test_module_is_torchs_in_names_start_values_and_result() -> None:
    torch.manual_seed(0)
    ours = Conv3d(4, 6, 3, padding=1, groups=2)
    torch.manual_seed(0)
    theirs = nn.Conv3d(4, 6, 3, padding=1, groups=2)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, 4, 2, 3, 4)
    assert torch.equal(ours(x), theirs(x))
