"""The Auto Prompt Generator and the mask decoder: grids of any shape, norms, and the order of enlarging and joining."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autosam3d.models.autosam.mask_decoder import MaskDecoder, conv_enlarged
from autosam3d.models.autosam.prompt_generator import PromptGenerator, instance_norm, resize


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_instance_norm_is_torchs_with_values_and_gradients(batch: int, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = (torch.randn(batch, 5, 3, 4, 6, dtype=torch.float64) * 3 + 1).to(memory_format=layout).requires_grad_()
    weight = torch.randn(batch, 5, 3, 4, 6, dtype=torch.float64)
    got, wanted = instance_norm(x), F.instance_norm(x)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    assert got.is_contiguous(memory_format=layout)
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (got, wanted)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_instance_norm_of_one_voxel_is_zero() -> None:
    x = torch.randn(2, 3, 1, 1, 1, requires_grad=True)
    y = instance_norm(x)
    y.sum().backward()
    assert y.abs().max() == 0
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_instance_norm_keeps_float32_statistics_for_bfloat16() -> None:
    torch.manual_seed(0)
    x = (torch.randn(1, 2, 20, 20, 20) + 10).to(memory_format=torch.channels_last_3d).bfloat16()
    y = instance_norm(x)
    assert y.dtype == torch.bfloat16
    # The mean of 8000 numbers near 10, summed in bfloat16, would be off by whole units.
    torch.testing.assert_close(y.float(), F.instance_norm(x.float()), rtol=1e-2, atol=1e-2)


def grids_of(generator: PromptGenerator, features: Tensor) -> list[tuple[int, ...]]:
    """The grid after each level's convolutions on the way down."""
    seen: list[tuple[int, ...]] = []
    hooks = [
        part.register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape[2:])))
        for part in (generator.inc, *generator.downs)
    ]
    generator(features)
    for hook in hooks:
        hook.remove()
    return seen


def test_default_levels_are_the_papers() -> None:
    with torch.device("meta"):
        generator = PromptGenerator(256, 16, (32, 32, 32))
    assert sum(p.numel() for p in generator.parameters()) == 4_255_232
    assert [down[1][0].weight.shape[0] for down in generator.downs] == [32, 64, 128, 160]


@pytest.mark.parametrize(
    ("grid", "bottom", "num_halvings"),
    [
        ((32, 32, 32), (2, 2, 2), 4), ((16, 16, 16), (2, 2, 2), 3), ((8, 8, 8), (2, 2, 2), 2),
        ((4, 32, 32), (2, 2, 2), 4), ((5, 7, 12), (2, 2, 2), 3), ((1, 6, 9), (1, 2, 2), 3),
        ((64, 8, 8), (4, 2, 2), 4), ((2, 2, 2), (2, 2, 2), 0), ((1, 1, 1), (1, 1, 1), 0),
    ],
)
def test_no_axis_is_halved_below_two(grid: tuple[int, ...], bottom: tuple[int, ...], num_halvings: int) -> None:
    generator = PromptGenerator(4, 2, grid)  # type: ignore[arg-type]
    features = torch.randn(2, 4, *grid)
    seen = grids_of(generator, features)
    assert len(seen) == num_halvings + 1
    assert seen[0] == grid
    assert seen[-1] == bottom
    assert generator(features).shape == features.shape


def test_a_generator_takes_grids_it_was_not_built_for() -> None:
    generator = PromptGenerator(4, 2, (8, 8, 8))
    for grid in ((2, 2, 2), (3, 20, 5), (16, 16, 16)):
        assert generator(torch.randn(1, 4, *grid)).shape == (1, 4, *grid)


def test_residual_prompt_adds_its_input() -> None:
    torch.manual_seed(0)
    plain = PromptGenerator(4, 2, (4, 4, 4))
    residual = PromptGenerator(4, 2, (4, 4, 4), residual=True)
    residual.load_state_dict(plain.state_dict())
    features = torch.randn(1, 4, 4, 4, 4)
    torch.testing.assert_close(residual(features), features + plain(features))


