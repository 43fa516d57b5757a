"""The teacher of a distillation: a trained model, asked crop by crop or once per scan with its answers kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autosam3d.checkpoints.checkpoint import LoadedModel, load_model
from autosam3d.data.cache import (
    NO_ENTRY,
    CachedCase,
    crc_of,
    crc_of_file,
    pick_centers,
    save_array,
    with_background,
    without_background,
)
from autosam3d.errors import CheckpointError, ResourceError
from autosam3d.geometry.patches import Tiling
from autosam3d.inference.pipeline import probabilities_prepared
from autosam3d.io.files import atomic_write, remove_stale_temporaries, write_text_atomic
from autosam3d.recipes.recipe import Recipe

log = logging.getLogger(__name__)

# Raise it when the probabilities of one teacher for one scan change in a way that its settings do not show.
_CACHE_VERSION = 1


@dataclass(frozen=True)
class Teacher:
    """A trained model on the device of the training."""

    model: LoadedModel

    @cached_property
    def origin(self) -> dict[str, Any]:
        """What a student's checkpoint says of its teacher."""
        return {"sha256": self.model.sha256, "recipe": self.model.recipe.name,
                "val_dice": self.model.metrics.get("val_dice")}

    @torch.no_grad()
    def probabilities(self, voxels: Tensor) -> Tensor:
        """Of crops [B, 1, D, H, W]: float32 [B, K, D, H, W], without gradient."""
        return torch.softmax(self.model.network(voxels).float(), dim=1)


def load_teacher(path: str | Path, student: Recipe, *, sam: str | Path | None, device: str | torch.device) -> Teacher:
    """The model at `path`, checked to teach what `student` is to learn.

    Raises:
        CheckpointError: the model is broken, or MISMATCH: it knows other organs or sees scans in another form.
    """
    model = load_model(path, sam=sam, device=device)
    teacher, where = model.recipe, str(path)
    if teacher.labels.organs != student.labels.organs:
        raise CheckpointError("MISMATCH", where, f"expected a teacher of {student.labels.num_outputs} classes, "
                              f"background, {', '.join(student.labels.organs)}; got one of "
                              f"{teacher.labels.num_outputs}, background, {', '.join(teacher.labels.organs)}",
                              "take a teacher that was trained on the same organs in the same order")
    if teacher.preprocess != student.preprocess:
        ours, theirs = (recipe.as_dict()["preprocess"] for recipe in (student, teacher))
        key = next(key for key in ours if ours[key] != theirs[key])
        raise CheckpointError("MISMATCH", where, f"expected a teacher with the student's preprocessing, got "
                              f"preprocess.{key} {theirs[key]} instead of {ours[key]}",
                              "give the student the preprocessing of its teacher")
    model.network.requires_grad_(False)
    return Teacher(model)


def cache_probabilities(
    cases: Sequence[CachedCase], teacher: Teacher, recipe: Recipe, cache_dir: Path,
    progress: Callable[[int, int], None] | None = None, watch: Callable[[int, int], None] | None = None,
) -> list[CachedCase]:
    """`cases` with the teacher's probabilities, from the cache where they are whole, made anew where they are not.

    They are uint8 in steps of 1/255, without background: an error of 0.002 at most. Whoever is killed in between goes
    on after the last whole case.

    Args:
        recipe: of the student.
        progress: called before each case, and at the end, with the cases done and their number.
        watch: called after each window of the teacher; may raise.

    Raises:
        ResourceError: the cache folder cannot be written.
    """
    done = []
    for index, case in enumerate(cases):
        if progress:
            progress(index, len(cases))
        name = _entry_name(teacher, recipe)
        folder = cache_dir / case.key
        probs = _open_entry(folder, name, case, recipe)
        if probs is None:
            _build_entry(folder, name, case, teacher, recipe, watch)
            probs = _open_entry(folder, name, case, recipe)
            if probs is None:
                raise ResourceError("CACHE", folder / f"{name}.npy", "a cache entry that was just written does not "
                                    "read back", "check the disk, or name another folder with --cache")
        done.append(_with_probs(case, probs, recipe))
    if progress:
        progress(len(cases), len(cases))
    return done


