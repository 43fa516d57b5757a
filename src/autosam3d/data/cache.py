"""Training data: preprocessed cases, cached on disk.

A case is oriented, cropped to the body, resampled and normalised once, then kept as plain .npy files of which
crops are read (`entries`). The cache key is made of everything that could change the result, so a cache is never
stale.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from autosam3d.data.case import Case
from autosam3d.data.centers import COUNTS_DTYPE, count_organs
from autosam3d.data.entries import Entry, StoredArray, open_entry, open_or_build
from autosam3d.data.order import learns_background_from_labels
from autosam3d.errors import VolumeError
from autosam3d.geometry.preprocess import prepare_ct, prepare_labels
from autosam3d.io import ReadOptions, read_ct, read_segmentation
from autosam3d.io.files import sha256_of
from autosam3d.io.grid import demand_same_grid
from autosam3d.labels import remap
from autosam3d.recipes.reading import Reading
from autosam3d.recipes.recipe import Recipe
from autosam3d.volume import Volume, log_warnings

log = logging.getLogger(__name__)

# Raise it when preprocessing changes in a way that its settings do not show.
CACHE_VERSION = 2
_DTYPES = {"voxels": np.float16, "labels": np.uint8, "organ_voxels": COUNTS_DTYPE}
# Organs together, in steps of 1/255, at which a teacher that says background is unsure: a fifth.
_UNSURE = 51
# Of a cache key, which is their hexadecimal text.
KEY_BYTES = 16


@dataclass(frozen=True)
class CachedCase:
    """A preprocessed case on disk; `voxels`, `labels` and `probs` are read as they are indexed.

    Attributes:
        voxels: float16 [z, y, x], normalised.
        labels: uint8 [z, y, x].
        organ_voxels: int32 [z, organs], how many voxels each organ has in each plane; crops are centred on them, so
            where all are 0 crops fall anywhere.
        key: of its cache entry; equal for equal files and settings.
        drawn: as in `Case`.
        weight: as in `Case`.
        probs: a teacher's, uint8 [K - 1, z, y, x] in steps of 1/255, without background; None where there are none.
        agreement: of the teacher's voters with one another, the mean Dice of their label maps; None of one alone.
        organs_of_teacher: whether `organ_voxels` are those of `probs`, not of `labels`.
    """

    name: str
    voxels: np.ndarray | StoredArray
    labels: np.ndarray | StoredArray
    organ_voxels: np.ndarray
    spacing_mm: tuple[float, float, float]
    key: str
    drawn: frozenset[int] | None = None
    weight: float = 1.0
    probs: np.ndarray | StoredArray | None = None
    organs_of_teacher: bool = False
    agreement: float | None = None

    def organs_in_plane(self, z: int) -> np.ndarray:
        """uint8 [y, x], the labels whose voxels `organ_voxels` counts."""
        if self.organs_of_teacher:
            assert self.probs is not None
            return labels_of_interest(self.probs[:, z])
        return self.labels[z]


def cache_cases(
    cases: Sequence[Case], recipe: Recipe, cache_dir: Path, progress: Callable[[int, int], None] | None = None
) -> list[CachedCase]:
    """The preprocessed form of `cases`, from the cache where it is whole, made anew where it is not.

    An exception at any moment, one from a signal handler too, leaves entries that are whole or do not count.

    Args:
        progress: called before each case, and at the end, with the cases done and their number.

    Raises:
        VolumeError: a scan or label map is broken, or the two do not share a grid.
        ResourceError: the cache folder cannot be written.
    """
    cached = []
    for done, case in enumerate(cases):
        if progress:
            progress(done, len(cases))
        entry = _entry(cache_dir, _cache_key(case, recipe))
        cached.append(open_or_build(entry, partial(_read, case), partial(_build, entry, case, recipe), case.name))
    if progress:
        progress(len(cases), len(cases))
    return cached


def open_cached(cache_dir: Path, key: str, case: Case) -> CachedCase:
    """The entry `key`, which another process of this run has just checked: its arrays are not read.

    Raises:
        ResourceError: CACHE, it is not there or not what an entry is.
    """
    return open_entry(_entry(cache_dir, key), partial(_read, case))


def demand_organs(cases: Sequence[CachedCase], recipe: Recipe, where: Path) -> None:
    """Refuse a training set that cannot teach what the recipe asks for; scans without labels do not count.

    Raises:
        VolumeError: EMPTY_LABELS, more than half of the cases show no organ; ABSENT_ORGAN, an organ is in no case;
            PARTIAL_LABELS, no case is fully drawn, where the recipe requires some.
    """
    cases = [case for case in cases if case.drawn != frozenset()]
    empty = [case.name for case in cases if not case.organ_voxels.any()]
    if 2 * len(empty) > len(cases):
        raise VolumeError("EMPTY_LABELS", where, f"expected organs in most training cases, got none in {len(empty)} of "
                          f"{len(cases)}, the first of them {empty[0]}", "check the label maps")
    present = {1 + int(column) for case in cases for column in np.flatnonzero(case.organ_voxels.any(axis=0))}
    # Where organs are unknown in some cases, one that a super-class alone shows cannot be told from its neighbours.
    absent = [name for index, name in recipe.labels.by_index.items() if index not in present]
    if absent:
        raise VolumeError("ABSENT_ORGAN", where, f"expected voxels of every organ in the training cases, got none of "
                          f"{', '.join(absent)}", "add cases that show it, or take it out of the recipe")
    required = recipe.sampling.whole_cases == "required" and learns_background_from_labels(recipe)
    if required and not any(case.drawn is None for case in cases):
        raise VolumeError("PARTIAL_LABELS", where, "expected training cases in which every organ was looked for, since "
                          "background is learnt from them alone, got none", "add some, or set "
                          "sampling.whole_cases=optional where each dataset draws organs of its own")
    if empty:
        log.warning("%d training cases show no organ, the first of them %s", len(empty), empty[0])


def with_background(organs: np.ndarray) -> np.ndarray:
    """Probabilities uint8 [K - 1, ...] in steps of 1/255 to float32 [K, ...] that sum to 1, background first.

    Rounding may let organs exceed 1 together by (K - 1)/510; they are divided by their sum then.
    """
    probs = np.empty((len(organs) + 1, *organs.shape[1:]), np.float32)
    np.divide(organs, np.float32(255), out=probs[1:])
    total = probs[1:].sum(0)
    np.maximum(1 - total, 0, out=probs[0])
    probs[1:] /= np.maximum(total, 1)
    return probs


def without_background(probs: np.ndarray) -> np.ndarray:
    """The inverse of `with_background`: float32 [K, ...] to uint8 [K - 1, ...], rounded."""
    return np.rint(probs[1:] * np.float32(255)).astype(np.uint8)


def labels_of(organs: np.ndarray) -> np.ndarray:
    """The likeliest label, uint8 [...], of probabilities as `without_background` gives them."""
    return with_background(organs).argmax(0).astype(np.uint8)


def labels_of_interest(organs: np.ndarray) -> np.ndarray:
    """As `labels_of`, and K where background is likeliest but far from sure: there a student learns most."""
    labels = labels_of(organs)
    unsure = organs.sum(0, dtype=np.uint16) >= _UNSURE
    labels[unsure & (labels == 0)] = len(organs) + 1
    return labels


def _label_table(case: Case, recipe: Recipe) -> dict[int, int]:
    if case.label_table is not None:
        return dict(case.label_table)
    return {value: value for value in range(recipe.labels.num_outputs)}


def _cache_key(case: Case, recipe: Recipe) -> str:
    if case.label_path is None and not case.is_unlabelled:
        raise VolumeError("NO_TRUTH", case.image_path, "expected a label map for a training case, got none",
                          "add it to labelsTr")
    parts = {
        "version": CACHE_VERSION,
        "preprocess": recipe.digest("preprocess"),
        "image": _content_sha256(case.image_path),
        "labels": sha256_of(case.label_path) if case.label_path else None,
        "table": sorted(_label_table(case, recipe).items()),
        "values": recipe.labels.num_values,
    }
    reading = case.reading or recipe.reading
    if reading != Reading():  # else entries of versions that knew no other way to read stay true
        parts["reading"] = asdict(reading)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[: 2 * KEY_BYTES]


def _content_sha256(scan: Path) -> str:
    """Of a file, or of all files of a folder of slices, whatever their names."""
    if not scan.is_dir():
        return sha256_of(scan)
    files = sorted(sha256_of(path) for path in scan.rglob("*") if path.is_file())
    return hashlib.sha256("".join(files).encode()).hexdigest()


def _entry(cache_dir: Path, key: str) -> Entry:
    folder = cache_dir / key
    return Entry(folder / "info.json", {name: folder / f"{name}.npy" for name in _DTYPES})


def _read(case: Case, entry: Entry, facts: Mapping[str, Any]) -> CachedCase:
    voxels, labels, counts = entry.stored("voxels"), entry.stored("labels"), entry.load("organ_voxels")
    fits = labels.shape == voxels.shape and counts.shape[:-1] == voxels.shape[:1]
    if not fits or (voxels.dtype, labels.dtype, counts.dtype) != tuple(_DTYPES.values()):
        raise ValueError(f"{entry.info_path}: arrays of other types or shapes")
    z, y, x = facts["spacing_mm"]
    return CachedCase(case.name, voxels, labels, counts, spacing_mm=(z, y, x), key=entry.info_path.parent.name,
                      drawn=case.drawn, weight=case.weight)


def _native_labels(case: Case, recipe: Recipe, volume: Volume, reading: ReadOptions) -> np.ndarray | None:
    """The case's labels on the grid of its scan, in the recipe's values; None of a scan without any."""
    if case.label_path is None:
        return None
    truth = read_segmentation(case.label_path, reading)
    log_warnings(case.label_path, demand_same_grid(truth, case.label_path, volume, "the scan"))
    table = _label_table(case, recipe)
    try:
        return remap(truth.labels, table)
    except KeyError as error:
        raise VolumeError("LABEL_RANGE", case.label_path, f"expected values {sorted(table)}, got {error.args[0]}",
                          "add the organ to the recipe or correct the label map") from None


def _build(entry: Entry, case: Case, recipe: Recipe) -> None:
    """Preprocess a case into its entry."""
    reading = (case.reading or recipe.reading).options()
    volume = read_ct(case.image_path, reading)
    native = _native_labels(case, recipe, volume, reading)
    prepared = prepare_ct(volume, recipe.preprocess)
    empty = np.zeros(prepared.voxels.shape, np.uint8)
    labels = empty if native is None else prepare_labels(native, prepared.undo)
    arrays = {
        "voxels": prepared.voxels.astype(np.float16),
        "labels": labels,
        "organ_voxels": count_organs(labels.__getitem__, len(labels), recipe.labels.num_values - 1),
    }
    entry.write(arrays, {"spacing_mm": prepared.spacing_mm})
