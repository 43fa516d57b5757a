"""The long form of tests/inference/test_nothing_leaves.py: the commands, a service for 40 seconds, all libraries."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from exports import mini_export
from mini_run import mini_recipe, write_mini_dataset, write_recipe
from tracing import Traced, traced

_RUNTIMES = ("onnxruntime", "openvino")
_AUTOSAM3D = [sys.executable, "-m", "autosam3d"]
# What an extra of pyproject.toml brings and this package imports, beside the runtimes.
_LIBRARIES = ("fastapi", "highdicom", "huggingface_hub", "lightning_fabric", "monai.networks.nets", "nncf", "onnx",
              "onnxscript", "pydicom", "pynetdicom", "requests", "sklearn.manifold", "torch.utils.tensorboard",
              "transformers", "uvicorn")
_IMPORTS = """
import importlib, sys
from autosam3d.cli.home import settle_home
settle_home()
from autosam3d.studies.reproduce.drawing import house_style
for name in sys.argv[1:]:
    importlib.import_module(name)
with house_style():
    from matplotlib.figure import Figure
    Figure().add_subplot().set_title("fonts").figure.canvas.draw()
print("done")
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mini_dataset(tmp_path_factory.mktemp("data") / "mini")


def _demand_silence(done: Traced) -> None:
    assert (done.look_ups, done.outside, done.files) == ([], [], []), done.told


@pytest.mark.slow
@pytest.mark.parametrize("backend", _RUNTIMES)
def test_segment(backend: str, dataset: Path, tmp_path: Path) -> None:
    ct = min((dataset / "imagesTr").iterdir())
    done = traced([*_AUTOSAM3D, "segment", mini_export(), ct, "out.nii.gz", "--backend", backend, "--threads", "1"],
                  tmp_path / "run")
    assert done.code == 0, done.told
    _demand_silence(done)


@pytest.mark.slow
@pytest.mark.parametrize("backend", _RUNTIMES)
def test_a_service_that_lives_forty_seconds(backend: str, tmp_path: Path) -> None:
    done = traced([*_AUTOSAM3D, "serve", mini_export(), "--port", "0", "--backend", backend, "--threads", "1",
                   "--folder", tmp_path / "state"], tmp_path / "run", seconds=40)
    assert "autosam3d serves at" in done.told, done.told
    _demand_silence(done)


@pytest.mark.slow
def test_train_export_and_verify(dataset: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "mini.yaml", mini_recipe())
    commands = (["train", recipe, "--data", dataset, "--out", tmp_path / "run"],
                ["export", tmp_path / "run", tmp_path / "export"], ["verify", tmp_path / "export"])
    for command in commands:
        done = traced([*_AUTOSAM3D, *command, "--threads", "1"], tmp_path / f"traced_{command[0]}", seconds=600)
        assert done.code == 0, done.told
        _demand_silence(done)


@pytest.mark.slow
def test_every_optional_library(tmp_path: Path) -> None:
    done = traced([sys.executable, "-c", _IMPORTS, *_LIBRARIES], tmp_path / "run", seconds=300)
    assert "done" in done.told, done.told
    _demand_silence(done)
