"""The edge tier: a strided residual U-Net of few operations, all of which every runtime has.

    ct ── stem ──────────────────────────────────────────────── + ── plane ── out ── logits    D      16 channels
          └ down, block ────────────────────────────────── + fuse, up                          D/2    16
              └ down, block ──────────────────────────── + fuse, up                            D/4    32
                  └ down, block ────────────────────── + fuse, up                              D/8    64
                      └ down, block ──────────────── + fuse, up                                D/16  128
                          └ down, bottleneck ─────── up                                        D/32  256

At full resolution a 3x3x3 convolution between 16 channels would cost two thirds of what the whole network does. So
there is one from the CT's one channel, whose result is the skip that keeps the borders of small organs, and the
last one is a plane (3x3) followed by a column (3). Levels meet by adding, not side by side, which halves the
convolution that follows. No grouped and no transposed convolution, no resizing, no tensor of more than five axes.

*Source*: our own; in size like the strided U-Net that came out as the cheapest on CPUs and in browsers of those that
we measured (MONAI's ``UNet`` with channels 16 to 256: 2.46 M parameters, 9.0 GMAC at 96^3 and 14 outputs).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autosam3d.axes import Size
from autosam3d.models.conv import Conv3d
from autosam3d.models.instance_norm import norm_leaky
from autosam3d.models.pointwise import Doubling, Mixing
from autosam3d.models.spec import ResUnetSpec

if TYPE_CHECKING:
    from jaxtyping import Float

_SLOPE = 0.01


class ResUnet(nn.Module):
    """The whole network, for any batch size and any D, H, W that are multiples of 32."""

    def __init__(self, spec: ResUnetSpec) -> None:
        super().__init__()
        self.spec = spec
        c1, c2, c3, c4, c5 = spec.channels  # at 1/2, 1/4, 1/8, 1/16 and 1/32 of the CT's resolution
        self.stem = ConvNorm(1, c1)
        self.down1 = ConvNorm(c1, c1, stride=2)
        self.block1 = Residual(ConvNorm(c1, c1), ConvNorm(c1, c1, slope=1))
        self.down2 = ConvNorm(c1, c2, stride=2)
        self.block2 = Residual(ConvNorm(c2, c2), ConvNorm(c2, c2, slope=1))
        self.down3 = ConvNorm(c2, c3, stride=2)
        self.block3 = Residual(ConvNorm(c3, c3, slope=1))
        self.down4 = ConvNorm(c3, c4, stride=2)
        self.block4 = Residual(ConvNorm(c4, c4, slope=1))
        self.down5 = ConvNorm(c4, c5, stride=2)
        self.bottleneck = Residual(ConvNorm(c5, c3, 1), ConvNorm(c3, c3), ConvNorm(c3, c5, 1, slope=1))
        self.up5 = Doubling(c5, c4)
        self.fuse4 = Residual(ConvNorm(c4, c4, slope=1))
        self.up4 = Doubling(c4, c3)
        self.fuse3 = Residual(ConvNorm(c3, c3, slope=1))
        self.up3 = Doubling(c3, c2)
        self.fuse2 = Residual(ConvNorm(c2, c2, slope=1))
        self.up2 = Doubling(c2, c1)
        self.fuse1 = Residual(ConvNorm(c1, c1, slope=1))
        self.up1 = Doubling(c1, c1)
        self.plane = ConvNorm(c1, c1, (1, 3, 3))
        self.out = nn.Conv3d(c1, spec.num_outputs, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, ct: Float[Tensor, "B 1 D H W"]) -> Float[Tensor, "B K D H W"]:
        """Logits of background and organs at the CT's resolution.

        Raises:
            ValueError: the shape is not (B, 1, D, H, W) with multiples of 32.
        """
        if ct.dim() != 5 or ct.shape[1] != 1 or any(n < 32 or n % 32 for n in ct.shape[2:]):
            raise ValueError(f"expected (B, 1, D, H, W) with D, H, W multiples of 32, got {tuple(ct.shape)}")
        if not torch.compiler.is_exporting():  # ExecuTorch does not support this layout
            ct = ct.to(memory_format=torch.channels_last_3d)
        full = self.stem(ct)
        half = self.block1(self.down1(full))
        quarter = self.block2(self.down2(half))
        eighth = self.block3(self.down3(quarter))
        sixteenth = self.block4(self.down4(eighth))
        x = self.bottleneck(self.down5(sixteenth))
        x = self.fuse4(sixteenth + self.up5(x))
        x = self.fuse3(eighth + self.up4(x))
        x = self.fuse2(quarter + self.up3(x))
        x = self.fuse1(half + self.up2(x))
        x = full + self.up1(x)
        return self.out(x + self.plane(x))


class ConvNorm(nn.Module):
    """Convolution, instance norm with weights, leaky ReLU; a slope of 1 leaves the ReLU out.

    Args:
        kernel: an odd size, or one per axis; padded, so that stride 1 keeps the grid and stride 2 halves it.
    """

    def __init__(
        self, dim_in: int, dim_out: int, kernel: int | Size = 3, stride: int = 1, slope: float = _SLOPE
    ) -> None:
        super().__init__()
        if kernel == 1:
            self.conv = Mixing(dim_in, dim_out, bias=False)
        elif kernel == 3 and stride == 1:
            self.conv = Conv3d(dim_in, dim_out, 3, padding=1, bias=False)
        else:
            size = (kernel, kernel, kernel) if isinstance(kernel, int) else kernel
            padding = (size[0] // 2, size[1] // 2, size[2] // 2)
            self.conv = nn.Conv3d(dim_in, dim_out, size, stride, padding, bias=False)
        self.norm = nn.InstanceNorm3d(dim_out, affine=True)
        self.slope = slope

    def forward(self, x: Float[Tensor, "B C d h w"]) -> Float[Tensor, "B E e i x"]:
        return norm_leaky(self.conv(x), self.slope, self.norm.weight, self.norm.bias)


class Residual(nn.Module):
    """The input plus the output of the layers, then leaky ReLU; the last layer has no activation of its own."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "B C d h w"]) -> Float[Tensor, "B C d h w"]:
        return F.leaky_relu_(x + self.layers(x), _SLOPE)
