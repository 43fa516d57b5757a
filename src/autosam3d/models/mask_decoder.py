"""The mask decoder with its multi-layer aggregation: features of several depths, the prompt and the CT to logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autosam3d.models.conv import Conv3d, conv3d
from autosam3d.models.prompt_generator import ConvNormRelu, instance_norm, resize

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
        self, dim: int, head_dim: int, num_outputs: int, num_inputs: int, token_size: tuple[int, int, int],
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
        # Enlarging works channel by channel: joining the heads first saves a copy of the large map.
        joined = resize(torch.cat(heads, 1), image.shape[2:])
        logits = self.out(self._fuse(joined, image))
        logits = resize(logits, ct.shape[2:])
        if self.refine is not None:
            logits = logits + self.refine(torch.cat([logits, ct.to(logits.dtype)], 1))
        return logits

    def _fuse(self, joined: Tensor, image: Tensor) -> Tensor:
        """The fusion convolution over (joined, image) as a sum over the two: no copy of both into one map."""
        split = joined.shape[1]
        fused = conv3d(joined, self.fuse.weight[:, :split], padding=1)
        fused = fused + conv3d(image, self.fuse.weight[:, split:], padding=1)
        return F.relu(instance_norm(fused))
