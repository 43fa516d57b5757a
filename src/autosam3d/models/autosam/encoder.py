"""SAM's 2D image encoder, made to read CT volumes: patch embedding, positions, transformer blocks, necks.

Module and parameter names are SAM's (``patch_embed.proj``, ``blocks.i.attn.qkv`` ...); what the 3D encoder adds has
names of its own (``depth_proj``, ``depth_embed``, ``adapter``, ``rel_pos_d``). Tokens are (B, d, h, w, C) throughout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autosam3d.axes import Size
from autosam3d.models.autosam.adapter import SpatialAdapter
from autosam3d.models.autosam.attention import WindowAttention
from autosam3d.models.conv import Conv3d
from autosam3d.models.spec import VITS, AutoSamSpec

if TYPE_CHECKING:
    from jaxtyping import Float

_SAM_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
_SAM_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)


class ImageEncoder(nn.Module):
    """CT to the outputs of the four tapped blocks."""

    def __init__(self, spec: AutoSamSpec) -> None:
        super().__init__()
        vit = VITS[spec.vit]
        self.taps, self.checkpointing = vit.taps, spec.checkpointing
        self.patch_embed = PatchEmbed(vit.embed_dim, vit.pretrain_patch, spec.scale, spec.sam_norm)
        self.pos_embed = nn.Parameter(torch.zeros(1, vit.pretrain_grid, vit.pretrain_grid, vit.embed_dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.depth_embed = nn.Parameter(torch.zeros(spec.token_grid[0], vit.embed_dim)) if spec.depth_embed else None
        self.blocks = nn.ModuleList(EncoderBlock(spec, index) for index in range(vit.num_blocks))

    def forward(self, ct: Float[Tensor, "B 1 D H W"]) -> list[Float[Tensor, "B d h w C"]]:
        tokens = self.patch_embed(ct)
        tokens = tokens + self.positions(cast(Size, tuple(tokens.shape[1:4])))
        stages = []
        for index, block in enumerate(self.blocks):
            if self.checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
            if index in self.taps:
                stages.append(tokens)
        return stages

    def positions(self, grid: Size) -> Float[Tensor, "d h w C"]:
        """SAM's table of absolute positions, pooled to the plane, plus the depth positions."""
        positions = resize_plane(self.pos_embed, grid[1], grid[2])
        if self.depth_embed is not None:
            positions = positions + resize_line(self.depth_embed, grid[0])[:, None, None]
        return positions


