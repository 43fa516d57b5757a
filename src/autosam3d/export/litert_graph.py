"""From a network to one TFLite file for LiteRT: convolutions in 2D, weights stored as float16 where that is exact."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from autosam3d.axes import Size
from autosam3d.errors import MissingExtraError
from autosam3d.export.onnx_graph import HALF_FROM
from autosam3d.inference.litert_runtime import IDENTIFIER, LABELS_KEY
from autosam3d.inference.onnx_file import labels_note
from autosam3d.inference.quiet import mute, quiet
from autosam3d.models.conv2d_form import with_conv2d

_ALIGNMENT = 16
"""Bytes, of each constant in the file. *Source*: the schema of TFLite, `force_align` of Buffer.data."""
_DEQUANTIZE_VERSION = 3
"""The first version of the operator that takes float16. *Source*: TFLite's table of operator versions."""


def litert_model(network: nn.Module, patch_size: Size, labels: Sequence[str]) -> bytes:
    """The file of a network on one patch: float32 [1, 1, D, H, W] to logits [1, K, D, H, W].

    XNNPACK, LiteRT's runtime on CPUs, has no 3D convolution: the network runs in the form of `with_conv2d`. Constants
    whose values are float16 values are stored so, each followed by an operator that widens it once, when the file is
    loaded: of `with_half_weights` all the large ones, and without any loss.

    Args:
        network: as it is to be run.
        patch_size: (z, y, x).
        labels: of the K channels, background first; the file names them.

    Raises:
        MissingExtraError: litert-torch is not installed.
    """
    with mute(), quiet("root", "torch.utils._pytree"), torch.no_grad():
        try:
            litert_torch = importlib.import_module("litert_torch")
        except ImportError as error:
            raise MissingExtraError("MISSING_EXTRA", "litert", f"expected the package litert-torch, got none ({error})",
                                    'pip install "autosam3d[mobile]"') from None
        form = with_conv2d(network).eval()
        content = litert_torch.convert(form, (torch.zeros(1, 1, *patch_size),)).model_content()
    return _shrunk(bytes(content), labels_note(labels))


def _shrunk(content: bytes, labels: str) -> bytes:
    """The same model with float16 constants where they lose nothing, and the names of its classes."""
    import flatbuffers

    schema: Any = importlib.import_module("ai_edge_litert.schema_py_generated")
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    (graph,) = model.subgraphs
    _halve(schema, model, graph)
    note = schema.MetadataT()
    note.name, note.buffer = LABELS_KEY, _new_buffer(schema, model, np.frombuffer(labels.encode(), np.uint8))
    model.metadata = [*(model.metadata or []), note]
    for buffer in model.buffers:
        buffer.__class__ = _aligned(schema)
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), IDENTIFIER)
    return bytes(builder.Output())


def _halve(schema: Any, model: Any, graph: Any) -> None:
    halves: dict[int, int] = {}  # buffer of float32 to its buffer of float16
    widening = []
    for index, tensor in enumerate(list(graph.tensors)):
        data = model.buffers[tensor.buffer].data
        if tensor.type != schema.TensorType.FLOAT32 or data is None or len(data) < 4 * HALF_FROM:
            continue
        if tensor.buffer not in halves:
            values = np.asarray(data, np.uint8).view(np.float32)
            with np.errstate(over="ignore"):
                half = values.astype(np.float16)
            if not np.array_equal(half.astype(np.float32), values):
                continue
            halves[tensor.buffer] = _new_buffer(schema, model, half.view(np.uint8))
        narrow = schema.TensorT()
        narrow.name, narrow.shape, narrow.hasRank = bytes(tensor.name) + b".half", tensor.shape, True
        narrow.type, narrow.buffer = schema.TensorType.FLOAT16, halves[tensor.buffer]
        graph.tensors.append(narrow)
        widen = schema.OperatorT()
        widen.inputs = np.array([len(graph.tensors) - 1], np.int32)
        widen.outputs = np.array([index], np.int32)
        widening.append(widen)
        tensor.buffer = 0  # the empty one: a result now
    for old in halves:
        model.buffers[old].data = None
    if not widening:
        return
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.DEQUANTIZE
    code.version = _DEQUANTIZE_VERSION
    model.operatorCodes.append(code)
    for widen in widening:
        widen.opcodeIndex = len(model.operatorCodes) - 1
    graph.operators = [*widening, *graph.operators]


def _new_buffer(schema: Any, model: Any, data: np.ndarray) -> int:
    buffer = schema.BufferT()
    buffer.data = data
    model.buffers.append(buffer)
    return len(model.buffers) - 1


def _aligned(schema: Any) -> type:
    """A buffer that lies where the schema wants it: the generated code aligns to single bytes."""

    class Aligned(schema.BufferT):
        def Pack(self, builder: Any) -> Any:
            if self.data is not None:
                builder.Prep(_ALIGNMENT, len(self.data))
            return super().Pack(builder)

    return Aligned
