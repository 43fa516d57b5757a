"""From a network to one ExecuTorch program: convolutions in 2D, for XNNPACK on CPUs of phones."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from autosam3d.errors import MissingExtraError
from autosam3d.models.conv2d_form import with_conv2d
from autosam3d.onnx_file import labels_note
from autosam3d.onnx_graph import Size
from autosam3d.quiet import mute, quiet


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
        program = torch.export.export(form, (torch.zeros(1, 1, *patch_size),))
        # Kernels and matrices are cut and turned before use: done here, so that XNNPACK finds them as constants. The
        # bias of each pair of tokens is not laid out: it is ten times its table.
        program = folding.constant_prop_pass(program, {torch.ops.aten.embedding.default})
        lowered = exir.to_edge_transform_and_lower(
            program, partitioner=[xnnpack.XnnpackPartitioner()], constant_methods={"labels": labels_note(labels)},
        )
        return bytes(lowered.to_executorch().buffer)
