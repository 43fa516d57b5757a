"""The spatial adapter: what turns SAM's 2D blocks into 3D ones with few weights of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from autosam3d.models.conv import Conv3d

if TYPE_CHECKING:
    from jaxtyping import Float


class SpatialAdapter(nn.Module):
    """Adapter(X) = X + Up(Act(DepthWise3D(Act(Down(X))))).

    `up` starts at zero, so that the network starts as SAM. No activation follows `up`: behind a ReLU a zero start
    would have a zero gradient for ever.

    *Source*: paper section 3.2 (adapter with a depth-wise 3D convolution after the down-projection).
    """

    def __init__(self, dim: int, adapter_dim: int, act: str = "relu") -> None:
        super().__init__()
        self.down = nn.Linear(dim, adapter_dim)
        self.dw = Conv3d(adapter_dim, adapter_dim, 3, padding=1, groups=adapter_dim)
        self.up = nn.Linear(adapter_dim, dim)
        self.act = F.gelu if act == "gelu" else F.relu
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Float[Tensor, "B d h w C"]) -> Float[Tensor, "B d h w C"]:
        narrow = self.act(self.down(tokens))
        narrow = self.dw(narrow.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
        return tokens + self.up(self.act(narrow))
