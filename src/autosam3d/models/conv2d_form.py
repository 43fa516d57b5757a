"""A network whose 3D convolutions are sums of 2D ones, for runtimes on phones, which have only these."""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import Tensor, nn


def with_conv2d(network: nn.Module) -> nn.Module:
    """A copy with the same weights, names and results; every ``nn.Conv3d`` in it runs as ``F.conv2d``.

    For exporting: with PyTorch itself it is slower.

    Raises:
        ValueError: a convolution has groups, dilation, or a kernel, stride and padding that are not supported together.
    """
    network = copy.deepcopy(network)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv3d):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, _SlicewiseConv(name, module))
    return network


class _SlicewiseConv(nn.Module):
    """A 3D convolution over a stack of slices, the depth folded into the batch: a 2D convolution per tap in depth.

    With stride 2 slices are taken two at a time, side by side as channels, so that no tensor has more than five axes
    and no slicing has steps.
    """

    def __init__(self, name: str, conv: nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        (self.taps, *_), (self.step, *step) = conv.kernel_size, conv.stride
        self.border, *border = conv.padding if isinstance(conv.padding, tuple) else (-1, -1, -1)
        self.step_2d, self.border_2d = (step[0], step[1]), (int(border[0]), int(border[1]))
        known = (1, 1, 0), (3, 1, 1), (3, 2, 1), (2, 2, 0)  # taps, step and border in depth
        if (self.taps, self.step, self.border) not in known or conv.groups != 1 or conv.dilation != (1, 1, 1):
            raise ValueError(f"{name}: expected a convolution with one of {known} in depth, got {conv}")

    def forward(self, x: Tensor) -> Tensor:
        batch, dim, depth, height, width = x.shape
        x = x.transpose(1, 2)  # B D C H W
        if self.border:
            x = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 1))
        kernels = [self.weight[:, :, tap] for tap in range(self.taps)]
        depth = depth // self.step
        if self.step == 1:
            taps = [self._conv(x[:, tap : tap + depth], kernel) for tap, kernel in enumerate(kernels)]
            y = sum(taps[1:], taps[0])
        else:
            x = x.reshape(batch, -1, 2 * dim, height, width)
            y = self._conv(x[:, :depth, :dim], kernels[0]) + self._conv(x[:, :depth, dim:], kernels[1])
            if self.taps == 3:
                y = y + self._conv(x[:, 1:, :dim], kernels[2])
        if self.bias is not None:
            y = y + self.bias[:, None, None]
        return y.unflatten(0, (batch, depth)).transpose(1, 2)

    def _conv(self, x: Tensor, kernel: Tensor) -> Tensor:
        """(B, D, C, H, W) to (B*D, E, h, w)."""
        return F.conv2d(x.flatten(0, 1), kernel, None, self.step_2d, self.border_2d)
