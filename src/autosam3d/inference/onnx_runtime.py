"""ONNX Runtime: an exported graph on the CPU. Neither torch nor onnx is needed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autosam3d.axes import Size
from autosam3d.errors import CheckpointError, MissingExtraError, ResourceError
from autosam3d.inference.onnx_file import demand_labels, demand_self_contained


class OnnxPredictor:
    """An ONNX file with the input ``ct`` [1, 1, D, H, W] and the outputs ``logits`` and ``probs`` [1, K, D, H, W].

    Args:
        content: of the file; nothing else is read.
        where: the file, for messages.
        patch_size: (z, y, x).
        labels: of the K channels, background first; the file must name the same.
        threads: for one operator; operators run one after the other.
        activation_bytes: what one patch takes, where it is known.
        output: "probs", or "logits" for comparisons.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        CheckpointError: CORRUPT, UNSAFE, OPSET, MODEL_TOO_LARGE or MISMATCH, of shapes or of labels.
    """

    name = "onnxruntime"

    def __init__(self, content: bytes, where: Path, patch_size: Size, labels: Sequence[str], threads: int,
                 activation_bytes: int = 0, output: str = "probs") -> None:
        demand_labels(demand_self_contained(content, where).notes.get("labels", ""), labels, where)
        self.patch_size, self.num_outputs, self._where = patch_size, len(labels), where
        self._activation_bytes, self._has_run, self._output = activation_bytes, False, output
        runtime = _import()
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4
        # Without the plan of one block for all activations: measured 360 MB less at 96^3, as fast.
        options.enable_mem_pattern = False
        # Threads that wait for work without sleeping take cycles from the stitching beside them.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except _faults() as error:
            if _is_memory(error):
                raise self._no_memory(error) from None
            raise CheckpointError("CORRUPT", where, f"ONNX Runtime does not take it ({_first_line(error)})",
                                  "export the model again") from None
        given = {i.name: (i.type, tuple(i.shape)) for i in (*self._session.get_inputs(), *self._session.get_outputs())}
        form = ("tensor(float)", (1, len(labels), *patch_size))
        expected = {"ct": ("tensor(float)", (1, 1, *patch_size)), "logits": form, "probs": form}
        for name, wish in expected.items():
            if given.get(name) != wish:
                raise CheckpointError("MISMATCH", where, f"expected {name} {wish}, got {given.get(name)}",
                                      "export the model again")

    @property
    def version(self) -> str:
        return importlib.metadata.version("onnxruntime")

    def predict(self, patches: np.ndarray) -> np.ndarray:
        """See `Predictor`; float32, window by window straight into the result. With ``output="logits"`` those."""
        patches = np.ascontiguousarray(patches, np.float32)
        results = np.empty((len(patches), self.num_outputs, *self.patch_size), np.float32)
        binding = self._session.io_binding()
        shape = results.shape[1:]
        for patch, result in zip(patches, results, strict=True):
            binding.bind_input("ct", "cpu", 0, np.float32, (1, *patch.shape), patch.ctypes.data)
            binding.bind_output(self._output, "cpu", 0, np.float32, (1, *shape), result.ctypes.data)
            try:
                self._session.run_with_iobinding(binding)
            except _faults() as error:
                if _is_memory(error):
                    raise self._no_memory(error) from None
                raise CheckpointError("CORRUPT", self._where, f"ONNX Runtime cannot run it ({_first_line(error)})",
                                      "export the model again") from None
        self._has_run = True
        return results

    def activation_bytes(self, batch_size: int) -> int:
        """What the first call takes; it is kept for the next ones."""
        return 0 if self._has_run else self._activation_bytes

    def _no_memory(self, error: BaseException) -> ResourceError:
        return ResourceError("MEMORY", "onnxruntime", f"one patch of {self.patch_size} voxels does not fit "
                             f"({_first_line(error)})", "take a model with a smaller patch or a machine with more "
                             "memory")


def _is_memory(error: BaseException) -> bool:
    return "alloc" in str(error)


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("MISSING_EXTRA", "onnxruntime", "expected the package onnxruntime, got none",
                                'pip install "autosam3d[fast]"') from None
    return onnxruntime


def _faults() -> tuple[type[BaseException], ...]:
    """Its exceptions have no common ancestor but Exception."""
    import importlib

    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException",
             "NoModel", "NoSuchFile", "ModelLoaded", "EPFail", "EngineError")
    return (*(getattr(state, name) for name in names if hasattr(state, name)), RuntimeError, ValueError)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["no reason given"])[0][:200]
