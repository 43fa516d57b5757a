"""Nothing leaves the machine, and nothing is left on it: the runtimes under a tracer, in a network of their own.

The long form, with the commands themselves, a service that lives 40 seconds and every optional library, is
tests/soak/test_soak_nothing_leaves.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

from exports import mini_export
from tracing import traced

# The converter's tools and NNCF begin to report as they are imported; both import what OpenVINO reports with.
_OURS = """
import sys
from pathlib import Path
import numpy as np
from autosam3d.checkpoints.exported import load_exported, open_export
for backend in ("onnxruntime", "openvino"):
    model = load_exported(open_export(Path(sys.argv[1])), backend, 1)
    model.predictor.predict(np.zeros((1, 1, 16, 16, 16), np.float32))
import openvino.tools.ovc.main
print("done")
"""
_CONTROL = """
import os, sys
import onnxruntime, openvino
onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", providers=["CPUExecutionProvider"])
print("done")
"""


def test_the_runtimes_report_to_nobody(tmp_path: Path) -> None:
    done = traced([sys.executable, "-c", _OURS, mini_export()], tmp_path / "ours")
    assert done.told.split()[-1] == "done", done.told
    assert (done.look_ups, done.outside, done.files) == ([], [], [])


def test_the_tracer_sees_runtimes_that_report(tmp_path: Path) -> None:
    """Without this package both do: else the test above could not fail."""
    done = traced([sys.executable, "-c", _CONTROL, mini_export()], tmp_path / "control",
                  env={"ORT_DISABLE_TELEMETRY": "0", "PYTHONPATH": ""})
    assert "done" in done.told
    assert len(done.look_ups) > 0
    assert any("intel" in name for name in done.files) and any("onnxruntime" in name for name in done.files)
