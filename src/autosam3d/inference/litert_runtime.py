"""LiteRT: a TFLite file on Google's runtime for phones, its CPU kernels XNNPACK. Torch is not needed."""

from __future__ import annotations

import importlib
import importlib.metadata
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autosam3d.axes import Size
from autosam3d.errors import CheckpointError, MissingExtraError, ResourceError
from autosam3d.inference.onnx_file import demand_labels
from autosam3d.inference.predictor import softmax
from autosam3d.inference.quiet import mute

IDENTIFIER = b"TFL3"
"""Bytes 4 to 7 of a TFLite file."""
LABELS_KEY = "autosam3d.labels"
"""Name of the metadata that holds the classes."""
_AGAIN = "export the model again"


class LitertPredictor:
    """A TFLite file of one input float32 [1, 1, D, H, W] and one output, logits [1, K, D, H, W].

    Args:
        content: of the file; nothing else is read.
        where: the file, for messages.
        patch_size: (z, y, x).
        labels: of the K channels, background first; the file must name the same.
        threads: of XNNPACK.
        activation_bytes: what one patch takes, where it is known.
        output: "probs", or "logits" for comparisons.

    Raises:
        MissingExtraError: ai-edge-litert is not installed.
        CheckpointError: CORRUPT or MISMATCH, of shapes or of labels.
    """

    name = "litert"

    def __init__(self, content: bytes, where: Path, patch_size: Size, labels: Sequence[str], threads: int,
                 activation_bytes: int = 0, output: str = "probs") -> None:
        interpreters, schema = _import("ai_edge_litert.interpreter"), _import("ai_edge_litert.schema_py_generated")
        demand_labels(_note(content, schema, where), labels, where)
        self.patch_size, self.num_outputs = patch_size, len(labels)
        self._activation_bytes, self._has_run, self._output = activation_bytes, False, output
        try:
            with mute():  # the runtime tells that it uses XNNPACK
                self._interpreter = interpreters.Interpreter(model_content=content, num_threads=threads)
                self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise CheckpointError("CORRUPT", where, f"LiteRT does not take it ({_first_line(error)})",
                                  _AGAIN) from None
        got = [[(tuple(int(n) for n in d["shape"]), np.dtype(d["dtype"]).name) for d in details] for details in
               (self._interpreter.get_input_details(), self._interpreter.get_output_details())]
        expected = [[((1, 1, *patch_size), "float32")], [((1, len(labels), *patch_size), "float32")]]
        if got != expected:
            raise CheckpointError("MISMATCH", where, f"expected input and output {expected}, got {got}", _AGAIN)
        self._input = self._interpreter.get_input_details()[0]["index"]
        self._result = self._interpreter.get_output_details()[0]["index"]

    @property
    def version(self) -> str:
        return importlib.metadata.version("ai-edge-litert")

    def predict(self, patches: np.ndarray) -> np.ndarray:
        """See `Predictor`; float32, window by window. With ``output="logits"`` those."""
        patches = np.ascontiguousarray(patches, np.float32)
        results = np.empty((len(patches), self.num_outputs, *self.patch_size), np.float32)
        for index in range(len(patches)):
            self._interpreter.set_tensor(self._input, patches[index : index + 1])
            try:
                self._interpreter.invoke()
            except RuntimeError as error:
                if "alloc" not in str(error) and "memory" not in str(error):
                    raise
                raise ResourceError("MEMORY", "litert", f"one patch of {self.patch_size} voxels does not fit "
                                    f"({_first_line(error)})", "take a model with a smaller patch or a machine with "
                                    "more memory") from None
            results[index] = self._interpreter.get_tensor(self._result)[0]
        self._has_run = True
        return results if self._output == "logits" else softmax(results)

    def activation_bytes(self, batch_size: int) -> int:
        """What the first call takes; it is kept for the next ones."""
        return 0 if self._has_run else self._activation_bytes


def _note(content: bytes, schema: Any, where: Path) -> str:
    """The classes that the file names, as it writes them; "" where it names none."""
    corrupt = CheckpointError("CORRUPT", where, "expected a TFLite model, got something else or a part of one", _AGAIN)
    if content[4:8] != IDENTIFIER:
        raise corrupt
    try:
        model = schema.Model.GetRootAs(content, 0)
        for index in range(min(model.MetadataLength(), 64)):
            entry = model.Metadata(index)
            if entry.Name() == LABELS_KEY.encode():
                return bytes(model.Buffers(entry.Buffer()).DataAsNumpy()).decode("utf-8", errors="replace")
    except (struct.error, IndexError, ValueError, TypeError, AttributeError, OverflowError):
        raise corrupt from None
    return ""


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError("MISSING_EXTRA", "litert", f"expected the package ai-edge-litert, got none ({error})",
                                'pip install "autosam3d[mobile]"') from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["no reason given"])[0][:200]
