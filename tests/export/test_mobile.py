"""Targets for phones: asked for by name, refused before any work, proved like the others or said to be unproved.

What needs a runtime or a converter that is not installed is skipped with the reason; all else runs everywhere.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from autosam3d.checkpoints.exported import (
    FILES_OF,
    NOT_RUN_HERE,
    RUNTIMES,
    installed_backends,
    load_exported,
    open_export,
)
from autosam3d.checkpoints.targets import MOBILE, demand_mobile
from autosam3d.errors import AutoSam3dError, CheckpointError, MissingExtraError, UsageError
from autosam3d.export import export as export_module
from autosam3d.export.export import export_model
from autosam3d.export.onnx_graph import with_half_weights
from autosam3d.export.verify import verify_export
from autosam3d.inference.pipeline import segment
from autosam3d.inference.predictor import softmax
from autosam3d.inference.quiet import mute, quiet
from autosam3d.io import write_ct
from autosam3d.models.spec import AutoSamSpec, ResUnetSpec, SwinUnetrSpec
from autosam3d.volume import Volume
from command_line import contents, mini_model, run
from exports import LABELS, SIZE, Convolutions, accept, copied, edit, loaded, make_patches, mini_export, torch_logits
from mini_run import affine_of, blobs, environment

PACKAGES = {"litert": ("litert_torch", "ai_edge_litert"), "executorch": ("executorch",), "coreml": ("coremltools",)}


def needs(*targets: str) -> pytest.MarkDecorator:
    missing = [p for t in targets for p in PACKAGES[t] if importlib.util.find_spec(p) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed (extra mobile)")


RUN = [pytest.param(name, marks=needs(name)) for name in ("litert", "executorch")]
ALL = [pytest.param(name, marks=needs(name)) for name in MOBILE]


@functools.cache
def mobile_export(target: str) -> Path:
    """An export with one target for phones (read-only, please)."""
    import atexit

    folder = Path(tempfile.mkdtemp(prefix="autosam3d-mobile-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    export_model(loaded(), folder / "export", targets=[target])
    return folder / "export"


# --------------------------------------------------------------------------- asked for by name, refused before work


def test_students_go_to_phones_and_the_teacher_does_not() -> None:
    for spec in (SwinUnetrSpec(num_outputs=3), ResUnetSpec(num_outputs=3)):
        demand_mobile(spec, MOBILE)
    with pytest.raises(UsageError, match="take swin_unetr or res_unet"):
        demand_mobile(AutoSamSpec(num_outputs=3), ["litert"])
    for name in ("abacus", "onnxruntime", "openvino", ""):
        with pytest.raises(UsageError, match="expected litert, executorch, coreml") as caught:
            demand_mobile(SwinUnetrSpec(num_outputs=3), ["litert", name])
        assert caught.value.code == "TARGET"


def test_a_target_is_refused_before_the_scan_is_read(tmp_path: Path) -> None:
    """The scan that is named does not exist: who reads it first says so."""
    for target, words in (("abacus", "expected litert, executorch, coreml"), ("executorch", "does not run")):
        line = run("export", mini_model(), tmp_path / "export", "--ct", tmp_path / "none.nii.gz", "--target", "litert",
                   "--target", target).demand_error("TARGET", 2)
        assert words in line or target == "executorch"
    assert contents(tmp_path) == {}


def spec_of_a_student(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mini network has the recipe of an AutoSAM, which phones refuse; its convolutions they take."""
    monkeypatch.setattr(export_module, "demand_mobile", lambda spec, targets: None)


