"""A pass through a network on tensors without data, which asks only how much memory the pass takes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_dry(x: Tensor) -> bool:
    """Whether `x` has no data and nobody records what is done to it: of a loop's equal steps, one tells all."""
    return isinstance(x, FakeTensor) and not torch.compiler.is_compiling()
