"""Work on one voxel at a time: mixing its channels, and cutting it into eight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float


class Mixing(nn.Conv3d):
    """A 1x1x1 convolution as the product that it is; with one thread PyTorch's own kernel leaves channels_last."""

    def __init__(self, dim_in: int, dim_out: int, bias: bool = True) -> None:
        super().__init__(dim_in, dim_out, 1, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return super().forward(input)
        return F.linear(input.permute(0, 2, 3, 4, 1), self.weight.flatten(1), self.bias).permute(0, 4, 1, 2, 3)


class Doubling(nn.Module):
    """``nn.ConvTranspose3d`` with kernel 2, stride 2 and no bias: the same parameter, start values and result."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim_in, dim_out, 2, 2, 2))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Float[Tensor, "B C d h w"]) -> Float[Tensor, "B E 2*d 2*h 2*w"]:
        return double(x, self.weight)


def double(x: Tensor, weight: Tensor) -> Tensor:
    """``F.conv_transpose3d(x, weight, stride=2)`` for a kernel of 2, where no two taps meet.

    So it is a product over the channels, whose 8 results per channel are then laid into the two voxels per axis.
    WebGPU and phones have no transposed convolution in 3D.

    Args:
        x: (B, C, d, h, w).
        weight: (C, E, 2, 2, 2).

    Returns:
        (B, E, 2d, 2h, 2w) in channels_last_3d.
    """
    batch, dim_in, d, h, w = x.shape
    dim = weight.shape[1]
    taps = weight.permute(2, 3, 4, 1, 0).reshape(8 * dim, dim_in)  # (z y x E) C
    x = F.linear(x.permute(0, 2, 3, 4, 1), taps)
    x = x.reshape(batch * d * h, w, 4, 2 * dim).transpose(1, 2)  # (B d h) (z y) w (x E)
    x = x.reshape(batch * d, h, 2, 2 * w * 2 * dim).transpose(1, 2)  # (B d) z h (y w x E)
    return x.reshape(batch, 2 * d, 2 * h, 2 * w, dim).permute(0, 4, 1, 2, 3)
