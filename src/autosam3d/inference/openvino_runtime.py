"""OpenVINO: an exported graph on Intel's runtime, the fastest on x86. Neither torch nor onnx is needed."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autosam3d.axes import Size
from autosam3d.errors import CheckpointError, MissingExtraError, ResourceError
from autosam3d.inference.onnx_file import demand_labels


class OpenVinoPredictor:
    """An OpenVINO IR with the input ``ct`` [1, 1, D, H, W] and the outputs ``logits`` and ``probs`` [1, K, D, H, W].

    It computes in float32: on CPUs the hints bf16 and f16 were 1.2 and 1.6 times as slow, and less exact
    (OpenVINO 2026.4, two cores with AVX512-BF16).

    Args:
        xml_path: of the IR; the .bin lies beside it.
        patch_size: (z, y, x).
        labels: of the K channels, background first; the file must name the same.
        threads: of the inference.
        activation_bytes: what one patch takes, where it is known.
        output: "probs", or "logits" for comparisons; the other one is not computed.
        name: of the backend. What is INT8 in the IR is computed in it.

    Raises:
        MissingExtraError: openvino is not installed.
        CheckpointError: CORRUPT or MISMATCH.
    """

    def __init__(self, xml_path: Path, patch_size: Size, labels: Sequence[str], threads: int,
                 activation_bytes: int = 0, output: str = "probs", name: str = "openvino") -> None:
        self.name, self.patch_size, self.num_outputs = name, patch_size, len(labels)
        self._activation_bytes, self._has_run, self._where = activation_bytes, False, xml_path
        core = openvino_core()
        self._ov = _import()
        try:
            model = core.read_model(xml_path, xml_path.with_suffix(".bin"))
            path = ["autosam3d", "labels"]
            note = str(model.get_rt_info(path).astype(str)) if model.has_rt_info(path) else ""
            demand_labels(note, labels, xml_path)
            self._demand_form(model, xml_path)
            for result in model.get_results():
                if output not in result.output(0).get_names():
                    model.remove_result(result)
            compiled = core.compile_model(model, "CPU", {
                "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False,
            })
        except RuntimeError as error:
            if _is_memory(error):
                raise self._no_memory(error) from None
            raise CheckpointError("CORRUPT", xml_path, f"OpenVINO does not take it ({_first_line(error)})",
                                  "export the model again") from None
        self._request, self._output = compiled.create_infer_request(), output

    @property
    def version(self) -> str:
        return importlib.metadata.version("openvino")

    def predict(self, patches: np.ndarray) -> np.ndarray:
        """See `Predictor`; float32, window by window straight into the result. With ``output="logits"`` those."""
        patches = np.ascontiguousarray(patches, np.float32)
        results = np.empty((len(patches), self.num_outputs, *self.patch_size), np.float32)
        for index in range(len(patches)):
            self._request.set_tensor("ct", self._ov.Tensor(patches[index : index + 1], shared_memory=True))
            self._request.set_tensor(self._output, self._ov.Tensor(results[index : index + 1], shared_memory=True))
            try:
                self._request.infer()
            except RuntimeError as error:
                if _is_memory(error):
                    raise self._no_memory(error) from None
                raise CheckpointError("CORRUPT", self._where, f"OpenVINO cannot run it ({_first_line(error)})",
                                      "export the model again") from None
        self._has_run = True
        return results

    def activation_bytes(self, batch_size: int) -> int:
        """What the first call takes; it is kept for the next ones."""
        return 0 if self._has_run else self._activation_bytes

    def _no_memory(self, error: BaseException) -> ResourceError:
        return ResourceError("MEMORY", "openvino", f"one patch of {self.patch_size} voxels does not fit "
                             f"({_first_line(error)})", "take a model with a smaller patch or a machine with more "
                             "memory")

    def _demand_form(self, model: Any, where: Path) -> None:
        ports = {name: (port.get_element_type().get_type_name(), tuple(port.get_partial_shape().to_shape()))
                 for port in (*model.inputs, *model.outputs) for name in port.get_names()}
        output = ("f32", (1, self.num_outputs, *self.patch_size))
        for name, wish in {"ct": ("f32", (1, 1, *self.patch_size)), "logits": output, "probs": output}.items():
            if ports.get(name) != wish:
                raise CheckpointError("MISMATCH", where, f"expected {name} {wish}, got {ports.get(name)}",
                                      "export the model again")


@functools.cache
def openvino_core() -> Any:
    """OpenVINO's core, one for the life of the process.

    Its CPU plug-in gives the thread that loads it another stack for signals and frees that stack with itself. Where a
    garbage collector does so in another thread, the first one keeps an address that is gone, and the next signal that
    Python hears, such as Ctrl-C, ends the process with a segmentation fault (OpenVINO 2026.4.1).

    Raises:
        MissingExtraError: openvino is not installed.
    """
    return _import().Core()


def _import() -> Any:
    try:
        import openvino
    except ImportError:
        raise MissingExtraError("MISSING_EXTRA", "openvino", "expected the package openvino, got none",
                                'pip install "autosam3d[fast]"') from None
    return openvino


def _is_memory(error: BaseException) -> bool:
    return "alloc" in str(error) or "memory" in str(error)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from")]
    return (lines or ["no reason given"])[0][:200]