@pytest.fixture(autouse=True)
def _student(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    spec_of_a_student(monkeypatch)


@pytest.mark.parametrize("target", list(MOBILE))
def test_a_package_that_is_missing_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    real, absent = importlib.util.find_spec, {p for names in PACKAGES.values() for p in names}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in absent else real(name))
    with pytest.raises(MissingExtraError) as caught:
        export_model(loaded(), tmp_path / "export", targets=[target])
    assert caught.value.remedy == 'pip install "autosam3d[mobile]"'
    assert all(name in caught.value.fault for name in PACKAGES[target])
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("backend", ["litert", "executorch"])
def test_an_export_without_the_file_and_a_checkpoint_say_what_to_do(backend: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_exported(mini_export(), backend, 1)
    assert caught.value.code == "BACKEND" and f"--target {backend}" in caught.value.remedy
    write_ct(tmp_path / "ct.nii.gz", Volume(blobs(0)[0], affine_of()))
    for model in (mini_export(), mini_model()):
        line = run("segment", model, tmp_path / "ct.nii.gz", tmp_path / "out.nii.gz", "--backend", backend
                   ).demand_error("BACKEND", 2)
        assert f"--target {backend}" in line
    assert list(contents(tmp_path)) == ["ct.nii.gz"]


# ------------------------------------------------------------------------- the folder, with runtimes that stand in


class StandIn:
    """What a runtime for phones would be: PyTorch, off by so much."""

    name, version = "litert", "0"

    def __init__(self, off: float) -> None:
        self.off = off

    def predict(self, patches: np.ndarray) -> np.ndarray:
        return torch_logits(Convolutions(), patches) + self.off * np.sign(patches)


@pytest.fixture
def standing_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """No package is needed: files are written as a few bytes, and `StandIn` is what runs them."""

    def write(target: str, network: nn.Module, recipe: Any, stage: Path) -> None:
        path = stage / MOBILE[target]
        if target == "coreml":
            (path / "Data").mkdir(parents=True)
            (path / "Data" / "weight.bin").write_bytes(b"weights")
            path = path / "Manifest.json"
        path.write_bytes(target.encode())

    def install(off: float) -> None:
        real = export_module.load_exported

        def load(export: Any, backend: str, threads: int, **how: Any) -> Any:
            if backend not in ("litert", "executorch"):
                return real(export, backend, threads, **how)
            assert export.path(FILES_OF[backend][0]).read_bytes() == backend.encode()
            return type("Loaded", (), {"predictor": StandIn(off)})

        monkeypatch.setattr(export_module, "load_exported", load)

    monkeypatch.setattr(export_module, "_write_mobile", write)
    monkeypatch.setattr(export_module, "demand_packages", lambda targets: None)
    monkeypatch.setattr(export_module, "measure_cost", lambda *args: None)
    monkeypatch.setattr(export_module, "package_versions", lambda mobile: {})
    return install


def test_each_runtime_has_its_row_and_coreml_is_said_to_be_unproved(
    tmp_path: Path, standing_in: Callable[[float], None]
) -> None:
    standing_in(0)
    steps: list[tuple[int, int]] = []
    result = export_model(loaded(), tmp_path / "export", targets=["coreml", "executorch", "litert", "coreml"],
                          progress=lambda done, total: steps.append((done, total)))
    assert [row.backend for row in result.rows] == ["pytorch", "onnxruntime", "openvino", "litert", "executorch"]
    assert result.not_run == {"coreml": NOT_RUN_HERE} and steps[-1] == (len(steps), len(steps) + 1)
    assert result.sizes["coreml.mlpackage"] == len("coreml") + len("weights")
    certificate = json.loads((tmp_path / "export/certificate.json").read_text())
    assert certificate["not_run"] == {"coreml": NOT_RUN_HERE}
    assert "coreml" not in [row["backend"] for row in certificate["backends"]]
    text = (tmp_path / "export/certificate.md").read_text()
    assert "coreml was written and not run on this platform: nothing is proved of it." in text
    assert "| coreml | - |" in text
    meta = json.loads((tmp_path / "export/model.json").read_text())
    assert set(meta["files"]) >= {"model.tflite", "model.pte", "coreml.mlpackage/Manifest.json",
                                  "coreml.mlpackage/Data/weight.bin"}
    assert meta["use"]["coreml"]["file"] == "coreml.mlpackage" and "never run" in meta["use"]["coreml"]["how"]


@pytest.mark.parametrize("off", [0.05, float("nan")])
def test_a_runtime_for_phones_that_is_wrong_leaves_nothing(
    tmp_path: Path, standing_in: Callable[[float], None], off: float
) -> None:
    standing_in(off)
    with pytest.raises(CheckpointError, match="litert 0 does not say what PyTorch says") as caught:
        export_model(loaded(), tmp_path / "export", targets=["litert", "coreml"])
    assert caught.value.code == "PARITY" and contents(tmp_path) == {}


def test_verify_names_what_it_cannot_run_and_checks_its_files_all_the_same(
    tmp_path: Path, standing_in: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    standing_in(0)
    folder = tmp_path / "export"
    export_model(loaded(), folder, targets=list(MOBILE))
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec",
                        lambda name: None if name in ("ai_edge_litert", "executorch") else real(name))
    result = verify_export(folder, 1)
    assert [row.backend for row in result.rows] == ["onnxruntime", "openvino"] and len(result.files) == 10
    assert result.not_run == {"litert": "ai_edge_litert is not installed", "executorch": "executorch is not installed",
                              "coreml": NOT_RUN_HERE}
    with pytest.raises(MissingExtraError) as caught:
        load_exported(folder, "litert", 1)
    assert caught.value.remedy == 'pip install "autosam3d[mobile]"'
    inner = folder / "coreml.mlpackage/Data/weight.bin"
    inner.write_bytes(b"weightz")
    with pytest.raises(CheckpointError, match=r"weight\.bin") as broken:
        verify_export(folder, 1)
    assert broken.value.code == "HASH"
    inner.write_bytes(b"weights")
    (folder / "coreml.mlpackage/Data").rename(tmp_path / "Data")
    (folder / "coreml.mlpackage/Data").symlink_to(tmp_path / "Data")
    with pytest.raises(CheckpointError, match="got a link"):
        verify_export(folder, 1)


def test_a_name_that_leads_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (tmp_path / "secret").write_bytes(b"secret")
    for name in ("../secret", str(tmp_path / "secret"), "x/../../secret"):
        edit(folder, lambda meta, name=name: meta["files"].update({name: dict(meta["files"]["model.onnx"])}))
        with pytest.raises(CheckpointError) as caught:
            verify_export(folder, 1)
        assert caught.value.code == "MODEL_PATH"
        edit(folder, lambda meta, name=name: meta["files"].pop(name))


def test_softmax_is_that_of_torch_even_for_large_logits() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 3, 4, 5, 6)).astype(np.float32) * 500
    expected = torch.softmax(torch.from_numpy(logits), 1).numpy()
    np.testing.assert_allclose(softmax(logits.copy()), expected, atol=1e-6)