def literal_decoder(decoder: MaskDecoder, inputs: list[Tensor], ct: Tensor) -> Tensor:
    """In the paper's words: enlarge each head's output, concatenate with the image, one convolution, one more."""

    def conv_norm_relu(x: Tensor, weight: Tensor) -> Tensor:
        return F.relu(F.instance_norm(F.conv3d(x, weight, padding=1)))

    size = [n // s for n, s in zip(ct.shape[2:], decoder.fuse_stride, strict=True)]
    image = F.interpolate(ct, size=size, mode="trilinear", align_corners=False)
    maps = []
    for head, x in zip(decoder.heads, inputs, strict=True):
        for part in head:  # type: ignore[union-attr]
            x = conv_norm_relu(x, part[0].weight)
        maps.append(F.interpolate(x, size=size, mode="trilinear", align_corners=False))
    fused = conv_norm_relu(torch.cat([*maps, image], 1), decoder.fuse.weight)
    logits = F.conv3d(fused, decoder.out.weight, padding=1)
    return F.interpolate(logits, size=ct.shape[2:], mode="trilinear", align_corners=False)


@pytest.mark.parametrize(
    ("stride", "token", "expected"),
    [(2, (4, 4, 4), (2, 2, 2)), (1, (4, 4, 4), (1, 1, 1)), (2, (1, 4, 2), (1, 2, 2)), (2, (16, 16, 16), (2, 2, 2))],
)
def test_decoder_equals_the_literal_order(
    stride: int, token: tuple[int, int, int], expected: tuple[int, int, int]
) -> None:
    torch.manual_seed(0)
    decoder = MaskDecoder(6, 4, 3, 4, token, stride).double()
    assert decoder.fuse_stride == expected
    inputs = [torch.randn(2, 6, 2, 3, 2, dtype=torch.float64) for _ in range(4)]
    ct = torch.randn(2, 1, *(n * t for n, t in zip((2, 3, 2), token, strict=True)), dtype=torch.float64)
    got = decoder(inputs[:-1], inputs[-1], ct)
    torch.testing.assert_close(got, literal_decoder(decoder, inputs, ct), rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [(12, 8, 10), (6, 4, 10), (7, 9, 5), (3, 4, 5), (3, 8, 5), (1, 2, 3)])
def test_enlarging_and_convolving_trade_places(size: tuple[int, int, int]) -> None:
    """Whole and broken ratios, axes that stay or shrink; the result and both gradients."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 6, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    got, wanted = conv_enlarged(x, weight, size), F.conv3d(resize(x, size), weight, padding=1)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)
    cotangent = torch.randn_like(wanted)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), cotangent) for y in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_enlarging_last_is_as_exact_in_bfloat16_as_enlarging_first() -> None:
    torch.manual_seed(0)
    x, weight, size = torch.randn(2, 32, 6, 6, 6), torch.randn(8, 32, 3, 3, 3), (24, 12, 12)
    exact = F.conv3d(resize(x, size), weight, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        first, last = F.conv3d(resize(x, size), weight, padding=1), conv_enlarged(x, weight, size)
    assert last.dtype == torch.bfloat16
    first_off, last_off = ((y.float() - exact).norm() / exact.norm() for y in (first, last))
    assert last_off < 0.01 and last_off < 2.5 * first_off


def test_refinement_starts_as_nothing_and_learns() -> None:
    torch.manual_seed(0)
    plain, refined = (MaskDecoder(6, 4, 3, 1, (4, 4, 4), refine=refine) for refine in (False, True))
    missing = refined.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert sorted(missing) == ["refine.bias", "refine.weight"]
    prompt, ct = torch.randn(1, 6, 2, 2, 2), torch.randn(1, 1, 8, 8, 8)
    logits = refined([], prompt, ct)
    torch.testing.assert_close(logits, plain([], prompt, ct))
    logits.square().sum().backward()
    assert isinstance(refined.refine, nn.Conv3d)
    assert refined.refine.weight.grad is not None
    assert refined.refine.weight.grad.abs().max() > 0


def test_resize_puts_a_ramp_where_it_belongs() -> None:
    """Half-voxel centres: a linear ramp stays the same ramp in millimetres, away from the ends."""
    ramp = (torch.arange(8.0) * 4 + 1.5).view(1, 1, 8, 1, 1).expand(-1, -1, -1, 2, 2)
    fine = resize(ramp, (32, 8, 8))[0, 0, :, 0, 0]
    torch.testing.assert_close(fine[2:-2], torch.arange(2.0, 30.0))
