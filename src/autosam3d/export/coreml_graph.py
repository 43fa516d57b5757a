"""From a network to a CoreML package, for Apple's devices. Written here, run nowhere but there."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autosam3d.axes import Size
from autosam3d.errors import MissingExtraError
from autosam3d.inference.onnx_file import labels_note
from autosam3d.inference.quiet import mute, quiet


def write_coreml(network: nn.Module, patch_size: Size, labels: Sequence[str], path: Path) -> None:
    """Write a ``.mlpackage``: ``ct`` float32 [1, 1, D, H, W] to ``logits`` [1, K, D, H, W].

    For iOS 16, macOS 13 and later. It computes in float32. CoreML's default, float16, is what the Neural Engine needs
    and half the size; but the mask of the shifted windows adds a hundred to what softmax tells apart, and nobody has
    seen its results.

    Args:
        network: as it is to be run.
        patch_size: (z, y, x).
        labels: of the K channels, background first; the package names them.
        path: of the package, a folder that does not exist.

    Raises:
        MissingExtraError: coremltools is not installed.
    """
    with mute(), quiet("root", "coremltools"), torch.no_grad():
        try:
            tools: Any = importlib.import_module("coremltools")
        except ImportError as error:
            raise MissingExtraError("MISSING_EXTRA", "coreml", f"expected the package coremltools, got none ({error})",
                                    'pip install "autosam3d[mobile]"') from None
        program = torch.export.export(network.eval(), (torch.zeros(1, 1, *patch_size),)).run_decompositions({})
        _without_aliases(program)
        package = tools.convert(
            program, convert_to="mlprogram", minimum_deployment_target=tools.target.iOS16,
            compute_precision=tools.precision.FLOAT32, inputs=[tools.TensorType(name="ct", shape=(1, 1, *patch_size))],
            outputs=[tools.TensorType(name="logits")],
        )
        package.user_defined_metadata["labels"] = labels_note(labels)
        package.save(str(path))
    (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)  # for another project's debugger


def _without_aliases(program: torch.export.ExportedProgram) -> None:
    """Take out operators that only rename a tensor: coremltools 9.0 does not know them."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    program.graph_module.recompile()
