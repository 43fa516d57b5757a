"""An export on the command line: the same labels as the checkpoint, without torch, and refused when it is broken."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import autosam3d.export.export as export_module
import autosam3d.scans.backend as backend_module
from autosam3d.checkpoints import model_file
from autosam3d.checkpoints.checkpoint import LoadedModel
from autosam3d.checkpoints.exported import FILES_OF, ExportedModel, load_exported
from autosam3d.checkpoints.probe import Cost
from autosam3d.errors import AutoSam3dError, CheckpointError, MissingExtraError, UsageError
from autosam3d.export import packages
from autosam3d.export.export import Exported
from autosam3d.inference.pipeline import segment
from autosam3d.io import read_segmentation, write_ct
from autosam3d.scans import open_model as model_choice
from autosam3d.scans.open_model import ModelWish, open_model
from autosam3d.volume import Volume
from command_line import run, write_model
from exports import LABELS, accept, copied, edit, loaded, mini_export
from mini_run import affine_of, blobs, environment
from on_disk import demand_as_told


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    write_ct(tmp_path / "ct.nii.gz", Volume(blobs(0)[0], affine_of()))
    return tmp_path / "ct.nii.gz"


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_export_gives_the_labels_of_its_network(backend: str) -> None:
    volume = Volume(blobs(0)[0], affine_of())
    expected = segment(volume, loaded())
    model = load_exported(mini_export(), backend, 1)
    result = segment(volume, model, max_ram_bytes=4 << 30)
    assert len(np.unique(expected.labels)) > 1
    np.testing.assert_array_equal(result.labels, expected.labels)
    assert model.sha256 == loaded().sha256 and model.runtime.split()[0] == model.backend == backend


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_segment_with_an_export_imports_no_torch(tmp_path: Path, scan: Path, backend: str) -> None:
    code = (
        "import sys\n"
        "from autosam3d.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as leave: code = leave.code\n"
        "heavy = {'torch', 'lightning_fabric', 'onnx', 'tensorboard', 'monai'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)\n"
    )
    command = [sys.executable, "-c", code, "segment", mini_export(), scan, tmp_path / "out.nii.gz"]
    done = subprocess.run([*command, "--backend", backend, "--max-ram", "4"], capture_output=True, text=True,
                          timeout=120, env=environment())
    assert done.returncode == 0, done.stderr
    assert read_segmentation(tmp_path / "out.nii.gz").labels.shape == blobs(0)[0].shape


def test_verify_and_info_tell_what_an_export_is(tmp_path: Path) -> None:
    out = run("verify", mini_export(), "--threads", 1).demand_ok().out
    assert out.startswith("6 files are what they were") and "onnxruntime" in out and "openvino" in out
    assert "export of autosam3d" in run("info", mini_export()).demand_ok().out
    broken = copied(tmp_path)
    edit(broken, lambda meta: meta["files"].pop("golden.npz"))
    run("verify", broken).demand_error("CORRUPT", 4)


# ------------------------------------------------------------------------------------------------ refused


def flip(folder: Path) -> None:
    content = bytearray((folder / "model.onnx").read_bytes())
    content[-200] ^= 1
    (folder / "model.onnx").write_bytes(content)


def cut(folder: Path) -> None:
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:1000])


def cut_and_signed(folder: Path) -> None:
    cut(folder)
    accept(folder, "model.onnx")


def linked(folder: Path) -> None:
    (folder / "model.onnx").rename(folder / "elsewhere")
    (folder / "model.onnx").symlink_to(folder / "elsewhere")


def external(folder: Path) -> None:
    graph = onnx.load(folder / "model.onnx")
    graph.graph.initializer[0].data_location = TensorProto.EXTERNAL
    graph.graph.initializer[0].external_data.add(key="location", value="../../../etc/passwd")
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    accept(folder, "model.onnx")


def more_organs(folder: Path) -> None:
    def change(meta: dict[str, Any]) -> None:
        meta["recipe"]["labels"]["organs"].append("spleen")
        meta["recipe"]["model"]["num_outputs"] = 4

    edit(folder, change)


@pytest.mark.parametrize("damage, code", [
    (flip, "HASH"), (cut, "CORRUPT"), (cut_and_signed, "CORRUPT"), (linked, "MODEL_PATH"), (external, "UNSAFE"),
    (more_organs, "MISMATCH"), (lambda folder: (folder / "model.onnx").unlink(), "CORRUPT"),
    (lambda folder: edit(folder, lambda meta: meta["weights"].update(file="/etc/passwd")), "CORRUPT"),
    (lambda folder: edit(folder, lambda meta: meta.update(files=[])), "CORRUPT"),
    (lambda folder: edit(folder, lambda meta: meta.update(kind="surprise")), "MODEL_PATH"),
    (lambda folder: (folder / "model.json").write_text("{}"), "CORRUPT"),
], ids=["flip", "cut", "signed", "link", "external", "organs", "gone", "path", "files", "kind", "json"])
def test_a_broken_export_is_refused(tmp_path: Path, scan: Path, damage: Callable[[Path], Any], code: str) -> None:
    folder = copied(tmp_path)
    damage(folder)
    line = run("segment", folder, scan, tmp_path / "out.nii.gz", "--backend", "onnxruntime").demand_error(code, 4)
    assert not (tmp_path / "out.nii.gz").exists()
    if code == "MISMATCH":
        assert "background, right_kidney, left_kidney, spleen; got one of 3, background, right_kidney, left" in line


def test_memory_in_the_json_is_not_trusted(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    edit(folder, lambda meta: meta.update(memory={"onnxruntime": "much", "openvino": -5}))
    assert load_exported(folder, "onnxruntime", 1).predictor.activation_bytes(1) == 0
    assert load_exported(folder, "openvino", 1).predictor.activation_bytes(1) == 0


def test_a_missing_runtime_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for backend in ("onnxruntime", "openvino"):
        with pytest.raises(MissingExtraError) as caught:
            load_exported(mini_export(), backend, 1)
        assert caught.value.remedy == 'pip install "autosam3d[fast]"' and caught.value.where == backend


# ------------------------------------------------------------------------------------------------ which model


def test_what_cannot_be_run_where_it_was_wished(tmp_path: Path) -> None:
    for wish, code in ((ModelWish(backend="torch"), "BACKEND"), (ModelWish(backend="abacus"), "BACKEND"),
                       (ModelWish(backend="openvino", device="cuda"), "DEVICE")):
        with pytest.raises(UsageError) as caught:
            open_model(mini_export(), wish)
        assert caught.value.code == code
    from autosam3d.checkpoints.checkpoint import load_model

    with pytest.raises(CheckpointError, match="got an export"):
        load_model(mini_export())
    write_model(tmp_path)
    with pytest.raises(CheckpointError, match="expected an exported model"):
        load_exported(tmp_path, "openvino", 1)


def test_without_a_model_the_packages_own_is_taken(
    tmp_path: Path, scan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_file, "PACKAGED", tmp_path / "none")
    with pytest.raises(AutoSam3dError, match="no model was named, and this installation carries none") as caught:
        open_model(None, ModelWish())
    assert caught.value.exit_code == 4
    monkeypatch.setattr(model_file, "PACKAGED", mini_export())
    assert open_model(None, ModelWish(backend="openvino")).sha256 == loaded().sha256
    line = run("segment", mini_export(), scan).demand_error("USAGE", 2)
    assert "expected INPUT and OUTPUT after the model" in line
    run("segment", scan).demand_error("USAGE", 2)
    run("segment", *[scan] * 4).demand_error("USAGE", 2)


STUDENT = {"network": "res_unet", "patch_size": [32, 32, 32], "channels": [2, 2, 2, 2, 2]}


def test_a_students_checkpoint_runs_exported_where_nothing_else_was_wished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_model(tmp_path / "student", model=STUDENT)
    teacher = write_model(tmp_path / "teacher")
    made: list[Path] = []
    ready = mini_export()

    def export(model: LoadedModel, folder: Path, **options: Any) -> Exported:
        made.append(folder)
        shutil.copytree(ready, folder)
        edit(folder, lambda meta: meta.update(trained_weights_sha256=model.sha256))
        return Exported(folder, {}, [], {}, [])

    def unlike(*args: Any, **options: Any) -> None:
        raise CheckpointError("PARITY", folder, "the labels differ", "report it")

    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("the exporter fails\nfor a long reason")

    monkeypatch.setattr(export_module, "export_model", broken)
    assert isinstance(open_model(folder, ModelWish()), LoadedModel)
    assert "(RuntimeError: the exporter fails); PyTorch runs it" in caplog.text
    monkeypatch.setattr(export_module, "export_model", unlike)
    for times in (1, 1):  # a refusal is remembered
        assert isinstance(open_model(folder, ModelWish()), LoadedModel)
        assert caplog.text.count("(the labels differ); PyTorch runs it") == times
    demand_as_told("The user's cache", tmp_path / "cache/autosam3d", "exports/HASH-VERSION.refused")
    (refused,) = (tmp_path / "cache").rglob("*.refused")
    refused.unlink()
    monkeypatch.setattr(export_module, "export_model", export)
    for wish in (ModelWish(backend="torch"), ModelWish(max_ram_bytes=8 << 30)):
        assert isinstance(open_model(folder, wish), LoadedModel) and not made
    assert isinstance(open_model(teacher, ModelWish()), LoadedModel) and not made
    with monkeypatch.context() as patch:
        patch.setattr(packages, "missing_packages", lambda: ["onnxscript"])
        assert isinstance(open_model(folder, ModelWish()), LoadedModel) and not made
    for _ in range(2):
        assert isinstance(open_model(folder, ModelWish(device="cpu")), ExportedModel) and len(made) == 1
    # What is kept is used without what made it, but not where a GPU would be taken.
    with monkeypatch.context() as patch:
        patch.setattr(packages, "missing_packages", lambda: ["onnxscript"])
        assert isinstance(open_model(folder, ModelWish()), ExportedModel)
        patch.setattr(model_choice, "_has_gpu", lambda: True)
        assert isinstance(open_model(folder, ModelWish()), LoadedModel)
    assert open_model(folder, ModelWish()).sha256 == open_model(folder, ModelWish(backend="torch")).sha256
    demand_as_told("The user's cache", tmp_path / "cache/autosam3d", "exports/HASH-VERSION/**", "backend-HASH.json")


@pytest.mark.parametrize("damage", [
    flip, cut, lambda place: (place / "model.json").write_text("{broken"),
    lambda place: (place / "model.json").unlink(), lambda place: (shutil.rmtree(place), place.write_text("a file")),
    lambda place: (place / "model.json").write_text(""),
], ids=["flip", "cut", "json", "no json", "file", "empty"])
def test_a_damaged_cache_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], Any]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(backend_module, "measure_cost", lambda *_: Cost(1.0, 0))  # which runtime is faster: no matter
    folder, ready, made = write_model(tmp_path / "student", model=STUDENT), mini_export(), []

    def export(model: LoadedModel, folder: Path, **options: Any) -> Exported:
        made.append(folder)
        assert not folder.exists()
        shutil.copytree(ready, folder)
        edit(folder, lambda meta: meta.update(trained_weights_sha256=model.sha256))
        return Exported(folder, {}, [], {}, [])

    monkeypatch.setattr(export_module, "export_model", export)
    open_model(folder, ModelWish(device="cpu"))
    damage(made[0])
    for _ in range(2):
        assert isinstance(open_model(folder, ModelWish(device="cpu")), ExportedModel) and len(made) == 2


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_only_the_files_that_run_are_hashed_and_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """The package's model from the user's cache: what the other backend would read is neither hashed nor read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(model_file, "PACKAGED", write_model(tmp_path / "student", model=STUDENT))
    (model_file.PACKAGED / "best.json").rename(model_file.PACKAGED / "model.json")

    def export(model: LoadedModel, folder: Path, **options: Any) -> Exported:
        shutil.copytree(mini_export(), folder)
        edit(folder, lambda meta: meta.update(trained_weights_sha256=model.sha256))
        return Exported(folder, {}, [], {}, [])

    monkeypatch.setattr(export_module, "export_model", export)
    open_model(None, ModelWish(backend=backend))
    (folder,) = (p.parent for p in (tmp_path / "cache").rglob("model.onnx"))
    other = {"onnxruntime": "openvino.bin", "openvino": "model.onnx"}[backend]
    content = bytearray((folder / other).read_bytes())
    content[-200] ^= 1
    (folder / other).write_bytes(content)
    hashed: list[int] = []
    sha256, file_digest = hashlib.sha256, hashlib.file_digest

    def counted(content: bytes = b"", **options: Any) -> Any:
        hashed.append(len(content))
        return sha256(content, **options)

    def counted_file(file: Any, kind: Any, **options: Any) -> Any:
        hashed.append(os.fstat(file.fileno()).st_size)
        return file_digest(file, kind, **options)

    monkeypatch.setattr(hashlib, "sha256", counted)
    monkeypatch.setattr(hashlib, "file_digest", counted_file)
    model = open_model(None, ModelWish(backend=backend))
    monkeypatch.undo()
    assert isinstance(model, ExportedModel) and model.backend == backend
    sizes = [(folder / name).stat().st_size for name in FILES_OF[backend]]
    jsons = 4 * max((folder / "model.json").stat().st_size, 4096)  # models' JSONs are hashed by their content
    assert sum(sizes) <= sum(hashed) <= sum(sizes) + jsons
    assert [hashed.count(size) for size in sizes] == [1] * len(sizes)


