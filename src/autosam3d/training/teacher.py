"""The teacher of a distillation: a trained model, asked crop by crop or once per scan with its answers kept on disk."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autosam3d.checkpoints.checkpoint import LoadedModel, load_model
from autosam3d.data.cache import CachedCase, labels_of, labels_of_interest, without_background
from autosam3d.data.centers import COUNTS_DTYPE, count_organs
from autosam3d.data.entries import Entry, StoredArray, open_entry, open_or_build
from autosam3d.errors import CheckpointError, UsageError
from autosam3d.geometry.patches import Tiling
from autosam3d.inference.pipeline import probabilities_prepared
from autosam3d.recipes.recipe import Recipe

# Raise it when the probabilities of one teacher for one scan change in a way that its settings do not show.
_CACHE_VERSION = 3


@dataclass(frozen=True)
class _Answer:
    """What a teacher said of a case: its probabilities, and `organ_voxels` of where it is worth to look."""

    probs: StoredArray
    organ_voxels: np.ndarray
    agreement: float | None
    """Mean Dice of its voters with one another, over the organs that any of them sees; None of a single voter."""


@dataclass(frozen=True)
class Teacher:
    """Trained models on the device of the training; what several say is the mean of their probabilities."""

    models: tuple[LoadedModel, ...]

    @cached_property
    def origin(self) -> dict[str, Any]:
        """What a student's checkpoint says of its teacher."""
        members = [{"sha256": model.sha256, "recipe": model.recipe.name, "val_dice": model.metrics.get("val_dice")}
                   for model in self.models]
        if len(members) == 1:
            return members[0]
        digest = hashlib.sha256("".join(sorted(model.sha256 for model in self.models)).encode()).hexdigest()
        return {"sha256": digest, "recipe": " and ".join(m["recipe"] for m in members), "val_dice": None,
                "members": members}

    @torch.no_grad()
    def probabilities(self, voxels: Tensor) -> Tensor:
        """Of crops [B, 1, D, H, W]: float32 [B, K, D, H, W], without gradient.

        Raises:
            CheckpointError: CROP, a network takes no crops of this size.
        """
        said = [torch.softmax(_logits(model, voxels).float(), dim=1) for model in self.models]
        return said[0] if len(said) == 1 else torch.stack(said).mean(0)


def _logits(model: LoadedModel, voxels: Tensor) -> Tensor:
    try:
        return model.network(voxels)
    except (ValueError, RuntimeError) as error:
        own, size = model.recipe.model.patch_size, tuple(voxels.shape[2:])
        if isinstance(error, torch.OutOfMemoryError) or size == tuple(own):
            raise
        raise CheckpointError("CROP", model.recipe.name, f"expected crops of {own} voxels as the teacher was trained "
                              f"on, got the student's of {size}", "say --set distill.teacher_probs=cache, or give the "
                              "student the teacher's crop") from error


def load_teacher(
    paths: str | Path | Sequence[str | Path], student: Recipe, *, sam: str | Path | None, device: str | torch.device
) -> Teacher:
    """The model or models at `paths`, each checked to teach what `student` is to learn.

    Args:
        sam: SAM file of those that need one, where it lies elsewhere than in their training.

    Raises:
        CheckpointError: a model is broken, or MISMATCH: it knows other organs or sees scans in another form.
        UsageError: SAME_TEACHER, one is named twice.
    """
    several = [paths] if isinstance(paths, (str, Path)) else paths
    models = tuple(_load_member(path, student, sam, device) for path in several)
    if len({model.sha256 for model in models}) < len(models):
        raise UsageError("SAME_TEACHER", several[-1], "expected different teachers, got one of them twice",
                         "name each once")
    return Teacher(models)


def _load_member(path: str | Path, student: Recipe, sam: str | Path | None, device: str | torch.device) -> LoadedModel:
    model = load_model(path, sam=sam, device=device)
    teacher, where = model.recipe, str(path)
    if teacher.labels.organs != student.labels.organs:
        raise CheckpointError("MISMATCH", where, f"expected a teacher of {student.labels.num_outputs} classes, "
                              f"background, {', '.join(student.labels.organs)}; got one of "
                              f"{teacher.labels.num_outputs}, background, {', '.join(teacher.labels.organs)}",
                              "take a teacher that was trained on the same organs in the same order")
    if teacher.reading.intensity != student.reading.intensity:
        raise CheckpointError("MISMATCH", where, f"expected a teacher with the student's reading.intensity "
                              f"{student.reading.intensity}, got one with {teacher.reading.intensity}",
                              "take a teacher that was trained on scans of the same scale")
    if teacher.preprocess != student.preprocess:
        ours, theirs = (recipe.as_dict()["preprocess"] for recipe in (student, teacher))
        key = next(key for key in ours if ours[key] != theirs[key])
        raise CheckpointError("MISMATCH", where, f"expected a teacher with the student's preprocessing, got "
                              f"preprocess.{key} {theirs[key]} instead of {ours[key]}",
                              "give the student the preprocessing of its teacher")
    model.network.requires_grad_(False)
    return model


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
        entry = _entry(case, teacher, recipe, cache_dir)
        build = partial(_build, entry, case, teacher, recipe, watch)
        answer = open_or_build(entry, partial(_read, case, recipe), build,
                               f"the teacher's probabilities of {case.name}")
        done.append(_with_probs(case, answer, recipe))
    if progress:
        progress(len(cases), len(cases))
    return done


