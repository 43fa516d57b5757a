"""The edge tier: a strided residual U-Net of few operations, all of which every runtime has.

    ct ── stem ──────────────────────────────────────── + ── head ── logits      D     16 channels
          └ down ───────────────────────────────── + ── up                       D/2   32
              └ down ────────────────────────── + ── up                          D/4   64
                  └ down, residual block ─── + ── up                             D/8   128
                      └ down, bottleneck ─── up                                  D/16  256

At full resolution a 3x3x3 convolution between 16 channels costs as much as all of the levels below it. So there is
one from the CT's one channel, whose result is the skip that keeps the borders of small organs, and at the end a plane
and a column (3x3 and 3) in place of a cube. Levels meet by adding, not side by side, which halves the convolution
that follows.

*Source*: our own; in size like the strided U-Net of five levels that came out as the cheapest on CPUs and in
browsers of those that were measured (MONAI's ``UNet``, channels 16 to 256: 2.46 M parameters, 9.0 GMAC at 96^3).
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autosam3d.models.conv import Conv3d
from autosam3d.models.instance_norm import norm_leaky
from autosam3d.models.spec import ResUnetSpec
from autosam3d.models.swin_unetr import Mixing, depth_to_space

if TYPE_CHECKING:
    from jaxtyping import Float

_SLOPE = 0.01


class ResUnet(nn.Module):
    """The whole network, for any batch size and any D, H, W that are multiples of 16."""

    def __init__(self, spec: ResUnetSpec) -> None:
        super().__init__()
        self.spec = spec
        channels = spec.channels
        self.stem = ConvNorm(1, channels[0], 3)
        self.downs = nn.ModuleList(Down(fine, coarse) for fine, coarse in pairwise(channels))
        self.eighth = Residual(ConvNorm(channels[3], channels[3], 3, slope=1))
        self.deepest = Residual(
            ConvNorm(channels[4], channels[3], 1),
            ConvNorm(channels[3], channels[3], 3),
            ConvNorm(channels[3], channels[4], 1, slope=1),
        )
        self.ups = nn.ModuleList(Up(coarse, fine) for fine, coarse in reversed(list(pairwise(channels))))
        self.fuses = nn.ModuleList(Fuse(coarse, fine) for fine, coarse in reversed(list(pairwise(channels[:4]))))
        self.plane = ConvNorm(channels[0], channels[0], (1, 3, 3))
        self.out = Conv3d(channels[0], spec.num_outputs, (3, 1, 1))

    def forward(self, ct: Float[Tensor, "B 1 D H W"]) -> Float[Tensor, "B K D H W"]:
        raise NotImplementedError
