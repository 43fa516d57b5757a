"""A training run that takes a second: two blobs in 24-voxel scans and a tiny ViT."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from autosam3d.data.cache import CachedCase
from autosam3d.data.centers import count_organs
from autosam3d.data.folder import write_index
from autosam3d.io import write_ct, write_segmentation
from autosam3d.io.files import sha256_of
from autosam3d.labels import LabelMap
from autosam3d.models.autosam.sam_weights import _expected_shapes
from autosam3d.models.spec import VITS
from autosam3d.recipes.recipe import Recipe, dump_recipe, recipe_from_dict
from autosam3d.volume import Segmentation, Volume

LABELS = LabelMap(organs=("right_kidney", "left_kidney"), side_pairs=(("right_kidney", "left_kidney"),))
SHAPE = (24, 26, 28)
SPACING_MM = (3.0, 2.0, 2.0)
TRAIN, VAL = ("c0", "c1", "c2", "c3"), ("c4", "c5")

_RECIPE: dict[str, Any] = {
    "name": "mini",
    "about": "two blobs",
    "labels": {"organs": list(LABELS.organs), "side_pairs": [list(p) for p in LABELS.side_pairs]},
    "dataset": {"title": "blobs", "url": "", "layout": "what write_mini_dataset writes"},
    "preprocess": {"spacing_mm": None, "hu_window": {"low_hu": -160.0, "high_hu": 240.0}, "subtract_hu": 40.0,
                   "divide_hu": 100.0, "crop_to_body": False},
    "model": {"vit": "vit_tiny", "patch_size": [16, 16, 16], "scale": [2, 2, 2], "attn_window": [4, 4, 4],
              "adapter_dim": 8, "neck_dim": 8, "prompt_dim": 2, "head_dim": 8, "fuse_stride": 2},
    "sampling": {"patches_per_volume": 1, "foreground_share": 0.7},
    "augment": {"flip_prob": 0.3, "rotate90_prob": 0.3, "scale_prob": 0.3, "shift_prob": 0.3, "affine_prob": 0.3},
    "optim": {"lr": 2e-3, "warmup_epochs": 1},
    "train": {"epochs": 3, "batch_size": 2, "precision": "fp32", "validate_every": 2, "save_every_steps": 1,
              "val_overlap": 0.0},
    "inference": {"overlap": 0.25},
}


def mini_recipe(**changes: Any) -> Recipe:
    """The recipe with `changes`, whose keys have ``__`` for a dot: ``train__epochs=2``. One epoch has no warm-up."""
    tree = json.loads(json.dumps(_RECIPE))
    if changes.get("train__epochs") == 1:
        tree["optim"]["warmup_epochs"] = 0
    for key, value in changes.items():
        *sections, last = key.split("__")
        node = tree
        for section in sections:
            node = node[section]
        node[last] = value
    return recipe_from_dict(tree)


def write_recipe(path: Path, recipe: Recipe) -> Path:
    tree = dump_recipe(recipe)
    path.write_text(tree, "utf-8")
    return path


def blobs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """HU and labels [z, y, x]: a body of soft tissue with a bright ball on each side, the right one brighter."""
    random = np.random.default_rng(seed)
    z, y, x = np.indices(SHAPE)
    hu = np.full(SHAPE, -1000.0, np.float32)
    labels = np.zeros(SHAPE, np.uint8)
    hu[((y - 12.5) / 11) ** 2 + ((x - 13.5) / 13) ** 2 < 1] = 0
    for index, (side, value) in enumerate(((20, 220), (7, 120)), start=1):
        center = np.array([12, 13, side]) + random.uniform(-2, 2, 3)
        ball = (z - center[0]) ** 2 + (y - center[1]) ** 2 + (x - center[2]) ** 2 < 5.5**2
        hu[ball], labels[ball] = value, index
    return hu + random.normal(0, 8, SHAPE).astype(np.float32), labels


def case_in_memory(shape: tuple[int, int, int] = SHAPE, organs: dict[int, int] | None = None,
                   seed: int = 0) -> CachedCase:
    """Voxels that are their own flat index; `organs` gives the number of voxels of each label."""
    voxels = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    labels = np.zeros(shape, np.uint8)
    places = np.random.default_rng(seed).permutation(labels.size)
    for label, count in (organs or {}).items():
        labels.flat[places[:count]], places = label, places[count:]
    counts = count_organs(labels.__getitem__, len(labels), len(LABELS.organs))
    return CachedCase("memory", voxels, labels, counts, (3.0, 2.0, 2.0), "key")


def affine_of(spacing_mm: Sequence[float] = SPACING_MM) -> np.ndarray:
    affine = np.diag([*spacing_mm[::-1], 1.0])
    affine[:3, 3] = -20
    return affine


def write_mini_dataset(folder: Path) -> Path:
    """An nnU-Net v2 folder with 4 training and 2 validation cases."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for seed, name in enumerate((*TRAIN, *VAL)):
        hu, labels = blobs(seed)
        write_ct(folder / "imagesTr" / f"{name}_0000.nii.gz", Volume(hu, affine_of()))
        write_segmentation(folder / "labelsTr" / f"{name}.nii.gz", Segmentation(labels, affine_of()), LABELS)
    write_index(folder, LABELS, TRAIN, VAL, "blobs")
    return folder


def write_sam(path: Path, seed: int = 0) -> Path:
    """A file of random weights that is a SAM of the size vit_tiny."""
    generator = torch.Generator().manual_seed(seed)
    save_file({
        f"image_encoder.{name}": torch.randn(shape, generator=generator) * 0.02
        for name, shape in _expected_shapes(VITS["vit_tiny"]).items()
    }, path)
    return path


def weights_of(run: Path, name: str) -> str:
    """SHA-256 of the weight file of ``NAME.json`` in a run folder, taken from the file itself."""
    return sha256_of(run / json.loads((run / f"{name}.json").read_text())["weights"]["file"])


def log_rows(run: Path) -> list[list[str]]:
    """log.csv without the columns that a clock filled."""
    rows = [line.split(",") for line in (run / "log.csv").read_text().splitlines()]
    kept = [i for i, name in enumerate(rows[0] if rows else []) if name not in ("seconds", "data_wait")]
    return [[row[i] for i in kept] for row in rows]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "COLUMNS": "300"} | more
