"""ExecuTorch: a program on PyTorch's runtime for phones, its CPU kernels XNNPACK. Its Python package needs torch."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autosam3d.axes import Size
from autosam3d.errors import CheckpointError, MissingExtraError
from autosam3d.inference.onnx_file import demand_labels
from autosam3d.inference.predictor import softmax
from autosam3d.inference.quiet import mute

_AGAIN = "export the model again"


class ExecutorchPredictor:
    """A program whose ``forward`` takes float32 [1, 1, D, H, W] and gives logits [1, K, D, H, W].

    Args:
        content: of the file; nothing else is read.
        where: the file, for messages.
        patch_size: (z, y, x).
        labels: of the K channels, background first; the program's method ``labels`` must name the same.
        threads: of XNNPACK, for all programs of this process.
        activation_bytes: what one patch takes, where it is known.
        output: "probs", or "logits" for comparisons.

    Raises:
        MissingExtraError: executorch is not installed.
        CheckpointError: CORRUPT or MISMATCH, of shapes or of labels.
    """

    name = "executorch"

    def __init__(self, content: bytes, where: Path, patch_size: Size, labels: Sequence[str], threads: int,
                 activation_bytes: int = 0, output: str = "probs") -> None:
        self.patch_size, self.num_outputs = patch_size, len(labels)
        self._activation_bytes, self._has_run, self._output = activation_bytes, False, output
        with mute():
            self._torch, runtime = _import("torch"), _import("executorch.runtime")
        corrupt = CheckpointError("CORRUPT", where, "expected an ExecuTorch program, got something else or a part of "
                                  "one", _AGAIN)
        if content[4:6] != b"ET":  # "ET12": the rest is the version of the format
            raise corrupt
        try:
            with mute():  # the runtime tells what it reads of the processor, and of a broken file in its own words
                program = runtime.Runtime.get().load_program(content)
                if not {"forward", "labels"} <= program.method_names:
                    raise corrupt
                note = program.load_method("labels").execute([])
                demand_labels(note[0] if note and isinstance(note[0], str) else "", labels, where)
                self._demand_form(program.metadata("forward"), where)
                kernels: Any = _import("executorch.extension.pybindings.portable_lib")
                if kernels._threadpool_get_thread_count() != threads:
                    kernels._unsafe_reset_threadpool(threads)  # unsafe while a program runs; here none does
                # The runtime reads the program where it lies, and does not hold it.
                self._held, self._method = (content, program), program.load_method("forward")
        except RuntimeError as error:
            raise CheckpointError("CORRUPT", where, f"ExecuTorch does not take it ({_first_line(error)})",
                                  _AGAIN) from None

    @property
    def version(self) -> str:
        return importlib.metadata.version("executorch")

    def predict(self, patches: np.ndarray) -> np.ndarray:
        """See `Predictor`; float32, window by window. With ``output="logits"`` those."""
        patches = np.ascontiguousarray(patches, np.float32)
        results = np.empty((len(patches), self.num_outputs, *self.patch_size), np.float32)
        for index in range(len(patches)):
            (logits,) = self._method.execute([self._torch.from_numpy(patches[index : index + 1])])
            results[index] = logits.numpy()[0]
        self._has_run = True
        return results if self._output == "logits" else softmax(results)

    def activation_bytes(self, batch_size: int) -> int:
        """What the first call takes; it is kept for the next ones."""
        return 0 if self._has_run else self._activation_bytes

    def _demand_form(self, form: Any, where: Path) -> None:
        got = [[tuple(meta(i).sizes()) for i in range(count)] for count, meta in (
            (form.num_inputs(), form.input_tensor_meta), (form.num_outputs(), form.output_tensor_meta))]
        expected = [[(1, 1, *self.patch_size)], [(1, self.num_outputs, *self.patch_size)]]
        if got != expected:
            raise CheckpointError("MISMATCH", where, f"expected input and output {expected}, got {got}", _AGAIN)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError("MISSING_EXTRA", "executorch", f"expected the package executorch, got none ({error})",
                                'pip install "autosam3d[mobile]"') from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["no reason given"])[0][:200]
