"""The mask decoder with its multi-layer aggregation: features of several depths, the prompt and the CT to logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autosam3d.axes import Size
from autosam3d.models.autosam.prompt_generator import ConvNormRelu, instance_norm, resize
from autosam3d.models.conv import Conv3d, conv3d

if TYPE_CHECKING:
    from jaxtyping import Float


class MaskDecoder(nn.Module):
    """One head per input, enlarge, join with the CT, fuse.

    Args:
        dim: channels of each input.
        head_dim: channels of each head's output and of the fused map.
        num_outputs: K.
        num_inputs: feature maps, the prompt included.
        token_size: voxels per token and axis.
        fuse_stride: 2 fuses at half the CT's resolution, 1 at the full one (never coarser than the tokens).
        refine: end with a residual convolution over logits and CT at full resolution.

    *Source*: paper section 3.4; widths from the published parameter count.
    """

    def __init__(
        self, dim: int, head_dim: int, num_outputs: int, num_inputs: int, token_size: Size,
        fuse_stride: int = 2, refine: bool = False,
    ) -> None:
        super().__init__()
        self.fuse_stride = tuple(min(fuse_stride, t) for t in token_size)
        self.heads = nn.ModuleList(
            nn.Sequential(ConvNormRelu(dim, head_dim), ConvNormRelu(head_dim, head_dim)) for _ in range(num_inputs)
        )
        self.fuse = Conv3d(num_inputs * head_dim + 1, head_dim, 3, padding=1, bias=False)
        self.out = Conv3d(head_dim, num_outputs, 3, padding=1, bias=False)
        self.refine = Conv3d(num_outputs + 1, num_outputs, 3, padding=1) if refine else None
        if self.refine is not None:
            nn.init.zeros_(self.refine.weight)
            nn.init.zeros_(cast(Tensor, self.refine.bias))

    def forward(
        self, features: list[Float[Tensor, "B E d h w"]], prompt: Float[Tensor, "B E d h w"],
        ct: Float[Tensor, "B 1 D H W"],
    ) -> Float[Tensor, "B K D H W"]:
        heads = [head(x) for head, x in zip(self.heads, [*features, prompt], strict=True)]
        image = ct if max(self.fuse_stride) == 1 else F.avg_pool3d(ct, self.fuse_stride)
        logits = self.out(self._fuse(torch.cat(heads, 1), image))
        logits = resize(logits, ct.shape[2:])
        if self.refine is not None:
            logits = logits + self.refine(torch.cat([logits, ct.to(logits.dtype)], 1))
        return logits

    def _fuse(self, joined: Tensor, image: Tensor) -> Tensor:
        """The fusion convolution over (enlarged heads, image) as a sum over the two: no copy of both into one map."""
        split = joined.shape[1]
        size = cast(Size, tuple(image.shape[2:]))
        fused = conv_enlarged(joined, self.fuse.weight[:, :split], size)
        fused = fused + conv3d(image, self.fuse.weight[:, split:], padding=1)
        return F.relu(instance_norm(fused))


def conv_enlarged(x: Tensor, weight: Tensor, size: Size) -> Tensor:
    """``conv3d(resize(x, size), weight, padding=1)``, the same numbers, without ever making the enlarged map.

    Enlarging works on voxels and the kernel's taps on channels, so they can trade places: first every tap mixes the
    channels on the small grid, then each axis is enlarged while its three taps are shifted into place and summed.
    That is 1/8 of the products where each axis doubles, and the wide map, the largest tensor of the network, is gone.

    Args:
        x: (B, C, d, h, w).
        weight: (E, C, 3, 3, 3).
        size: (D, H, W), of any ratio to (d, h, w).

    Returns:
        (B, E, D, H, W) in channels_last_3d.
    """
    if tuple(x.shape[2:]) == size:
        return conv3d(x, weight, padding=1)
    batch, _, d, h, w = x.shape
    depth, height, width = size
    dim = weight.shape[0]
    kernels = weight.permute(4, 3, 2, 0, 1).flatten(0, 3)  # a row per (tap x, tap y, tap z, output channel)
    taps = F.linear(x.permute(0, 2, 3, 4, 1), kernels)
    taps = _enlarge_taps(w, width, taps) @ taps.reshape(batch * d * h, w * 3, 9 * dim)
    taps = taps.view(batch, d, h, width, 3, 3 * dim).transpose(3, 4).reshape(batch * d, h * 3, width * 3 * dim)
    taps = _enlarge_taps(h, height, taps) @ taps
    taps = taps.view(batch, d, height, width, 3, dim).permute(0, 1, 4, 2, 3, 5)
    taps = taps.reshape(batch, d * 3, height * width * dim)
    taps = _enlarge_taps(d, depth, taps) @ taps
    return taps.view(batch, depth, height, width, dim).permute(0, 4, 1, 2, 3)


def _enlarge_taps(n: int, size: int, like: Tensor) -> Tensor:
    """(size, 3n): linear interpolation of n samples to `size`, then a sum over three taps, zeros beyond both ends.

    Column 3i + t is what sample i gives to tap t. Half-voxel centres, as ``F.interpolate(align_corners=False)``.
    """
    position = ((torch.arange(size, dtype=torch.float64) + 0.5) * n / size - 0.5).clamp(0, n - 1)
    low = position.floor().long()
    share, rows = position - low, torch.arange(size)
    enlarge = torch.zeros(size, n, dtype=torch.float64)
    enlarge[rows, low] += 1 - share
    enlarge[rows, (low + 1).clamp(max=n - 1)] += share
    shifted = F.pad(enlarge, (0, 0, 1, 1)).unfold(0, size, 1)  # (tap, sample, size)
    return shifted.permute(2, 1, 0).flatten(1).to(like)
