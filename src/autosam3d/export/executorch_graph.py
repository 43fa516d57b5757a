"""From a network to one ExecuTorch program: convolutions in 2D, for XNNPACK on CPUs of phones."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autosam3d.axes import Size
from autosam3d.errors import MissingExtraError
from autosam3d.inference.onnx_file import labels_note
from autosam3d.inference.quiet import mute, quiet
from autosam3d.models.conv2d_form import with_conv2d


def executorch_program(network: nn.Module, patch_size: Size, labels: Sequence[str]) -> bytes:
    """The file of a network on one patch: ``forward`` takes float32 [1, 1, D, H, W] and gives logits [1, K, D, H, W].

    XNNPACK has no 3D convolution: the network runs in the form of `with_conv2d`. Its weights lie in the file as
    float32: XNNPACK takes float16 ones only where it computes in float16, too.

    Args:
        network: as it is to be run.
        patch_size: (z, y, x).
        labels: of the K channels, background first; the method ``labels`` of the program names them.

    Raises:
        MissingExtraError: executorch is not installed.
    """
    with mute(), quiet("root", "torch.utils._pytree"), torch.no_grad():
        try:
            exir: Any = importlib.import_module("executorch.exir")
            folding: Any = importlib.import_module("executorch.exir.passes.constant_prop_pass")
            xnnpack: Any = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
        except ImportError as error:
            raise MissingExtraError("MISSING_EXTRA", "executorch", f"expected the package executorch, got none "
                                    f"({error})", 'pip install "autosam3d[mobile]"') from None
        form = with_conv2d(network).eval()
        with _NormInTwoPasses():
            program = torch.export.export(form, (torch.zeros(1, 1, *patch_size),))
        # Kernels and matrices are cut and turned before use: done here, so that XNNPACK finds them as constants. The
        # bias of each pair of tokens is not laid out: it is ten times its table.
        program = folding.constant_prop_pass(program, {torch.ops.aten.embedding.default})
        lowered = exir.to_edge_transform_and_lower(
            program, partitioner=[xnnpack.XnnpackPartitioner()], constant_methods={"labels": labels_note(labels)},
        )
        return bytes(lowered.to_executorch().buffer)


class _NormInTwoPasses(TorchFunctionMode):
    """While it is entered, ``F.instance_norm`` is made of operators that XNNPACK has: the mean, then the variance.

    With the kernel that ExecuTorch 1.5.1 has for it the logits of a SwinUNETR were off by 1.5e-3 of their scale, more
    than the certificate allows.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.instance_norm:
            return _instance_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _instance_norm(
    x: Tensor, running_mean: None = None, running_var: None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:
    rows = x.flatten(2, 3)  # B C (d h) w
    rows = rows - rows.mean((2, 3), keepdim=True)
    rows = rows * torch.rsqrt((rows * rows).mean((2, 3), keepdim=True) + eps)
    if weight is not None and bias is not None:
        rows = rows * weight[:, None, None] + bias[:, None, None]
    return rows.view(x.shape)