# -------------------------------------------------------------------------------------------- the runtimes proper


@pytest.mark.slow
@pytest.mark.parametrize("target", RUN)
def test_a_phones_runtime_says_what_torch_says(target: str) -> None:
    folder, patches = mobile_export(target), make_patches(3)
    certificate = json.loads((folder / "certificate.json").read_text())
    row = {r["backend"]: r for r in certificate["backends"]}[target]
    assert row["within_bounds"] and row["logit_share"] < 1e-5 and certificate["not_run"] == {}
    expected = torch_logits(Convolutions(), patches)
    logits = load_exported(folder, target, 2, output="logits").predictor.predict(patches)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    probs = load_exported(folder, target, 1).predictor
    np.testing.assert_allclose(probs.predict(patches), torch.softmax(torch.from_numpy(expected), 1), atol=1e-5)
    kept = probs.predict(patches[:1])
    again = kept.copy()
    probs.predict(patches[1:])
    np.testing.assert_array_equal(kept, again)
    export = open_export(folder)
    assert target in installed_backends(export, RUNTIMES) and target not in installed_backends(export)
    assert target in [row.backend for row in verify_export(folder, 1).rows]
    volume = Volume(blobs(0)[0], affine_of())
    result = segment(volume, load_exported(folder, target, 1), max_ram_bytes=4 << 30)
    np.testing.assert_array_equal(result.labels, segment(volume, loaded()).labels)