def open_probabilities(cases: Sequence[CachedCase], teacher: Teacher, recipe: Recipe, cache_dir: Path
                       ) -> list[CachedCase]:
    """As `cache_probabilities`, of entries that processes of this run have just made or checked.

    Raises:
        ResourceError: CACHE, one is not there.
    """
    name, opened = _entry_name(teacher, recipe), []
    for case in cases:
        try:
            opened.append(_with_probs(case, np.load(cache_dir / case.key / f"{name}.npy", mmap_mode="r"), recipe))
        except NO_ENTRY:
            raise ResourceError("CACHE", cache_dir / case.key, "expected the teacher's probabilities that another "
                                "process of this run has checked, got none", "let all processes of a machine see the "
                                "same --cache folder, and leave it alone while they train") from None
    return opened


def _with_probs(case: CachedCase, probs: np.ndarray, recipe: Recipe) -> CachedCase:
    assert recipe.distill is not None
    centers = case.centers
    if recipe.distill.label_weight == 0:
        # A student that learns from the teacher alone is not told by the labels where to look, either.
        centers = pick_centers(_labels_of(probs), np.random.default_rng(0))
    return replace(case, probs=probs, centers=centers)


def _labels_of(probs: np.ndarray) -> np.ndarray:
    return np.stack([with_background(probs[:, z]).argmax(0).astype(np.uint8) for z in range(probs.shape[1])])


def _entry_name(teacher: Teacher, recipe: Recipe) -> str:
    """Says which teacher and how it looked; scan and preprocessing are in the folder's name already."""
    assert recipe.distill is not None
    model = teacher.model
    parts = {"version": _CACHE_VERSION, "teacher": model.sha256, "recipe": model.recipe.digest("model", "preprocess"),
             "overlap": recipe.distill.teacher_overlap, "importance": model.recipe.inference.importance}
    return f"teacher-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]}"


def _open_entry(folder: Path, name: str, case: CachedCase, recipe: Recipe) -> np.ndarray | None:
    """The probabilities, or None where they are absent, cut or altered."""
    info, array = folder / f"{name}.json", folder / f"{name}.npy"
    if not info.exists():
        return None
    try:
        content: Mapping[str, Any] = json.loads(info.read_text("utf-8"))
        if content["crc"] == crc_of(content["entry"]) and content["entry"]["crc"] == crc_of_file(array):
            probs = np.load(array, mmap_mode="r")
            if probs.dtype == np.uint8 and probs.shape == (len(recipe.labels.organs), *case.labels.shape):
                return probs
    except NO_ENTRY:
        pass
    log.warning("the teacher's probabilities of %s are damaged, making them again", case.name)
    return None


def _build_entry(
    folder: Path, name: str, case: CachedCase, teacher: Teacher, recipe: Recipe,
    watch: Callable[[int, int], None] | None,
) -> None:
    """Have the teacher look at a whole case. What makes the entry count, the JSON, is written last."""
    assert recipe.distill is not None
    model = teacher.model
    tiling = Tiling(overlap=recipe.distill.teacher_overlap, importance=model.recipe.inference.importance)
    probs = np.empty((len(recipe.labels.organs), *case.labels.shape), np.uint8)
    z = 0
    for slab in probabilities_prepared(case.voxels.astype(np.float32), model.predictor, tiling,
                                       air=recipe.preprocess.air, progress=watch):
        probs[:, z : z + slab.shape[1]] = without_background(slab)
        z += slab.shape[1]
    remove_stale_temporaries(folder)
    path = folder / f"{name}.npy"
    atomic_write(path, lambda staged: save_array(staged, probs), size_bytes=probs.nbytes)
    entry = {"teacher_sha256": model.sha256, "crc": crc_of_file(path)}
    write_text_atomic(folder / f"{name}.json", json.dumps({"entry": entry, "crc": crc_of(entry)}))
