"""Training data: preprocessed cases cached on disk, and the random crops that a step sees.

A case is oriented, cropped to the body, resampled and normalised once, then kept as plain .npy files that are
mapped into memory. The cache key is made of everything that could change the result, so a cache is never stale;
each entry carries checksums and is rebuilt when it is cut or altered.
"""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from autosam3d.data.augment import Crop, affine_margin, augment, random_affine
from autosam3d.data.folder import Case
from autosam3d.errors import ResourceError, VolumeError
from autosam3d.geometry.preprocess import Size, prepare_ct, prepare_labels
from autosam3d.io import ReadOptions, read_ct, read_segmentation
from autosam3d.io.files import atomic_write, remove_stale_temporaries, sha256_of, write_text_atomic
from autosam3d.labels import remap
from autosam3d.recipes.recipe import Recipe
from autosam3d.volume import same_grid

log = logging.getLogger(__name__)

# Raise it when preprocessing changes in a way that its settings do not show.
CACHE_VERSION = 1
# Organ voxels kept per case and organ as possible crop centres; more would only repeat their neighbours.
MAX_CENTERS = 4000
_ARRAYS = ("voxels", "labels", "centers")
_DTYPES = {"voxels": np.float16, "labels": np.uint8, "centers": np.int32}
# Of a cache key, which is their hexadecimal text.
KEY_BYTES = 16
# What reading a damaged entry can raise.
NO_ENTRY = (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError)


@dataclass(frozen=True)
class CachedCase:
    """A preprocessed case on disk; `voxels` and `labels` are memory maps.

    Attributes:
        voxels: float16 [z, y, x], normalised.
        labels: uint8 [z, y, x].
        centers: int32 [n, 4], rows of (organ, z, y, x): voxels on which a crop may be centred.
        key: of its cache entry; equal for equal files and settings.
        probs: a teacher's, uint8 [K - 1, z, y, x] in steps of 1/255, without background; None where there are none.
    """

    name: str
    voxels: np.ndarray
    labels: np.ndarray
    centers: np.ndarray
    spacing_mm: tuple[float, float, float]
    key: str
    probs: np.ndarray | None = None


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
        key = _cache_key(case, recipe)
        entry = _open_entry(cache_dir / key, case.name)
        if entry is None:
            _build_entry(cache_dir / key, case, recipe)
            entry = _open_entry(cache_dir / key, case.name)
            if entry is None:
                raise ResourceError("CACHE", cache_dir / key, "a cache entry that was just written does not read back",
                                    "check the disk, or name another folder with --cache")
        cached.append(entry)
    if progress:
        progress(len(cases), len(cases))
    return cached


def open_cached(cache_dir: Path, key: str, name: str) -> CachedCase:
    """The entry `key`, which another process of this run has just checked: its arrays are mapped, not read.

    Raises:
        ResourceError: CACHE, it is not there or not what an entry is.
    """
    try:
        return _map_entry(cache_dir / key, _checked_info(cache_dir / key), name)
    except NO_ENTRY:
        raise ResourceError("CACHE", cache_dir / key, "expected the cache entry that another process of this run has "
                            "checked, got none or a damaged one", "let all processes of a machine see the same --cache "
                            "folder, and leave it alone while they train") from None


def demand_organs(cases: Sequence[CachedCase], recipe: Recipe, where: Path) -> None:
    """Refuse a training set that cannot teach what the recipe asks for.

    Raises:
        VolumeError: EMPTY_LABELS, more than half of the cases show no organ; NO_ORGAN, an organ is in no case.
    """
    empty = [case.name for case in cases if not len(case.centers)]
    if 2 * len(empty) > len(cases):
        raise VolumeError("EMPTY_LABELS", where, f"expected organs in most training cases, got none in {len(empty)} of "
                          f"{len(cases)}, the first of them {empty[0]}", "check the label maps")
    present = {int(organ) for case in cases for organ in np.unique(case.centers[:, 0])}
    absent = [name for index, name in recipe.labels.by_index.items() if index not in present]
    if absent:
        raise VolumeError("NO_ORGAN", where, f"expected voxels of every organ in the training cases, got none of "
                          f"{', '.join(absent)}", "add cases that show it, or take it out of the recipe")
    if empty:
        log.warning("%d training cases show no organ, the first of them %s", len(empty), empty[0])


