"""A network of 2D convolutions is the network of 3D ones that it was made from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autosam3d.models.build import build_network
from autosam3d.models.conv2d_form import with_conv2d
from autosam3d.models.spec import NetworkSpec, ResUnetSpec, SwinUnetrSpec


@pytest.mark.parametrize(("kernel", "stride", "padding"), [
    (1, 1, 0), (3, 1, 1), (3, 2, 1), (2, 2, 0),
    ((3, 1, 1), 1, (1, 0, 0)), ((1, 3, 3), 1, (0, 1, 1)), ((3, 3, 1), (2, 1, 1), (1, 1, 0)),
])
def test_every_kind_of_convolution_is_the_same(kernel: int, stride: int, padding: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv3d(3, 5, kernel, stride, padding).double()
    x = torch.randn(2, 3, 4, 6, 8, dtype=torch.float64, requires_grad=True)
    sliced = with_conv2d(nn.Sequential(conv))
    torch.testing.assert_close(sliced(x), conv(x), rtol=0, atol=1e-12)
    grads = [torch.autograd.grad(form(x).square().sum(), x)[0] for form in (conv, sliced)]
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("spec", [
    SwinUnetrSpec(num_outputs=3, patch_size=(32, 32, 32)),
    ResUnetSpec(num_outputs=3, patch_size=(32, 32, 32), channels=(4, 4, 8, 8, 8)),
])
def test_a_whole_network_keeps_names_weights_and_results(spec: NetworkSpec) -> None:
    torch.manual_seed(0)
    network = build_network(spec).double()
    sliced = with_conv2d(network)
    assert not any(isinstance(module, nn.Conv3d) for module in sliced.modules())
    assert any(isinstance(module, nn.Conv3d) for module in network.modules())  # the original is left alone
    sliced.load_state_dict(network.state_dict(), strict=True)
    ct = torch.randn(2, 1, 32, 64, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(sliced(ct), network(ct), rtol=0, atol=1e-11)


@pytest.mark.parametrize("conv", [
    nn.Conv3d(4, 4, 3, padding=1, groups=4), nn.Conv3d(4, 4, 3, padding=2, dilation=2), nn.Conv3d(4, 4, 5, padding=2),
    nn.Conv3d(4, 4, 3, padding="same"),
])
def test_what_has_no_such_form_is_refused_by_name(conv: nn.Conv3d) -> None:
    with pytest.raises(ValueError, match=r"0\.inner: expected a convolution"):
        with_conv2d(nn.Sequential(nn.ModuleDict({"inner": conv})))
