"""One interface over the runtimes: patches in, probabilities out.

`torch_runtime` runs checkpoints; `onnx_runtime`, `openvino_runtime`, `litert_runtime` and `executorch_runtime` run
exports. Of these only PyTorch and ExecuTorch import torch, and only when a predictor is built, so that the others run
where it is not installed.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from autosam3d.axes import Size


class Predictor(Protocol):
    """A model that is ready to run."""

    @property
    def patch_size(self) -> Size:
        """(z, y, x), what `predict` expects."""
        ...

    @property
    def num_outputs(self) -> int:
        """K: organs and background."""
        ...

    def predict(self, patches: np.ndarray) -> np.ndarray:
        """Probabilities float32 or float16 [B, K, D, H, W] of float32 patches [B, 1, D, H, W]."""
        ...

    def activation_bytes(self, batch_size: int) -> int:
        """Host memory that `predict` takes beside its input and output; 0 where it is unknown."""
        ...


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities [B, K, ...] of float32 logits, in their place."""
    logits -= logits.max(1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(1, keepdims=True)
    return logits
