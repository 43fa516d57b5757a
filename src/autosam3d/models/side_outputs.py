"""Deep supervision: outputs of coarser levels, which exist during training and in no finished model.

In training mode a network with side outputs returns a list of logits, finest first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

_PREFIX = "side_outputs."


class DeeplySupervised(Protocol):
    """A network of `spec.DEEPLY_SUPERVISED`."""

    side_outputs: nn.ModuleList
    """Empty until `add_side_outputs`; each maps a coarser level's features to logits."""

    def add_side_outputs(self) -> None:
        """Make them, with random weights. Called once, right after the network was built."""
        ...


def without_side_outputs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict that a finished model has."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_PREFIX)}
