"""From a network to one ONNX file: static, self-contained, weights stored as float16 and computed with as float32."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from autosam3d.axes import Size
from autosam3d.errors import MissingExtraError
from autosam3d.inference.quiet import quiet

if TYPE_CHECKING:
    import onnx


OPSET = 18
HALF_FROM = 1024
"""Tensors of fewer numbers keep float32: biases and norms are a thousandth of the file."""
_TALKERS = ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir",
            "onnx_ir._convenience")
_IR_VERSION = 10
"""Of the file format; older runtimes refuse a newer one, and opset 18 needs no more."""


def with_half_weights(network: nn.Module) -> nn.Module:
    """A copy whose larger weights are rounded to the nearest float16, in float32: what an export computes with.

    A tensor that float16 cannot hold (beyond 65504) stays as it is, in the file too.
    """
    rounded = copy.deepcopy(network).float().eval()
    with torch.no_grad():
        for tensor in (*rounded.parameters(), *rounded.buffers()):
            if tensor.is_floating_point() and tensor.numel() >= HALF_FROM:
                half = tensor.half()
                if bool(torch.isfinite(half).all()):
                    tensor.copy_(half)
    return rounded


def onnx_model(network: nn.Module, patch_size: Size) -> onnx.ModelProto:
    """The graph of a network on one patch: ``ct`` float32 [1, 1, D, H, W] to ``logits`` and ``probs`` [1, K, D, H, W].

    Constants whose values are float16 values are stored as float16 followed by a cast: of `with_half_weights` all the
    large ones, and without any loss. Equal constants are stored once.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise MissingExtraError("MISSING_EXTRA", "export", "expected the packages onnx and onnxscript, got none",
                                'pip install "autosam3d[export]"') from None
    ct = torch.zeros(1, 1, *patch_size)
    with quiet(*_TALKERS), torch.no_grad():
        program = torch.onnx.export(
            _WithProbs(network).eval(), (ct,), dynamo=True, opset_version=OPSET, input_names=["ct"],
            output_names=["logits", "probs"], verbose=False, external_data=False, optimize=False,
        )
        assert program is not None
        _simplify(program.model)
    model = program.model_proto
    _leaky_as_maximum(model.graph)
    _shrink(model)
    return model


def _simplify(model: Any) -> None:
    """Fold constants and drop what nobody reads: the exporter's own optimisation but for most of its patterns.

    Those are looked for again and again from the start of the graph, minutes for two thousand nodes, and the runtimes
    know them. One is needed: to a convolution without bias the exporter gives zeros of a wrong shape.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules.common import remove_optional_bias_from_conv_rule

    optimizer.fold_constants(model)
    rewriter.rewrite(model, [remove_optional_bias_from_conv_rule])
    # Constants are kept by name from here on, so names come first.
    for tidy in (common.RemoveUnusedNodesPass(), common.NameFixPass(),
                 common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0), common.OutputFixPass()):
        tidy(model)


class _WithProbs(nn.Module):
    """A network with its softmax as second output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ct: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network(ct)
        return logits, torch.softmax(logits, 1)


def _leaky_as_maximum(graph: onnx.GraphProto) -> None:
    """Leaky ReLU as the larger of x and slope times x: the same number.

    ONNX Runtime's own goes number by number in WebAssembly, where it takes ten times as long.
    """
    import onnx

    nodes = []
    for node in graph.node:
        if node.op_type != "LeakyRelu":
            nodes.append(node)
            continue
        ((x,), (y,), (slope,)) = node.input, node.output, [a.f for a in node.attribute if a.name == "alpha"]
        if not 0 <= slope <= 1:
            raise ValueError(f"{node.name}: expected a slope of 0 to 1, got {slope}")
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(slope, np.float32), f"{y}.slope"))
        nodes += [onnx.helper.make_node("Mul", [x, f"{y}.slope"], [f"{y}.low"], f"{node.name}.low"),
                  onnx.helper.make_node("Max", [x, f"{y}.low"], [y], node.name)]
    del graph.node[:]
    graph.node.extend(nodes)


def _shrink(model: onnx.ModelProto) -> None:
    """Store constants once, as float16 where that is exact, and leave out what only tells where a node came from."""
    import onnx
    from onnx import numpy_helper

    graph = model.graph
    first: dict[tuple[Any, ...], str] = {}
    same: dict[str, str] = {}
    kept, casts = [], []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        key = (values.dtype.str, values.shape, values.tobytes())
        if key in first:
            same[tensor.name] = first[key]
            continue
        first[key] = tensor.name
        half = values.astype(np.float16) if values.dtype == np.float32 and values.size >= HALF_FROM else None
        if half is not None and np.array_equal(half.astype(np.float32), values):
            name = f"{tensor.name}.half"
            kept.append(numpy_helper.from_array(half, name))
            casts.append(onnx.helper.make_node("Cast", [name], [tensor.name], f"{tensor.name}.cast",
                                               to=onnx.TensorProto.FLOAT))
        else:
            kept.append(numpy_helper.from_array(values, tensor.name))
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = same.get(name, name)
        del node.metadata_props[:]
        node.doc_string = ""
    nodes = [*casts, *graph.node]
    del graph.initializer[:], graph.node[:], graph.value_info[:], graph.metadata_props[:], model.metadata_props[:]
    graph.initializer.extend(cast(Any, kept))
    graph.node.extend(nodes)
    model.ir_version = _IR_VERSION
    model.producer_name, model.producer_version, model.doc_string = "autosam3d", "", ""
    onnx.checker.check_model(model, full_check=True)
