"""What foreign models may not do: take more memory than was allowed, or time that nobody was told of."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from autosam3d.checkpoints.exported import load_exported
from autosam3d.checkpoints.model_file import read_meta, recipe_of
from autosam3d.checkpoints.weight_sizes import network_bytes
from autosam3d.errors import CheckpointError, ResourceError
from autosam3d.geometry.patches import Tiling
from autosam3d.inference.duration import Duration, duration_text
from autosam3d.inference.onnx_runtime import OnnxPredictor
from autosam3d.io import write_ct
from autosam3d.models.parameters import count_parameters
from autosam3d.models.spec import AutoSamSpec
from autosam3d.recipes.recipe import load_recipe
from autosam3d.scans import open_model as open_model_module
from autosam3d.volume import Volume
from command_line import write_model
from exports import LABELS, SIZE, accept, copied, edit, mini_export
from mini_run import affine_of, blobs, environment


def write_hungry(folder: Path, gib: float) -> None:
    """An export whose graph lays its input out over and over, before it takes the largest: `gib` in one tensor."""
    model = onnx.load(folder / "model.onnx")
    graph = model.graph
    times = int(gib * (1 << 30) / 4 / np.prod(SIZE))
    graph.initializer.extend([numpy_helper.from_array(np.array([1, times, 1, 1, 1], np.int64), "times"),
                              numpy_helper.from_array(np.array([1], np.int64), "axes")])
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = "same_ct" if name == "ct" else name
    before = [helper.make_node("Tile", ["ct", "times"], ["large"]),
              helper.make_node("ReduceMax", ["large", "axes"], ["same_ct"], keepdims=1)]
    nodes = [*before, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, folder / "model.onnx")
    accept(folder, "model.onnx")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux counts a process's memory")
def test_a_graph_that_nobody_foresaw_ends_at_the_limit(tmp_path: Path) -> None:
    write_hungry(copied(tmp_path), 3.3)
    write_ct(tmp_path / "ct.nii.gz", Volume(blobs(0)[0], affine_of()))
    code = (
        "import sys\nfrom autosam3d.cli.main import main\nfrom autosam3d.io.memory import peak_bytes\n"
        "try: main()\nexcept SystemExit as leave: code = leave.code\n"
        "print(peak_bytes()); sys.exit(code)\n"
    )
    command = [sys.executable, "-c", code, "segment", tmp_path / "export", tmp_path / "ct.nii.gz",
               tmp_path / "out.nii.gz", "--backend", "onnxruntime", "--threads", "1", "--max-ram", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(), check=False)
    assert done.returncode == 5 and "error[MEMORY]" in done.stderr, done.stderr
    assert int(done.stdout.split()[-1]) < 1 << 30
    assert not (tmp_path / "out.nii.gz").exists()


def test_a_graph_that_the_runtime_cannot_run_is_a_bad_model(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    write_hungry(folder, 0.01)
    predictor = OnnxPredictor((folder / "model.onnx").read_bytes(), folder / "model.onnx", SIZE, LABELS, 1)
    assert predictor.predict(np.zeros((1, 1, *SIZE), np.float32)).shape == (1, 3, *SIZE)

    class Broken:
        words = ""

        def io_binding(self) -> Any:
            return self

        def bind_input(self, *_: object) -> None: ...

        bind_output = bind_input

        def run_with_iobinding(self, _: object) -> None:
            raise RuntimeError(self.words)

    for words, code in (("Tile output tensor would require more than 4294967296 bytes", "CORRUPT"),
                        ("Failed to allocate memory for requested buffer", "MEMORY")):
        predictor._session = broken = Broken()
        broken.words = words
        with pytest.raises((CheckpointError, ResourceError)) as caught:
            predictor.predict(np.zeros((1, 1, *SIZE), np.float32))
        assert caught.value.code == code and words in caught.value.fault


def test_a_limit_loads_no_torch_for_a_kept_export(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    kept = tmp_path / "cache/autosam3d/exports"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        kept = open_model_module._export_folder(folder / "best.json")
    shutil.copytree(mini_export(), kept)
    edit(kept, lambda meta: meta.update(trained_weights_sha256=read_meta(folder / "best.json")["weights"]["sha256"]))
    write_ct(tmp_path / "ct.nii.gz", Volume(blobs(0)[0], affine_of()))
    code = (
        "import sys\nfrom autosam3d.cli.main import main\n"
        "try: main()\nexcept SystemExit as leave: code = leave.code\n"
        "sys.exit('loaded torch' if 'torch' in sys.modules else code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "segment", folder, tmp_path / "ct.nii.gz", tmp_path / "out.nii.gz", "--backend",
         "onnxruntime", "--max-ram", "0.35"], capture_output=True, text=True, timeout=120, check=False,
        env=environment(XDG_CACHE_HOME=str(tmp_path / "cache")))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.nii.gz").exists()


def test_weights_are_counted_from_the_header(tmp_path: Path) -> None:
    for name, model in (("autosam", None), ("student", {"network": "res_unet", "num_outputs": 3,
                                                        "patch_size": [32, 32, 32]})):
        json_path = write_model(tmp_path / name, model=model) / "best.json"
        meta = read_meta(json_path)
        recipe = recipe_of(meta, json_path)
        assert network_bytes(json_path, meta, recipe) == 4 * count_parameters(recipe.model).total
        assert network_bytes(tmp_path / "gone.json", meta, recipe) == meta["weights"]["bytes"]


@pytest.mark.parametrize("vit", ["vit_b", "vit_l", "vit_h"])
def test_frozen_weights_of_sam_are_counted_too(vit: str, tmp_path: Path) -> None:
    spec = AutoSamSpec(num_outputs=16, vit=vit)
    recipe = replace(load_recipe("amos_ct"), model=spec)
    meta = {"weights": {}, "sam": {}, "contains": "tuned"}
    assert network_bytes(tmp_path / "none.json", meta, recipe) == 0  # it was trained from scratch
    counted = network_bytes(tmp_path / "none.json", meta | {"sam": {"sha256": "0"}}, recipe)
    assert counted == pytest.approx(4 * count_parameters(spec).frozen, rel=0.06)


@pytest.mark.parametrize("overlap", [0.91, 0.99])
def test_a_foreign_model_overlaps_at_most_nine_tenths(overlap: float, tmp_path: Path) -> None:
    folder = copied(tmp_path)
    edit(folder, lambda meta: meta["recipe"]["inference"].update(overlap=overlap))
    with pytest.raises(CheckpointError, match=r"inference\.overlap: expected 0 to 0\.9, got") as caught:
        load_exported(folder, "onnxruntime", 1)
    assert caught.value.code == "MISMATCH"
    with pytest.raises(ValueError, match=r"expected 0 to 0\.9"):
        Tiling(overlap=overlap)
    assert Tiling(overlap=0.9).overlap == 0.9


def test_long_work_is_told_before_it_is_done(caplog: pytest.LogCaptureFixture) -> None:
    for num_windows, level in ((1000, logging.WARNING), (100, logging.INFO)):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            duration = Duration("scan", num_windows)
            for seconds in (30.0, 2.0, 2.0):  # the first call prepares things
                duration.add(1, seconds)
        (record,) = caplog.records
        assert record.levelno == level
        minutes = "33 minutes" if num_windows == 1000 else "3.3 minutes"
        assert f"{num_windows - 2} more windows of 2 s each, which takes about {minutes}" in record.message
    assert [duration_text(s) for s in (5, 300, 5000, 50_000, 1e6)] == [
        "about 5 seconds", "about 5 minutes", "about 83 minutes", "about 14 hours", "about 12 days"]


