"""A 3D convolution whose gradients are right in bfloat16 on CPUs, too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: int = 0, groups: int = 1) -> Tensor:
    """``F.conv3d`` with stride 1 that works around three weaknesses of PyTorch's CPU kernels.

    * Over a depth of exactly 2 the weight gradient of a padded kernel of 3 is computed from uninitialised memory:
      relative errors from 1 to 1e36. Measured with PyTorch 2.13 and its oneDNN 3.12 on a CPU with AVX512-BF16, for
      all channel counts, with one thread and with two; every other depth from 1 to 16 is right.
      Such a convolution is computed in float32.
    * The backward pass of a depth-wise convolution takes three times as long in bfloat16 as in float32.
    * A single small float32 sample is not given to oneDNN but to a kernel that takes three times as long and leaves
      channels_last. Two samples are, so one is cut into two halves that overlap by the kernel's reach.
    """
    low = x.dtype if x.dtype in (torch.bfloat16, torch.float16) else None
    if low is None and torch.is_autocast_enabled("cpu"):
        low = torch.get_autocast_dtype("cpu")
    if x.device.type == "cpu" and low is not None and (x.shape[2] == 2 or groups > 1):
        with torch.autocast("cpu", enabled=False):
            bias = None if bias is None else bias.float()
            return F.conv3d(x.float(), weight.float(), bias, padding=padding, groups=groups).to(low)
    if low is None and _is_slow(x, weight, padding, groups):
        half = x.shape[2] // 2
        padded = F.pad(x, (0, 0, 0, 0, 1, 1))
        halves = torch.cat([padded[:, :, : half + 2], padded[:, :, half:]])
        return torch.cat(F.conv3d(halves, weight, bias, padding=(0, 1, 1)).split(1), 2)
    return F.conv3d(x, weight, bias, padding=padding, groups=groups)


def _is_slow(x: Tensor, weight: Tensor, padding: int, groups: int) -> bool:
    """Whether PyTorch passes oneDNN by, and halves help. *Source* of 20480: `use_mkldnn` in ATen's Convolution.cpp."""
    return (
        x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[0] == 1 and groups == 1 and padding == 1
        and tuple(weight.shape[2:]) == (3, 3, 3) and x.shape[2] >= 8 and x.shape[2] % 2 == 0
        and x[0, :, :, :, 0].numel() <= 20480 and not torch.compiler.is_compiling()
    )


class Conv3d(nn.Conv3d):
    """``nn.Conv3d`` with stride 1 by way of `conv3d`; same parameters, names and start values."""

    def __init__(
        self, dim_in: int, dim_out: int, kernel: int, padding: int = 0, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__(dim_in, dim_out, kernel, padding=padding, groups=groups, bias=bias)
        self.border = padding

    def forward(self, input: Tensor) -> Tensor:
        return conv3d(input, self.weight, self.bias, self.border, self.groups)


class GuardedConv3d(nn.Conv3d):
    """``nn.Conv3d`` with any stride, in float32 where PyTorch's weight gradient is wrong in bfloat16; see `conv3d`.

    Measured for strides 1, (1, 2, 2) and 2: a stride of 2 in depth is right.
    """

    def forward(self, input: Tensor) -> Tensor:
        wrong = input.device.type == "cpu" and input.shape[2] == 2 and self.kernel_size[0] == 3 and self.stride[0] == 1
        if not wrong or not torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float()).to(torch.get_autocast_dtype("cpu"))


def guard_convolutions(network: nn.Module) -> None:
    """Make every plain ``nn.Conv3d`` of a network that was written elsewhere a `GuardedConv3d`."""
    for module in network.modules():
        if type(module) is nn.Conv3d:
            module.__class__ = GuardedConv3d
