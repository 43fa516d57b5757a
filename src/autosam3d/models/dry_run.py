"""Detects a dry run: a pass on tensors without data, which only measures how much memory a pass takes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_dry(x: Tensor) -> bool:
    """Whether `x` has no data and is not being traced; then one of a loop's equal steps suffices."""
    return isinstance(x, FakeTensor) and not torch.compiler.is_compiling()
