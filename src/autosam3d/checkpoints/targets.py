"""What each target can run, asked when a student is chosen and not after it was trained."""

from __future__ import annotations

from collections.abc import Iterable

from autosam3d.errors import UsageError
from autosam3d.models.spec import NetworkSpec

# The operators, in words of the network and not of one format, that decide whether a target takes a network; those
# that every target has (sums, products, matrices, softmax, normalisation) are left out.
_NEEDS: dict[str, frozenset[str]] = {
    # 3x3x3 convolutions that are whole (no groups), depth to space in reshapes of rank 5 at most, attention without
    # masks. `models/students/swin_unetr.py` writes its transposed convolutions so.
    "swin_unetr": frozenset({"conv3d", "transpose5", "strided_slice"}),
    "res_unet": frozenset({"conv3d", "transpose5"}),
    # Einsum and 3D linear resizing come from SAM's attention and the decoder; the adapters' depth convolutions are
    # grouped.
    "autosam": frozenset({"conv3d", "transpose5", "strided_slice", "einsum", "resize3d", "avg_pool3d",
                          "grouped_conv3d", "rank8"}),
    "nnunet": frozenset({"conv3d", "conv_transpose3d"}),
    "unetr": frozenset({"conv3d", "conv_transpose3d", "transpose5", "rank8"}),
    "nnformer": frozenset({"conv3d", "conv_transpose3d", "transpose5", "strided_slice", "rank8"}),
}
_ALL = frozenset({"conv3d", "transpose5", "strided_slice", "einsum", "resize3d", "avg_pool3d", "grouped_conv3d",
                  "conv_transpose3d", "rank8"})
TARGETS: dict[str, frozenset[str]] = {
    "onnxruntime": _ALL,
    "openvino": _ALL,
    "onnxruntime-web-wasm": _ALL,
    "onnxruntime-web-webgpu": _ALL - {"conv_transpose3d", "grouped_conv3d"},
    "litert": frozenset({"conv3d", "transpose5", "strided_slice"}),
    "executorch": frozenset({"conv3d", "transpose5", "strided_slice"}),
    "coreml": frozenset({"conv3d", "transpose5", "strided_slice", "avg_pool3d", "conv_transpose3d"}),
}
"""Target to the operators that it runs.

*Source*: measured with onnxruntime-web 1.30 (WebGPU: "Only Conv2d or Conv1d are supported" of ConvTranspose,
"Conv3D does not support grouped convolution"), LiteRT 0.10 and ExecuTorch 1.5.1 (3D convolutions as three 2D ones;
ConvTranspose3d and grouped ones fail), coremltools 9.0 (rank 5 at most; converted, never run).
"""


MOBILE = {"litert": "model.tflite", "executorch": "model.pte", "coreml": "coreml.mlpackage"}
"""Target that is written beside ONNX and OpenVINO where it is asked for, to its file or folder."""


def demand_mobile(spec: NetworkSpec, targets: Iterable[str]) -> None:
    """Refuse targets that are none to ask for, or that do not run the network.

    Raises:
        UsageError: TARGET.
    """
    for target in targets:
        if target not in MOBILE:
            raise UsageError("TARGET", target, f"expected {', '.join(MOBILE)}",
                             "name one of these; ONNX and OpenVINO are always written")
    demand_exportable(spec, targets)


def demand_exportable(spec: NetworkSpec, targets: Iterable[str] = ("onnxruntime", "openvino")) -> None:
    """Refuse a network that one of the targets cannot run.

    Raises:
        UsageError: TARGET, unknown, or one that lacks operators of the network; with their names.
    """
    for target in targets:
        if target not in TARGETS:
            raise UsageError("TARGET", target, f"expected one of {', '.join(TARGETS)}", "name one of these")
        missing = sorted(_NEEDS[spec.network] - TARGETS[target])
        if missing:
            fit = [name for name, needs in _NEEDS.items() if needs <= TARGETS[target]]
            raise UsageError("TARGET", target, f"it does not run {', '.join(missing)}, which {spec.network} needs",
                             f"take {' or '.join(fit)} for this target")
