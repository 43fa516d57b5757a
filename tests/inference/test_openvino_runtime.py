"""The OpenVINO predictor: the same numbers as torch, and broken files refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from autosam3d.errors import CheckpointError
from autosam3d.inference.openvino_runtime import OpenVinoPredictor
from exports import LABELS, SIZE, Convolutions, copied, make_patches, mini_export, torch_logits
from mini_run import environment


@pytest.mark.parametrize("threads", [1, 2])
def test_probabilities_and_logits_are_torchs(threads: int) -> None:
    xml, patches = mini_export() / "openvino.xml", make_patches(3)
    expected = torch_logits(Convolutions(), patches)
    logits = OpenVinoPredictor(xml, SIZE, LABELS, threads, output="logits").predict(patches)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    predictor = OpenVinoPredictor(xml, SIZE, LABELS, threads)
    probs = predictor.predict(patches)
    assert probs.dtype == np.float32 and probs.shape == (3, 3, *SIZE)
    np.testing.assert_allclose(probs, np.exp(expected) / np.exp(expected).sum(1, keepdims=True), atol=1e-6)
    np.testing.assert_array_equal(predictor.predict(patches[1:2]), probs[1:2])
    np.testing.assert_array_equal(predictor.predict(patches.transpose(0, 1, 4, 3, 2)),
                                  predictor.predict(np.ascontiguousarray(patches.transpose(0, 1, 4, 3, 2))))


def test_results_stay_what_they_are_when_the_next_window_is_predicted() -> None:
    predictor, patches = OpenVinoPredictor(mini_export() / "openvino.xml", SIZE, LABELS, 1), make_patches(2)
    first = predictor.predict(patches[:1])
    kept = first.copy()
    predictor.predict(patches[1:])
    np.testing.assert_array_equal(first, kept)


def test_memory_is_foreseen_for_the_first_call_and_held_afterwards() -> None:
    predictor = OpenVinoPredictor(mini_export() / "openvino.xml", SIZE, LABELS, 1, 12345)
    assert predictor.activation_bytes(1) == 12345
    predictor.predict(make_patches(1))
    assert predictor.activation_bytes(1) == 0


def test_weights_are_stored_as_float16() -> None:
    assert (mini_export() / "openvino.bin").stat().st_size < 1.2 * (mini_export() / "model.onnx").stat().st_size


def test_signals_are_heard_after_another_thread_threw_the_predictor_away() -> None:
    """In a process of its own, which OpenVINO would leave without a stack for signals."""
    code = (
        "import os, pathlib, signal, sys, threading\n"
        "from autosam3d.inference.openvino_runtime import OpenVinoPredictor\n"
        "held = [OpenVinoPredictor(pathlib.Path(sys.argv[1]), (16, 16, 16), sys.argv[2:], 1)]\n"
        "thread = threading.Thread(target=held.clear)\n"
        "thread.start()\n"
        "thread.join()\n"
        "signal.signal(signal.SIGUSR1, lambda number, frame: print('heard'))\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
    )
    done = subprocess.run([sys.executable, "-X", "faulthandler", "-c", code, mini_export() / "openvino.xml", *LABELS],
                          capture_output=True, text=True, timeout=120, env=environment())
    assert (done.returncode, done.stdout, done.stderr) == (0, "heard\n", "")


@pytest.mark.parametrize("name", ["openvino.xml", "openvino.bin"])
@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_part_of_a_file_is_refused(tmp_path: Path, name: str, keep: float) -> None:
    path = copied(tmp_path) / name
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError) as caught:
        OpenVinoPredictor(path.with_name("openvino.xml"), SIZE, LABELS, 1)
    assert caught.value.code == "CORRUPT"


def test_another_network_is_refused_with_both_lists(tmp_path: Path) -> None:
    xml = copied(tmp_path) / "openvino.xml"
    with pytest.raises(CheckpointError) as caught:
        OpenVinoPredictor(xml, SIZE, ["background", "spleen"], 1)
    assert caught.value.fault == ("expected a network of 2 classes, background, spleen; got one of 3, background, "
                                  "right_kidney, left_kidney")
    with pytest.raises(CheckpointError, match="expected ct") as caught:
        OpenVinoPredictor(xml, (16, 16, 8), LABELS, 1)
    assert caught.value.code == "MISMATCH"
    xml.write_text(xml.read_text().replace("<autosam3d>", "<other>").replace("</autosam3d>", "</other>"))
    with pytest.raises(CheckpointError, match="got one of unnamed classes"):
        OpenVinoPredictor(xml, SIZE, LABELS, 1)