@pytest.mark.slow
@pytest.mark.parametrize("target", RUN)
def test_a_phones_file_of_another_network_or_in_parts_is_refused(target: str, tmp_path: Path) -> None:
    name = FILES_OF[target][0]
    folder = Path(shutil.copytree(mobile_export(target), tmp_path / "export"))
    content = (folder / name).read_bytes()
    for part in (b"", content[:4], content[:100], content[: len(content) // 2], content[:4] + b"ABCD" + content[8:]):
        (folder / name).write_bytes(part)
        accept(folder, name)
        with pytest.raises(CheckpointError) as caught:
            load_exported(folder, target, 1)
        assert caught.value.code == "CORRUPT", len(part)
    (folder / name).write_bytes(content)
    accept(folder, name)
    predictor = type(load_exported(folder, target, 1).predictor)
    with pytest.raises(CheckpointError, match="expected a network of 2 classes, background, spleen; got one of 3"):
        predictor(content, folder / name, SIZE, ["background", "spleen"], 1)
    with pytest.raises(CheckpointError) as caught:
        predictor(content, folder / name, (8, 16, 16), LABELS, 1)
    assert caught.value.code == "MISMATCH"


@pytest.mark.slow
@needs("litert")
def test_litert_stores_large_weights_as_float16_and_leaves_the_work_to_xnnpack() -> None:
    from autosam3d.export.litert_graph import litert_model
    from autosam3d.inference.litert_runtime import LitertPredictor

    torch.manual_seed(0)
    network = with_half_weights(nn.Sequential(
        nn.Conv3d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 16, 3, padding=1), nn.Conv3d(16, 3, 1)
    ))
    schema = importlib.import_module("ai_edge_litert.schema_py_generated")
    content = litert_model(network, SIZE, LABELS)
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    tensors = model.subgraphs[0].tensors
    constants = [t for t in tensors if model.buffers[t.buffer].data is not None]
    large = [t for t in constants if np.prod(t.shape) >= 1024]
    assert large and all(t.type == schema.TensorType.FLOAT16 for t in large)
    flat = schema.Model.GetRootAs(content, 0)
    begin = np.frombuffer(content, np.uint8).ctypes.data
    data = [flat.Buffers(i).DataAsNumpy() for i in range(flat.BuffersLength())]
    assert all((d.ctypes.data - begin) % 16 == 0 for d in data if isinstance(d, np.ndarray))
    predictor = LitertPredictor(content, Path("model.tflite"), SIZE, LABELS, 1, 0, "logits")
    patches = make_patches(1)
    np.testing.assert_allclose(predictor.predict(patches), torch_logits(network, patches), atol=1e-5)
    kinds = [operator["op_name"] for operator in predictor._interpreter._get_ops_details()]
    assert kinds.count("DELEGATE") == 1


@pytest.mark.slow
@needs("coreml")
def test_a_coreml_package_has_the_form_that_is_described() -> None:
    folder = mobile_export("coreml")
    tools = importlib.import_module("coremltools")
    spec = tools.models.MLModel(str(folder / MOBILE["coreml"]), skip_model_load=True).get_spec()
    (ct,), (logits,) = spec.description.input, spec.description.output
    assert (ct.name, list(ct.type.multiArrayType.shape)) == ("ct", [1, 1, *SIZE])
    assert logits.name == "logits" and json.loads(spec.description.metadata.userDefined["labels"]) == LABELS
    assert ct.type.multiArrayType.dataType == logits.type.multiArrayType.dataType == 65568  # float32
    assert verify_export(folder, 1).not_run == {"coreml": NOT_RUN_HERE}


@pytest.mark.slow
@pytest.mark.timeout(1200)  # LiteRT takes minutes for a SwinUNETR on a busy machine
@pytest.mark.parametrize("spec", [
    ResUnetSpec(num_outputs=3, patch_size=(32, 32, 32), channels=(4, 4, 8, 8, 8)),
    SwinUnetrSpec(num_outputs=3, patch_size=(32, 64, 32)),
], ids=["res_unet", "swin_unetr"])
@pytest.mark.parametrize("target", ALL)
def test_every_student_converts(target: str, spec: ResUnetSpec | SwinUnetrSpec, tmp_path: Path) -> None:
    """A residual U-Net has strides and kernels of its own, a SwinUNETR shifted windows; a file says what they say."""
    from autosam3d.models.build import build_network

    torch.manual_seed(0)
    size = spec.patch_size
    network = with_half_weights(build_network(spec))
    patch = np.random.default_rng(0).normal(size=(1, 1, *size)).astype(np.float32)
    expected = torch_logits(network, patch)
    if target == "coreml":
        from autosam3d.export.coreml_graph import write_coreml

        write_coreml(network, size, LABELS, tmp_path / MOBILE[target])
        assert (tmp_path / MOBILE[target] / "Manifest.json").is_file()
        return
    if target == "litert":
        from autosam3d.export.litert_graph import litert_model
        from autosam3d.inference.litert_runtime import LitertPredictor

        predictor: Any = LitertPredictor(litert_model(network, size, LABELS), tmp_path, size, LABELS, 1, 0, "logits")
    else:
        from autosam3d.export.executorch_graph import executorch_program
        from autosam3d.inference.executorch_runtime import ExecutorchPredictor

        content = executorch_program(network, size, LABELS)
        predictor = ExecutorchPredictor(content, tmp_path, size, LABELS, 1, 0, "logits")
    logits = predictor.predict(patch)
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


def test_errors_are_of_the_tree() -> None:
    with pytest.raises(AutoSam3dError, match="one of onnxruntime, openvino, openvino-int8, litert, executorch"):
        load_exported(mini_export(), "abacus", 1)


def test_what_is_muted_is_heard_again_afterwards(capfd: pytest.CaptureFixture[str]) -> None:
    import os
    import warnings

    print("before")
    with pytest.raises(ValueError), mute(), quiet("root"):
        os.write(1, b"native code\n")
        os.write(2, b"native code\n")
        warnings.warn("nothing", stacklevel=1)
        raise ValueError
    print("after")
    assert capfd.readouterr() == ("before\nafter\n", "")


def test_a_process_without_stdout_can_be_muted() -> None:
    import subprocess
    import sys

    code = ("import os, sys; os.close(1); sys.stdout = None\n"
            "from autosam3d.inference.quiet import mute\nwith mute(): pass\n")
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0