def open_probabilities(cases: Sequence[CachedCase], teacher: Teacher, recipe: Recipe, cache_dir: Path
                       ) -> list[CachedCase]:
    """As `cache_probabilities`, of entries that processes of this run have just made or checked.

    Raises:
        ResourceError: CACHE, one is not there.
    """
    opened = []
    for case in cases:
        answer = open_entry(_entry(case, teacher, recipe, cache_dir), partial(_read, case, recipe))
        opened.append(_with_probs(case, answer, recipe))
    return opened


def _with_probs(case: CachedCase, answer: _Answer, recipe: Recipe) -> CachedCase:
    assert recipe.distill is not None
    if recipe.distill.label_weight > 0 and case.drawn != frozenset():
        return replace(case, probs=answer.probs, agreement=answer.agreement)
    # Where the teacher alone speaks, labels do not say where to look, either.
    return replace(case, probs=answer.probs, organ_voxels=answer.organ_voxels, organs_of_teacher=True,
                   agreement=answer.agreement)


def _entry(case: CachedCase, teacher: Teacher, recipe: Recipe, cache_dir: Path) -> Entry:
    """Beside the arrays of its case; the name says which teacher and how it looked."""
    assert recipe.distill is not None
    parts = {"version": _CACHE_VERSION, "overlap": recipe.distill.teacher_overlap,
             "mirror": recipe.distill.teacher_mirror,
             "teachers": sorted((model.sha256, model.recipe.digest("model", "preprocess"),
                                 model.recipe.inference.importance) for model in teacher.models)}
    name = f"teacher-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]}"
    folder = cache_dir / case.key
    return Entry(folder / f"{name}.json", {"probs": folder / f"{name}.npy"})


def _read(case: CachedCase, recipe: Recipe, entry: Entry, facts: Mapping[str, Any]) -> _Answer:
    probs, counts = entry.stored("probs"), np.array(facts["organ_voxels"], COUNTS_DTYPE)
    num_organs = len(recipe.labels.organs)
    fits = probs.shape == (num_organs, *case.labels.shape) and counts.shape == (len(case.labels), num_organs + 1)
    if probs.dtype != np.uint8 or not fits:
        raise ValueError(f"{entry.info_path}: probabilities of another type or shape")
    return _Answer(probs, counts, facts["agreement"])


def _build(
    entry: Entry, case: CachedCase, teacher: Teacher, recipe: Recipe, watch: Callable[[int, int], None] | None
) -> None:
    """Have the teacher look at a whole case."""
    assert recipe.distill is not None
    mirrors = (False, True) if recipe.distill.teacher_mirror else (False,)
    total, labels = np.zeros((len(recipe.labels.organs), *case.labels.shape), np.uint16), []
    for model in teacher.models:
        tiling = Tiling(overlap=recipe.distill.teacher_overlap, importance=model.recipe.inference.importance)
        for mirrored in mirrors:
            said = _said(case, model, recipe, tiling, mirrored, watch)
            total += said
            labels.append(np.stack([labels_of(said[:, z]) for z in range(said.shape[1])]))
    voters = len(labels)
    probs = ((total + voters // 2) // voters).astype(np.uint8)
    counts = count_organs(lambda z: labels_of_interest(probs[:, z]), len(case.labels), len(probs) + 1)
    entry.write({"probs": probs}, {
        "teacher_sha256": teacher.origin["sha256"], "organ_voxels": counts.tolist(),
        "agreement": agreement(labels, recipe.labels.num_outputs)})


def _said(
    case: CachedCase, model: LoadedModel, recipe: Recipe, tiling: Tiling, mirrored: bool,
    watch: Callable[[int, int], None] | None,
) -> np.ndarray:
    """uint8 [K - 1, z, y, x]: what one model says, of the scan or of its mirror image turned back."""
    voxels = np.asarray(case.voxels, np.float32)
    if mirrored:
        voxels = np.ascontiguousarray(voxels[..., ::-1])
    probs = np.empty((len(recipe.labels.organs), *case.labels.shape), np.uint8)
    z = 0
    for slab in probabilities_prepared(voxels, model.predictor, tiling, air=recipe.preprocess.air, progress=watch):
        probs[:, z : z + slab.shape[1]] = without_background(slab)
        z += slab.shape[1]
    if not mirrored:
        return probs
    # A right organ is a left one in the mirror.
    organs = recipe.labels.mirror_table[1 : recipe.labels.num_outputs].astype(np.intp) - 1
    return probs[organs][..., ::-1]


def agreement(labels: Sequence[np.ndarray], num_outputs: int) -> float | None:
    """Mean Dice of every two label maps over the organs that one of them has; None of one map, 1 of empty ones."""
    scores = []
    for first, second in itertools.combinations(labels, 2):
        sizes = np.bincount(first.ravel(), minlength=num_outputs) + np.bincount(second.ravel(), minlength=num_outputs)
        both = np.bincount(first[first == second], minlength=num_outputs)
        scores += [2 * b / s for b, s in zip(both[1:], sizes[1:], strict=True) if s]
    if len(labels) < 2:
        return None
    return float(np.mean(scores)) if scores else 1.0