@pytest.mark.slow
def test_a_checkpoint_is_packed_exported_and_run_by_another_runtime(tmp_path: Path, scan: Path) -> None:
    """An AutoSAM, from the run folder to OpenVINO: in float16, so that its export loses nothing."""
    write_model(tmp_path)
    run("pack", tmp_path, tmp_path / "packed", "--half").demand_ok()
    packed, whole = ((tmp_path / name).stat().st_size for name in (
        next(p.relative_to(tmp_path) for p in tmp_path.glob("packed/*.safetensors")),
        next(p.name for p in tmp_path.glob("*.safetensors")),
    ))
    assert 0.5 <= packed / whole < 0.55
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    run("segment", tmp_path / "packed", scan, tmp_path / "torch.nii.gz").demand_ok()
    for name, lines in (("first", 1), ("second", 0)):
        done = run("segment", tmp_path / "packed", scan, tmp_path / f"{name}.nii.gz", "--backend", "openvino",
                   env=cache, seconds=250).demand_ok()
        assert len([line for line in done.warnings if "exporting it once" in line]) == lines
        result = read_segmentation(tmp_path / f"{name}.nii.gz").labels
        expected = read_segmentation(tmp_path / "torch.nii.gz").labels
        assert np.mean(result == expected) > 0.9998
    assert LABELS[1:] == list(read_segmentation(tmp_path / "first.nii.gz").organs.values())


def test_an_exported_model_is_one_readable_line() -> None:
    model = load_exported(mini_export(), "onnxruntime", threads=1)
    assert re.fullmatch(r"ExportedModel\(recipe mini, autosam on onnxruntime [\d.]+, "
                        r"2 organs: right_kidney, left_kidney\)", repr(model))