class PatchEmbed(nn.Module):
    """Tokens from a CT that is enlarged `scale` times and cut by SAM's 2D kernel and a depth-wise 1D kernel.

    Enlarging (linear interpolation), repeating the grey value as RGB, the 2D kernel and the depth kernel are all
    linear, so they fold into one small 3D kernel over the CT itself: with n = 16/scale voxels per token and one voxel
    of border on each side. The enlarged volume never exists. *Source*: paper section 3.2 (factorised embedding).
    """

    def __init__(self, dim: int, kernel: int, scale: Size, sam_norm: bool) -> None:
        super().__init__()
        self.kernel, self.scale, self.sam_norm = kernel, scale, sam_norm
        self.proj = nn.Conv2d(3, dim, kernel, stride=kernel)
        # (C, 1, kernel, 1, 1): the mean over depth at first, so a CT that does not change in z gives SAM's own tokens.
        self.depth_proj = nn.Conv3d(dim, dim, (kernel, 1, 1), stride=(kernel, 1, 1), groups=dim)
        nn.init.constant_(self.depth_proj.weight, 1 / kernel)
        nn.init.zeros_(cast(Tensor, self.depth_proj.bias))

    def forward(self, ct: Float[Tensor, "B 1 D H W"]) -> Float[Tensor, "B d h w C"]:
        # float32 also under autocast: bfloat16 would cut a CT window of 1000 HU into steps of several HU.
        with torch.autocast(ct.device.type, enabled=False):
            kernel, bias = self.folded()
            ct = ct.to(kernel.dtype)
            border = [0 if s == 1 else 1 for s in self.scale]
            ct = F.pad(ct, [b for b in reversed(border) for _ in range(2)], mode="replicate")
            for axis, (size, s) in enumerate(zip(kernel.shape[1:], self.scale, strict=True)):
                ct = ct.unfold(2 + axis, size, self.kernel // s)
            return F.linear(ct.squeeze(1).flatten(4), kernel.flatten(1), bias)

    def folded(self) -> tuple[Tensor, Tensor]:
        """The 3D kernel (C, d, h, w) over the CT and its bias (C,), composed in the weights' own precision."""
        resample = [linear_resampling(self.kernel, s).to(self.proj.weight) for s in self.scale]
        plane, plane_bias = self.proj.weight, cast(Tensor, self.proj.bias)
        if self.sam_norm:
            std = plane.new_tensor(_SAM_STD).view(1, 3, 1, 1)
            mean = plane.new_tensor(_SAM_MEAN).view(1, 3, 1, 1)
            plane_bias = plane_bias - (plane * mean / std).sum((1, 2, 3))
            plane = plane / std
        plane = torch.einsum("chw,hi,wj->cij", plane.sum(1), resample[1], resample[2])
        depth_weight = self.depth_proj.weight.flatten(1)
        depth = depth_weight @ resample[0]
        bias = plane_bias * depth_weight.sum(1) + cast(Tensor, self.depth_proj.bias)
        return depth[:, :, None, None] * plane[:, None], bias


def linear_resampling(length: int, scale: int) -> Tensor:
    """The matrix M (length, n + 2) that enlarges n = length/scale samples and one neighbour per side, float64.

    Half-pixel centres, as ``F.interpolate(align_corners=False)``; for scale 1 the identity without neighbours.
    """
    if scale == 1:
        return torch.eye(length, dtype=torch.float64)
    position = (torch.arange(length, dtype=torch.float64) + 0.5) / scale - 0.5
    low = position.floor()
    share = position - low
    matrix = torch.zeros(length, length // scale + 2, dtype=torch.float64)
    rows = torch.arange(length)
    matrix[rows, low.long() + 1] += 1 - share
    matrix[rows, low.long() + 2] += share
    return matrix


class EncoderBlock(nn.Module):
    """Adapter, attention, MLP; the last two as in SAM."""

    def __init__(self, spec: AutoSamSpec, index: int) -> None:
        super().__init__()
        vit = VITS[spec.vit]
        whole_grid = index in spec.global_blocks
        self.adapter = (
            SpatialAdapter(vit.embed_dim, spec.adapter_dim, spec.adapter_act) if spec.adapter_dim else nn.Identity()
        )
        self.norm1 = nn.LayerNorm(vit.embed_dim, eps=1e-6)
        self.attn = WindowAttention(
            vit.embed_dim, vit.num_heads, spec.token_grid if whole_grid else spec.attn_window,
            shifted=index % 2 == 1 and not whole_grid, whole_grid=whole_grid,
        )
        self.norm2 = nn.LayerNorm(vit.embed_dim, eps=1e-6)
        self.mlp = Mlp(vit.embed_dim, int(vit.embed_dim * vit.mlp_ratio))

    def forward(self, tokens: Float[Tensor, "B d h w C"]) -> Float[Tensor, "B d h w C"]:
        tokens = self.adapter(tokens)
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden)
        self.lin2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Float[Tensor, "*any C"]) -> Float[Tensor, "*any C"]:
        return self.lin2(F.gelu(self.lin1(tokens)))


class Neck(nn.Sequential):
    """A stage of tokens to a feature map: 1x1x1 and 3x3x3 convolution, each with a norm over channels."""

    def __init__(self, dim: int, neck_dim: int) -> None:
        super().__init__(
            Conv3d(dim, neck_dim, 1, bias=False),
            ChannelNorm(neck_dim),
            Conv3d(neck_dim, neck_dim, 3, padding=1, bias=False),
            ChannelNorm(neck_dim),
        )

    def forward(self, tokens: Float[Tensor, "B d h w C"]) -> Float[Tensor, "B E d h w"]:
        # A permuted view of tokens is what channels_last_3d means: no copy.
        return super().forward(tokens.permute(0, 4, 1, 2, 3))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, d, h, w)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, features: Float[Tensor, "B C d h w"]) -> Float[Tensor, "B C d h w"]:
        return super().forward(features.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


def resize_plane(table: Tensor, h: int, w: int) -> Tensor:
    """A table (1, H, W, C) as (h, w, C): averaged where it shrinks, interpolated where it grows."""
    grid = table.permute(0, 3, 1, 2)
    rows, columns = grid.shape[2:]
    if (rows, columns) != (min(h, rows), min(w, columns)):
        grid = F.adaptive_avg_pool2d(grid, (min(h, rows), min(w, columns)))
    if tuple(grid.shape[2:]) != (h, w):
        grid = F.interpolate(grid, size=(h, w), mode="bilinear", align_corners=False)
    return grid[0].permute(1, 2, 0)


def resize_line(table: Tensor, d: int) -> Tensor:
    """A table (D, C) as (d, C) by linear interpolation."""
    if table.shape[0] == d:
        return table
    return F.interpolate(table.t()[None], size=d, mode="linear", align_corners=False)[0].t()
