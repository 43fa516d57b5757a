"""The edge tier: as small as it is said to be, independent samples, and only operators that all targets run."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autosam3d.models.build import build_network
from autosam3d.models.spec import ResUnetSpec
from autosam3d.models.students.res_unet import ResUnet


def network(**settings: object) -> ResUnet:
    torch.manual_seed(0)
    spec = ResUnetSpec(num_outputs=3, patch_size=(32, 32, 32), channels=(8, 8, 16, 16, 16), **settings)  # type: ignore[arg-type]
    built = build_network(spec)
    assert isinstance(built, ResUnet)
    return built


def test_it_is_small() -> None:
    with torch.device("meta"):
        whole = build_network(ResUnetSpec(num_outputs=14))
        ct = torch.empty(1, 1, 96, 96, 96)
    assert sum(p.numel() for p in whole.parameters()) == 2_891_422
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        whole(ct)
    assert 7.5e9 < counter.get_total_flops() / 2 < 9e9


def test_a_batch_is_its_samples() -> None:
    model, ct = network().double(), torch.randn(2, 1, 32, 64, 32, dtype=torch.float64)
    with torch.no_grad():
        both, apart = model(ct), torch.cat([model(ct[:1]), model(ct[1:])])
    torch.testing.assert_close(both, apart, rtol=1e-9, atol=1e-9)


def test_every_weight_learns_and_the_finest_level_sees_the_voxels() -> None:
    model = network()
    ct = torch.randn(1, 1, 32, 32, 64, requires_grad=True)
    logits = model(ct)
    assert logits.shape == (1, 3, 32, 32, 64)
    logits[0, 1].sub(logits[0, 2]).square().mean().backward()
    for name, parameter in model.named_parameters():
        if name != "out.bias":
            assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name
    # One voxel moves the logits of its own place more than those of any other voxel.
    moved = ct.detach().clone()
    moved[0, 0, 16, 16, 32] += 5
    with torch.no_grad():
        change = (model(moved) - logits).abs().sum(1)[0]
    z, y, x = (int(i) for i in torch.unravel_index(change.argmax(), change.shape))
    assert max(abs(z - 16), abs(y - 16), abs(x - 32)) <= 2


def test_no_operator_that_a_target_lacks() -> None:
    for module in network().modules():
        assert not isinstance(module, nn.ConvTranspose3d)
        assert not isinstance(module, nn.Conv3d) or module.groups == 1


def test_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        network()(torch.zeros(1, 1, 32, 48, 32))
    with pytest.raises(ValueError, match="positive multiples of 32"):
        ResUnetSpec(num_outputs=3, patch_size=(32, 16, 32))
