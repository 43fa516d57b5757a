"""An export that takes seconds: a few convolutions on windows of 16 voxels, written by `export_model`."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autosam3d.checkpoints.checkpoint import LoadedModel
from autosam3d.checkpoints.model_file import meta_text, sealed
from autosam3d.io.files import sha256_of
from made_once import made_once
from mini_run import mini_recipe

PACKAGED = Path(__file__).resolve().parents[1] / "src/autosam3d/weights/openkbp_tiny"
SIZE = (16, 16, 16)
LABELS = ["background", "right_kidney", "left_kidney"]


class Convolutions(nn.Module):
    """Logits of three classes; its weights are float16 values, so that an export stores them without loss."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.spec = mini_recipe().model
        self.body = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Conv3d(8, 3, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_((parameter * 3).half())

    def forward(self, ct: Tensor) -> Tensor:
        return self.head(self.body(ct))


def loaded(network: nn.Module | None = None) -> LoadedModel:
    return LoadedModel(mini_recipe(), network or Convolutions(), torch.device("cpu"), "ab" * 32, {"val_dice": 0.5})


def torch_logits(network: nn.Module, patches: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return network(torch.from_numpy(patches)).numpy()


def make_patches(count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 1, *SIZE)).astype(np.float32)


@functools.cache
def mini_export(seed: int = 0) -> Path:
    """An export folder (read-only, please); another seed is another network."""
    from autosam3d.export.export import export_model

    return made_once(f"mini_export_{seed}", lambda folder: export_model(loaded(Convolutions(seed)), folder))


@functools.cache
def packaged_export() -> Path:
    """The packaged model, exported (read-only, please); AUTOSAM3D_WEB_EXPORT names a folder where that was done."""
    if ready := os.environ.get("AUTOSAM3D_WEB_EXPORT"):
        return Path(ready)
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package, reason="needs the extra export")
    from autosam3d.checkpoints.checkpoint import load_model
    from autosam3d.export.export import export_model

    return made_once("packaged_export", lambda folder: export_model(load_model(PACKAGED), folder))


def copied(folder: Path, export: Path | None = None) -> Path:
    """A copy of the export, or of another one, that a test may spoil."""
    return Path(shutil.copytree(export or mini_export(), folder / "export"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change model.json and make its own hash right again, as an attacker would."""
    meta = json.loads((folder / "model.json").read_text("utf-8"))
    change(meta)
    meta.pop("sha256")
    (folder / "model.json").write_text(meta_text(sealed(meta)), "utf-8")


def accept(folder: Path, *names: str) -> None:
    """Make model.json name the files as they are now."""

    def change(meta: dict[str, Any]) -> None:
        for name in names:
            entry = {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size}
            meta["files"][name] = entry
            if name == "model.onnx":
                meta["weights"] = {"file": name, **entry}

    edit(folder, change)
