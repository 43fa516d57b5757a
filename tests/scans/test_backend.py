"""Which runtime is taken: measured once, remembered, overridden, and never a reason to fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autosam3d.checkpoints.exported import open_export
from autosam3d.checkpoints.probe import Cost, measure_cost
from autosam3d.errors import MissingExtraError, UsageError
from autosam3d.scans import backend
from autosam3d.scans.backend import fastest_backend, wished_backend
from autosam3d.user_folders import cache_folder
from exports import mini_export


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A cache of its own, and a stop-watch by which OpenVINO is the faster one; lists what was measured."""
    names: list[str] = []

    def cost(folder: Path, name: str, threads: int) -> Cost:
        names.append(name)
        return Cost({"onnxruntime": 2.0, "openvino": 1.0}[name], 0)

    monkeypatch.setattr(backend, "measure_cost", cost)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return names


def test_the_fastest_is_measured_once_a_model_threads_and_version(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    export = open_export(mini_export())
    assert [fastest_backend(export, 1) for _ in range(3)] == ["openvino"] * 3
    assert measured == ["onnxruntime", "openvino"]
    fastest_backend(export, 2)
    assert len(measured) == 4
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99")
    fastest_backend(export, 2)
    assert len(measured) == 6


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\x00", b'{"fastest": "openvino"}', b"[" * 60000])
def test_a_broken_cache_is_measured_again_in_silence(measured: list[str], content: bytes, caplog: Any) -> None:
    export = open_export(mini_export())
    fastest_backend(export, 1)
    (file,) = cache_folder().iterdir()
    file.write_bytes(content)
    assert fastest_backend(export, 1) == "openvino" and len(measured) == 4 and not caplog.records
    assert json.loads(file.read_text())["fastest"] == "openvino"


def test_an_answer_that_names_no_runtime_is_not_believed(measured: list[str]) -> None:
    export = open_export(mini_export())
    fastest_backend(export, 1)
    (file,) = cache_folder().iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fastest": "../../evil"}))
    assert fastest_backend(export, 1) == "openvino"


def test_a_cache_that_cannot_be_written_costs_the_measurement_only(
    measured: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))  # and no temporary one in its place
    assert [fastest_backend(open_export(mini_export()), 1) for _ in range(2)] == ["openvino"] * 2
    assert len(measured) == 4 and not caplog.records


def test_a_runtime_that_fails_is_not_taken(measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "measure_cost", lambda folder, name, n: Cost(1, 0) if name != "openvino" else None)
    assert fastest_backend(open_export(mini_export()), 1) == "onnxruntime"


def test_one_runtime_needs_no_measurement_and_none_is_an_error(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "installed_backends", lambda export: ["onnxruntime"])
    assert fastest_backend(open_export(mini_export()), 1) == "onnxruntime" and not measured
    monkeypatch.setattr(backend, "installed_backends", lambda export: [])
    with pytest.raises(MissingExtraError) as caught:
        fastest_backend(open_export(mini_export()), 1)
    assert caught.value.remedy == 'pip install "autosam3d[fast]"'


def test_option_before_environment_before_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    assert wished_backend("auto") == "auto"
    monkeypatch.setenv(backend.VARIABLE, "onnxruntime")
    assert wished_backend("auto") == "onnxruntime" and wished_backend("torch") == "torch"
    monkeypatch.setenv(backend.VARIABLE, "abacus")
    with pytest.raises(UsageError, match="AUTOSAM3D_BACKEND=abacus"):
        wished_backend("auto")
    with pytest.raises(UsageError, match="--backend abacus"):
        wished_backend("abacus")


def test_the_cost_is_measured_in_another_process() -> None:
    cost = measure_cost(mini_export(), "onnxruntime", 1)
    assert cost is not None and 0 < cost.seconds < 60 and 0 <= cost.activation_bytes < 1 << 30
    assert measure_cost(mini_export() / "nowhere", "onnxruntime", 1) is None
