"""The Auto Prompt Generator: a small 3D U-Net that replaces the clicks and boxes SAM asks for."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autosam3d.axes import Size
from autosam3d.models.conv import Conv3d

if TYPE_CHECKING:
    from jaxtyping import Float

_WIDTHS = (1, 2, 4, 8, 10)
"""Channels per level in units of the base width. *Source*: the published parameter count (16 to 160)."""


class PromptGenerator(nn.Module):
    """3D U-Net over the deepest features; its output takes the prompt's place.

    Each level halves the axes that are longer than 2 tokens (rounding up), so that no axis ends below 2 whatever
    the grid; there are as many levels as the longest axis of `grid` can use, five at most.

    Args:
        dim: channels in and out.
        base: width of the first level.
        grid: the token grid that the model is built for.
        residual: add the input to the output.
    """

    def __init__(self, dim: int, base: int, grid: Size, residual: bool = False) -> None:
        super().__init__()
        self.residual = residual
        widths = [base * factor for factor in _WIDTHS[: 1 + _num_halvings(max(grid), len(_WIDTHS) - 1)]]
        self.inc = nn.Sequential(Conv3d(dim, base, 3, padding=1, bias=False), ConvNormRelu(base, base))
        levels = list(pairwise(widths))
        self.downs = nn.ModuleList(_double_conv(fine, coarse) for fine, coarse in levels)
        self.ups = nn.ModuleList(_double_conv(fine + coarse, fine) for fine, coarse in reversed(levels))
        self.out = Conv3d(base, dim, 1)

    def forward(self, features: Float[Tensor, "B E d h w"]) -> Float[Tensor, "B E d h w"]:
        x = self.inc(features)
        skips = []
        for down in self.downs:
            skips.append(x)
            x = down(_halve(x))
        for up in self.ups:
            skip = skips.pop()
            x = up(torch.cat([skip, resize(x, skip.shape[2:])], 1))
        prompt = self.out(x)
        return features + prompt if self.residual else prompt


class ConvNormRelu(nn.Sequential):
    """Conv3d 3x3x3 without bias, instance norm without weights, ReLU."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(Conv3d(dim_in, dim_out, 3, padding=1, bias=False))

    def forward(self, x: Float[Tensor, "B C d h w"]) -> Float[Tensor, "B E d h w"]:
        return F.relu(instance_norm(super().forward(x)))


def instance_norm(x: Float[Tensor, "B C d h w"], eps: float = 1e-5) -> Float[Tensor, "B C d h w"]:
    """Each channel of each sample to mean 0 and variance 1 over its voxels; a single voxel becomes 0.

    The numbers are ``F.instance_norm``'s. That one copies channels_last_3d input into another layout and back;
    batch norm over one sample is the same sum, has a kernel for this layout and is several times faster.
    """
    if x[0, 0].numel() == 1:
        return x - x.detach()
    if not x.is_contiguous(memory_format=torch.channels_last_3d):
        return F.instance_norm(x, eps=eps)
    normed = [F.batch_norm(sample, None, None, training=True, eps=eps) for sample in x.split(1)]
    return normed[0] if len(normed) == 1 else torch.cat(normed)


def resize(x: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
    """Trilinear interpolation of (B, C, ...) with half-voxel centres; the input itself if the size is right."""
    if x.shape[2:] == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="trilinear", align_corners=False)


def _double_conv(dim_in: int, dim_out: int) -> nn.Sequential:
    return nn.Sequential(ConvNormRelu(dim_in, dim_out), ConvNormRelu(dim_out, dim_out))


def _num_halvings(length: int, most: int) -> int:
    count = 0
    while length > 2 and count < most:
        length, count = -(-length // 2), count + 1
    return count


def _halve(x: Tensor) -> Tensor:
    window = tuple(2 if n > 2 else 1 for n in x.shape[2:])
    return F.max_pool3d(x, window, ceil_mode=True)
