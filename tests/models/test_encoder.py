"""The 3D encoder is SAM's 2D encoder wherever the volume does not change in z."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autosam3d.models import spec as spec_module
from autosam3d.models.autosam.adapter import SpatialAdapter
from autosam3d.models.autosam.encoder import ImageEncoder, PatchEmbed, resize_line, resize_plane
from autosam3d.models.autosam.network import AutoSam
from autosam3d.models.autosam.sam_weights import load_sam
from autosam3d.models.spec import AutoSamSpec, VitSpec

SMALL_SAM = VitSpec(embed_dim=24, num_blocks=4, num_heads=2, taps=(0, 1, 2, 3), pretrain_grid=16)
ALTERNATING_SAM = VitSpec(embed_dim=24, num_blocks=8, num_heads=2, taps=(1, 3, 5, 7), pretrain_grid=28)
"""Its odd blocks are SAM's global ones; 28 is two of SAM's windows of 14, so nothing is padded."""


@pytest.fixture(autouse=True)
def small_vits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(spec_module.VITS, "small", SMALL_SAM)
    monkeypatch.setitem(spec_module.VITS, "alternating", ALTERNATING_SAM)


def small_spec(**changes: Any) -> AutoSamSpec:
    settings = {
        "num_outputs": 3, "vit": "small", "patch_size": (16, 32, 32), "attn_window": (4, 4, 4), "adapter_dim": 6,
        "neck_dim": 8, "prompt_dim": 2, "head_dim": 4,
    }
    return AutoSamSpec(**(settings | changes))


def randomise(module: nn.Module, std: float = 0.3) -> None:
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)


# ---- patch embedding


def naive_patch_embed(embed: PatchEmbed, ct: Tensor) -> Tensor:
    """What the folded kernel stands for: enlarge, repeat as RGB, 2D convolution per slice, depth-wise convolution."""
    large = ct
    for axis, scale in enumerate(embed.scale):  # one axis at a time: trilinear interpolation is separable
        factors = [1.0, 1.0, 1.0]
        factors[axis] = float(scale)
        large = F.interpolate(large, scale_factor=tuple(factors), mode="trilinear", align_corners=False)
    batch, _, depth, *_ = large.shape
    slices = large.transpose(1, 2).flatten(0, 1).expand(-1, 3, -1, -1)
    if embed.sam_norm:
        mean = torch.tensor([123.675, 116.28, 103.53], dtype=ct.dtype).view(1, 3, 1, 1)
        std = torch.tensor([58.395, 57.12, 57.375], dtype=ct.dtype).view(1, 3, 1, 1)
        slices = (slices * 255 - mean) / std
    planes = embed.proj(slices).unflatten(0, (batch, depth)).transpose(1, 2)
    return embed.depth_proj(planes).permute(0, 2, 3, 4, 1)


@pytest.mark.parametrize("scale", [(1, 1, 1), (2, 2, 2), (4, 4, 4), (8, 8, 8), (16, 16, 16), (2, 4, 8), (1, 4, 16)])
@pytest.mark.parametrize("sam_norm", [False, True])
def test_folded_patch_embedding_equals_the_enlarged_volume(scale: tuple[int, int, int], sam_norm: bool) -> None:
    embed = PatchEmbed(6, 16, scale, sam_norm).double()
    randomise(embed)
    size = [2 * 16 // s for s in scale]
    ct = torch.rand(2, 1, *size, dtype=torch.float64)
    torch.testing.assert_close(embed(ct), naive_patch_embed(embed, ct), rtol=0, atol=1e-10)


def test_fold_is_differentiable_in_both_kernels() -> None:
    embed = PatchEmbed(4, 16, (4, 4, 4), False).double()
    randomise(embed)
    ct = torch.rand(1, 1, 8, 8, 8, dtype=torch.float64)
    fast = torch.autograd.grad(embed(ct).square().sum(), list(embed.parameters()))
    slow = torch.autograd.grad(naive_patch_embed(embed, ct).square().sum(), list(embed.parameters()))
    for got, wanted in zip(fast, slow, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_patch_embedding_stays_float32_under_autocast() -> None:
    embed = PatchEmbed(4, 16, (4, 4, 4), False)
    ct = torch.rand(1, 1, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = embed(ct)
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens, embed(ct), rtol=0, atol=0)


# ---- positions


def test_positions_pool_stretch_and_keep() -> None:
    table = torch.arange(16.0).view(1, 4, 4, 1)
    torch.testing.assert_close(resize_plane(table, 4, 4), table[0])
    torch.testing.assert_close(resize_plane(table, 2, 2)[..., 0], torch.tensor([[2.5, 4.5], [10.5, 12.5]]))
    assert resize_plane(table, 8, 2).shape == (8, 2, 1)
    line = torch.arange(4.0)[:, None]
    assert resize_line(line, 4) is line
    torch.testing.assert_close(resize_line(line, 2)[:, 0], torch.tensor([0.5, 2.5]))


# ---- the whole encoder against 2D


class PlainVit2d:
    """A 2D ViT with SAM's decomposed relative position in windows, written for this test from the formulas."""

    def __init__(self, encoder: ImageEncoder, window: int) -> None:
        self.weights = dict(encoder.named_parameters())
        self.num_heads, self.window = encoder.blocks[0].attn.num_heads, window  # type: ignore[union-attr]

    def __call__(self, image: Tensor) -> list[Tensor]:
        """(1, 3, H, W) to the tokens (h, w, C) after each block."""
        w = self.weights
        x = F.conv2d(image, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=16)[0].permute(1, 2, 0)
        pool = w["pos_embed"].shape[1] // x.shape[0]
        x = x + F.avg_pool2d(w["pos_embed"].permute(0, 3, 1, 2), pool)[0].permute(1, 2, 0)
        states = []
        for index in range(4):
            x = x + self.attention(self.norm(x, index, 1), index)
            hidden = F.gelu(self.linear(self.norm(x, index, 2), f"blocks.{index}.mlp.lin1"))
            x = x + self.linear(hidden, f"blocks.{index}.mlp.lin2")
            states.append(x)
        return states

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x: Tensor, index: int, number: int) -> Tensor:
        name = f"blocks.{index}.norm{number}"
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) / (variance + 1e-6).sqrt() * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def attention(self, x: Tensor, index: int) -> Tensor:
        out = torch.empty_like(x)
        n = self.window
        for top in range(0, x.shape[0], n):
            for left in range(0, x.shape[1], n):
                out[top : top + n, left : left + n] = self.window_attention(x[top : top + n, left : left + n], index)
        return self.linear(out, f"blocks.{index}.attn.proj")

    def window_attention(self, x: Tensor, index: int) -> Tensor:
        h, w, dim = x.shape
        tables = [self.weights[f"blocks.{index}.attn.rel_pos_{axis}"] for axis in "hw"]
        qkv = self.linear(x, f"blocks.{index}.attn.qkv").view(h, w, 3, self.num_heads, -1)
        out = torch.empty(h, w, self.num_heads, dim // self.num_heads, dtype=x.dtype)
        for head in range(self.num_heads):
            q, k, v = qkv[..., head, :].unbind(2)
            logits = torch.einsum("abc,xyc->abxy", q, k) / q.shape[-1] ** 0.5
            for axis, table in enumerate(tables):
                place = torch.arange(x.shape[axis])
                rows = table[place[:, None] - place[None] + table.shape[0] // 2]
                bias = torch.einsum("abc,axc->abx", q, rows) if axis == 0 else torch.einsum("abc,bxc->abx", q, rows)
                logits = logits + (bias[..., None] if axis == 0 else bias[:, :, None])
            out[..., head, :] = torch.einsum("abn,nc->abc", logits.flatten(2).softmax(-1), v.flatten(0, 1))
        return out.flatten(2)


def depth_constant_setup(**changes: Any) -> tuple[ImageEncoder, Tensor]:
    encoder = ImageEncoder(small_spec(**changes)).double()
    fresh = {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}
    randomise(encoder)
    for name, parameter in encoder.named_parameters():
        # Fresh adapters and depth kernels are what makes the start SAM's; all other values may be any.
        if "adapter" in name or "depth_proj" in name or name == "depth_embed":
            parameter.data.copy_(fresh[name])
    plane = torch.rand(1, 1, 1, 32, 32, dtype=torch.float64)
    return encoder, plane.expand(-1, -1, 16, -1, -1)


def test_depth_constant_volume_gives_the_2d_vit_in_every_plane() -> None:
    encoder, ct = depth_constant_setup()
    for block in encoder.blocks:
        block.attn.shifted = False  # type: ignore[union-attr]
    image = F.interpolate(ct[:, :, 0], scale_factor=4, mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    with torch.no_grad():
        wanted = PlainVit2d(encoder, window=4)(image)
        for stage, plane in zip(encoder(ct), wanted, strict=True):
            torch.testing.assert_close(stage, plane.expand_as(stage), rtol=0, atol=1e-10)


def test_planes_stay_equal_with_shifted_windows() -> None:
    encoder, ct = depth_constant_setup()
    assert encoder.blocks[1].attn.shifted  # type: ignore[union-attr]
    with torch.no_grad():
        for stage in encoder(ct):
            torch.testing.assert_close(stage, stage[:, :1].expand_as(stage), rtol=0, atol=1e-10)


def test_equals_transformers_sam_on_a_depth_constant_volume() -> None:
    """The published 2D encoder itself: windows of 14, whole-grid blocks, absolute and relative positions."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    config = transformers.SamVisionConfig(
        hidden_size=24, num_hidden_layers=8, num_attention_heads=2, image_size=448, output_channels=8,
        window_size=14, global_attn_indexes=[1, 3, 5, 7], mlp_dim=96, attn_implementation="eager",
    )
    theirs = transformers.SamVisionModel(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs = theirs.double()  # numbers that float32 holds, as in a weight file
    ours = AutoSam(
        small_spec(
            vit="alternating", patch_size=(8, 112, 112), attn_window=(2, 14, 14), global_blocks=(1, 3, 5, 7),
        )
    ).double()
    assert load_sam(ours, theirs.state_dict()) == 3 + 14 * 8
    for parameter in (block.attn.rel_pos_d for block in ours.image_encoder.blocks):
        nn.init.normal_(parameter)  # depth offsets cannot matter here
    plane = torch.rand(1, 1, 112, 112, dtype=torch.float64)
    image = F.interpolate(plane, scale_factor=4, mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    with torch.no_grad():
        states = theirs(image, output_hidden_states=True).hidden_states
        stages = ours.image_encoder(plane[:, :, None].expand(-1, -1, 8, -1, -1))
    for tap, stage in zip(ALTERNATING_SAM.taps, stages, strict=True):
        wanted = states[tap + 1].unsqueeze(1).expand_as(stage)
        torch.testing.assert_close(stage, wanted, rtol=0, atol=2e-6)  # their softmax is float32


# ---- adapters


def test_fresh_adapters_change_nothing_and_still_learn() -> None:
    encoder, ct = depth_constant_setup()
    without = ImageEncoder(small_spec(adapter_dim=0)).double()
    without.load_state_dict({k: v for k, v in encoder.state_dict().items() if ".adapter." not in k})
    ct = torch.rand_like(ct)
    stages = encoder(ct)
    for got, wanted in zip(stages, without(ct), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    stages[-1].square().sum().backward()
    for block in encoder.blocks:
        assert block.adapter.up.weight.grad.abs().max() > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_adapter_is_its_formula(act: str) -> None:
    adapter = SpatialAdapter(4, 3, act).double()
    randomise(adapter)
    tokens = torch.randn(2, 3, 4, 5, 4, dtype=torch.float64)
    function = F.gelu if act == "gelu" else F.relu
    narrow = function(tokens @ adapter.down.weight.T + adapter.down.bias)
    mixed = F.conv3d(narrow.movedim(-1, 1).contiguous(), adapter.dw.weight, adapter.dw.bias, padding=1, groups=3)
    wanted = tokens + function(mixed.movedim(1, -1)) @ adapter.up.weight.T + adapter.up.bias
    torch.testing.assert_close(adapter(tokens), wanted, rtol=0, atol=1e-12)


def test_checkpointing_changes_memory_only() -> None:
    plain, ct = depth_constant_setup()
    recomputed = ImageEncoder(small_spec(checkpointing=True)).double()
    recomputed.load_state_dict(plain.state_dict())
    ct = torch.rand_like(ct)
    for encoder in (plain, recomputed):
        encoder(ct)[-1].square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, msg=name)