class CropDataset(Dataset):
    """Random crops; item ``(epoch, position, case)`` is the same crop in every process, on every machine.

    Item: voxels float32 [1, D, H, W], labels uint8 [D, H, W], and where the cases have a teacher's probabilities
    those, float32 [K, D, H, W].
    """

    def __init__(self, cases: Sequence[CachedCase], recipe: Recipe) -> None:
        self.cases, self.recipe = list(cases), recipe

    def __len__(self) -> int:
        return len(self.cases) * self.recipe.sampling.patches_per_volume

    def order(self, epoch: int) -> np.ndarray:
        """Which case stands at each position of `epoch`."""
        random = np.random.default_rng([self.recipe.train.seed, 1, epoch])
        return random.permutation(len(self)) % len(self.cases)

    def __getitem__(self, item: tuple[int, int, int]) -> tuple[Tensor, ...]:
        epoch, position, index = item
        case, recipe = self.cases[index], self.recipe
        random = np.random.default_rng([recipe.train.seed, 2, epoch, position])
        patch_size = recipe.model.patch_size
        start = self._start(case, random)
        margin = affine_margin(patch_size, case.spacing_mm, recipe.augment)
        air = case.voxels.dtype.type(recipe.preprocess.air)
        crop = Crop(
            _cut(case.voxels, start, patch_size, margin, air).astype(np.float32),
            _cut(case.labels, start, patch_size, margin, 0),
            None if case.probs is None else with_background(
                np.stack([_cut(organ, start, patch_size, margin, 0) for organ in case.probs])),
        )
        if any(margin):
            crop = random_affine(crop, patch_size, case.spacing_mm, recipe.augment, random)
        crop = augment(crop, recipe.augment, recipe.labels, random)
        tensors = torch.from_numpy(crop.voxels).unsqueeze(0), torch.from_numpy(crop.labels)
        return tensors if crop.probs is None else (*tensors, torch.from_numpy(crop.probs))

    def _start(self, case: CachedCase, random: np.random.Generator) -> Size:
        """First voxel of a crop around an organ voxel or any voxel, moved inside the scan along axes where it fits."""
        sampling = self.recipe.sampling
        if len(case.centers) and random.random() < sampling.foreground_share:
            rows = case.centers
            if sampling.balance_organs:
                rows = rows[rows[:, 0] == random.choice(np.unique(rows[:, 0]))]
            center = rows[random.integers(len(rows)), 1:]
        else:
            center = random.integers(0, case.voxels.shape)
        z, y, x = (
            min(max(0, int(c) - p // 2), n - p) if n > p else -((p - n) // 2)
            for c, n, p in zip(center, case.voxels.shape, self.recipe.model.patch_size, strict=True)
        )
        return z, y, x


class StepSampler:
    """The items of one rank for one epoch, from step `first_step` on, in batches.

    The list of an epoch is filled up by starting over, so that every rank makes the same number of full steps.
    """

    def __init__(self, dataset: CropDataset, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.dataset, self.batch_size, self.rank, self.world_size = dataset, batch_size, rank, world_size
        self.epoch = self.first_step = 0

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.dataset) // (self.batch_size * self.world_size))

    def __len__(self) -> int:
        return max(self.steps_per_epoch - self.first_step, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        order = self.dataset.order(self.epoch)
        positions = np.arange(self.steps_per_epoch * self.batch_size * self.world_size)
        indexes = order[positions % len(order)]
        for step in range(self.first_step, self.steps_per_epoch):
            start = (step * self.world_size + self.rank) * self.batch_size
            yield [(self.epoch, int(p), int(indexes[p])) for p in positions[start : start + self.batch_size]]


class CropLoader:
    """Batches of crops in the order that `sampler` has when an iteration begins.

    They are cut ahead by processes that live as long as this object, or in a thread where `num_workers` is 0.
    """

    def __init__(self, dataset: CropDataset, sampler: StepSampler, num_workers: int, pin_memory: bool) -> None:
        # Which crop to cut comes with each item, so the workers know nothing of epochs and outlive them.
        self._loader = DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, pin_memory=pin_memory,
                                  persistent_workers=num_workers > 0,
                                  worker_init_fn=_begin_worker if num_workers else None,
                                  prefetch_factor=4 if num_workers else None)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        if self._loader.num_workers:
            yield from self._loader
            return
        batches = iter(self._loader)
        with ThreadPoolExecutor(1, thread_name_prefix="crops") as pool:
            coming = pool.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = pool.submit(next, batches, None)
                yield batch


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


def _begin_worker(_: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C and batch systems signal the whole group. Workers go on until the training has saved, and end with it.
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _cut(array: np.ndarray, start: Size, size: Size, margin: Size, fill: Any) -> np.ndarray:
    """A copy of ``array[start - margin : start + size + margin]``; what lies outside the array is `fill`."""
    lows = [s - m for s, m in zip(start, margin, strict=True)]
    highs = [s + p + m for s, p, m in zip(start, size, margin, strict=True)]
    cut = np.full([h - low for low, h in zip(lows, highs, strict=True)], fill, array.dtype)
    inside = [(max(0, low), min(n, h)) for low, h, n in zip(lows, highs, array.shape, strict=True)]
    target = tuple(slice(a - low, b - low) for (a, b), low in zip(inside, lows, strict=True))
    cut[target] = array[tuple(slice(a, b) for a, b in inside)]
    return cut


def _label_table(case: Case, recipe: Recipe) -> dict[int, int]:
    if case.label_table is not None:
        return dict(case.label_table)
    return {value: value for value in range(recipe.labels.num_outputs)}


def _cache_key(case: Case, recipe: Recipe) -> str:
    if case.label_path is None:
        raise VolumeError("NO_LABELS", case.image_path, "expected a label map for a training case, got none",
                          "add it to labelsTr")
    parts = {
        "version": CACHE_VERSION,
        "preprocess": recipe.digest("preprocess"),
        "image": sha256_of(case.image_path),
        "labels": sha256_of(case.label_path),
        "table": sorted(_label_table(case, recipe).items()),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[: 2 * KEY_BYTES]


def _build_entry(folder: Path, case: Case, recipe: Recipe) -> None:
    """Preprocess a case into `folder`. What makes the entry count, info.json, is written last."""
    volume = read_ct(case.image_path, ReadOptions())
    assert case.label_path is not None  # _cache_key demands it
    truth = read_segmentation(case.label_path)
    if truth.shape != volume.shape:
        raise VolumeError("SHAPE", case.label_path, f"expected the scan's shape {volume.shape} [z, y, x], "
                          f"got {truth.shape}", "export the label map on the grid of its scan")
    if not same_grid(volume, truth):
        raise VolumeError("AFFINE_MISMATCH", case.label_path, "expected the scan's affine, got another",
                          "export the label map on the grid of its scan")
    table = _label_table(case, recipe)
    try:
        native = remap(truth.labels, table)
    except KeyError as error:
        raise VolumeError("LABEL_RANGE", case.label_path, f"expected values {sorted(table)}, got {error.args[0]}",
                          "add the organ to the recipe or correct the label map") from None
    prepared = prepare_ct(volume, recipe.preprocess)
    labels = prepare_labels(native, prepared.undo)
    arrays = {
        "voxels": prepared.voxels.astype(np.float16),
        "labels": labels,
        "centers": pick_centers(labels, np.random.default_rng(0)),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError("NOT_WRITABLE", folder.parent, f"expected a folder that may be written ({error.strerror})",
                            "name another folder with --cache") from None
    remove_stale_temporaries(folder)
    for name, array in arrays.items():
        atomic_write(folder / f"{name}.npy", lambda path, array=array: save_array(path, array),
                     size_bytes=array.nbytes)
    entry = {"spacing_mm": prepared.spacing_mm, "crc": {name: crc_of_file(folder / f"{name}.npy") for name in arrays}}
    write_text_atomic(folder / "info.json", json.dumps({"entry": entry, "crc": crc_of(entry)}))


def save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:  # given a path, numpy would put .npy behind the temporary name
        np.save(file, array)


def _open_entry(folder: Path, name: str) -> CachedCase | None:
    """The entry, or None where it is absent, cut or altered."""
    if not (folder / "info.json").exists():
        return None
    try:
        entry = _checked_info(folder)
        if all(crc_of_file(folder / f"{a}.npy") == entry["crc"][a] for a in _ARRAYS):
            return _map_entry(folder, entry, name)
    except NO_ENTRY:
        pass
    log.warning("cache of %s is damaged, making it again", name)
    return None


def _checked_info(folder: Path) -> dict[str, Any]:
    info = json.loads((folder / "info.json").read_text("utf-8"))
    if info["crc"] != crc_of(info["entry"]):
        raise ValueError("info.json is not what its checksum says")
    return info["entry"]


def _map_entry(folder: Path, entry: Mapping[str, Any], name: str) -> CachedCase:
    arrays = {a: np.load(folder / f"{a}.npy", mmap_mode=None if a == "centers" else "r") for a in _ARRAYS}
    if any(arrays[a].dtype != _DTYPES[a] for a in _ARRAYS) or arrays["voxels"].shape != arrays["labels"].shape:
        raise ValueError("arrays of other types or shapes")
    z, y, x = entry["spacing_mm"]
    return CachedCase(name, arrays["voxels"], arrays["labels"], arrays["centers"], (z, y, x), folder.name)


def crc_of(entry: Any) -> int:
    return zlib.crc32(json.dumps(entry, sort_keys=True).encode())


def crc_of_file(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def pick_centers(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """int32 [n, 4]: up to `MAX_CENTERS` voxels of every organ, as (organ, z, y, x)."""
    rows = []
    for organ in np.unique(labels[labels > 0]):
        where = np.flatnonzero(labels == organ)
        if len(where) > MAX_CENTERS:
            where = random.choice(where, MAX_CENTERS, replace=False)
        coordinates = np.stack(np.unravel_index(where, labels.shape), axis=1)
        rows.append(np.column_stack([np.full(len(where), organ), coordinates]))
    return np.concatenate(rows).astype(np.int32) if rows else np.zeros((0, 4), np.int32)
