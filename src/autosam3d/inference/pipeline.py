"""From a scan to its organs: prepare, predict window by window, stitch, restore."""

from __future__ import annotations

import itertools
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from autosam3d.axes import Size
from autosam3d.errors import CheckpointError, ResourceError, UsageError
from autosam3d.geometry.patches import Stitcher, Tiling, grid_starts, pad_to, stitch, unpad_slabs
from autosam3d.geometry.preprocess import Box, Undo, plan_grid, prepare_ct
from autosam3d.geometry.restore import SlabRestorer, restore_labels
from autosam3d.inference.duration import Duration
from autosam3d.inference.memory import MemoryPlan, estimate_ram_bytes, fit_memory
from autosam3d.inference.mirror import MirrorPredictor
from autosam3d.inference.predictor import Predictor
from autosam3d.io.memory import resident_bytes, size_text
from autosam3d.recipes.recipe import Recipe
from autosam3d.volume import Segmentation, Volume, log_warnings

_log = logging.getLogger(__name__)

_HALF_WARNING = "Memory was short: window sums were kept in half precision, labels may differ at organ borders."

Progress = Callable[[int, int], None]
"""Called with the windows (or cases) done and their number."""


_SCALES = {"hu": "Hounsfield units", "raw": "numbers as they are stored (reading.intensity: raw)"}


class Model(Protocol):
    """A recipe with something that runs it, as `checkpoint.load_model` gives it."""

    @property
    def recipe(self) -> Recipe: ...

    @property
    def predictor(self) -> Predictor: ...


@dataclass(frozen=True, kw_only=True)
class SegmentOptions:
    """How to segment, beyond what the model's recipe says."""

    tiling: Tiling | None = None
    """None takes the recipe's."""
    batch_size: int = 1
    """Windows per call of the predictor; 1 is best on a CPU."""
    tta: bool = False
    """Average over the mirror images that the recipe trained on: 2, 4 or 8 times the work."""
    max_ram_bytes: int | None = None
    """Most memory that the whole process may hold: program, weights, scan, activations, result. None takes what is
    free."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {self.batch_size}")
        if self.max_ram_bytes is not None and self.max_ram_bytes < 1:
            raise ValueError(f"max_ram_bytes: expected a positive number, got {self.max_ram_bytes}")


def segment(
    volume: Volume,
    model: Model,
    *,
    tiling: Tiling | None = None,
    batch_size: int = 1,
    tta: bool = False,
    max_ram_bytes: int | None = None,
    progress: Progress | None = None,
) -> Segmentation:
    """The organs of one scan, on the scan's own grid.

    Probabilities of overlapping windows are averaged, laid on the scan's grid linearly, then the largest wins. What
    lies outside the body is background.

    Args:
        volume: one CT, in HU; of another scale where the recipe's `reading.intensity` is raw.
        model: recipe and network, as `load_model` gives them.
        tiling: how the windows walk; None takes the recipe's.
        batch_size: windows per call of the network; 1 is best on a CPU.
        tta: average over the mirror images that the recipe trained on: 2, 4 or 8 times the work.
        max_ram_bytes: most memory that the whole process may hold; None takes what is free.
        progress: called with the windows done and their number, after every window.

    Returns:
        uint8 labels [z, y, x] on the grid of `volume`, with the organs' names and the mean probability of each.

    Raises:
        ResourceError: MEMORY or NO_SPACE, before the work where it can be foreseen.
        CheckpointError: NONFINITE, the network returned NaN or infinity.
        UsageError: INTENSITY, the scan was read as another scale than the model is for.
    """
    segment_options = SegmentOptions(tiling=tiling, batch_size=batch_size, tta=tta, max_ram_bytes=max_ram_bytes)
    return segment_with(volume, model, segment_options, progress)


def segment_with(
    volume: Volume, model: Model, segment_options: SegmentOptions, progress: Progress | None = None
) -> Segmentation:
    """`segment` with its options as one value."""
    return begin_segment(volume, model, segment_options)(progress)


def begin_segment(
    volume: Volume, model: Model, segment_options: SegmentOptions
) -> Callable[[Progress | None], Segmentation]:
    """Prepare a scan; the function that is returned does the rest.

    It needs the scan's voxels no more: a caller that lets go of them has their memory back before the windows.
    """
    recipe, predictor = model.recipe, model.predictor
    if volume.intensity != recipe.reading.intensity:
        raise UsageError("INTENSITY", volume.name, f"expected {_SCALES[recipe.reading.intensity]}, as the model was "
                         f"trained on, got {_SCALES[volume.intensity]}",
                         f"read it with ReadOptions(intensity={recipe.reading.intensity!r})")
    if segment_options.tta:
        predictor = MirrorPredictor(predictor, recipe)
    undo = plan_grid(volume, recipe.preprocess)
    memory = plan_memory(undo, predictor, segment_options, volume.name)
    voxels = prepare_ct(volume, recipe.preprocess, undo).voxels
    walk = _Walk(predictor, segment_options.tiling or recipe.inference, recipe.preprocess.air, memory, volume.name)
    found = log_warnings(volume.name, [*_small_scan(undo, predictor), *([_HALF_WARNING] if memory.half else [])])
    affine, source, warnings = volume.affine, volume.source, (*volume.warnings, *found)

    def finish(progress: Progress | None) -> Segmentation:
        restorer = SlabRestorer(undo, predictor.num_outputs)
        for slab in walk.slabs(voxels, progress):
            restorer.add(slab)
        organs = dict(recipe.labels.by_index)
        return Segmentation(restorer.finish(), affine, source, organs, warnings, restorer.confidence())

    return finish


def _small_scan(undo: Undo, predictor: Predictor) -> list[str]:
    """A warning where the scan does not fill one window: the model has seldom seen so much air, or none in training."""
    if all(n >= p for n, p in zip(undo.prepared_shape, predictor.patch_size, strict=True)):
        return []
    scan, window = (" x ".join(map(str, shape)) for shape in (undo.prepared_shape, predictor.patch_size))
    return [f"The scan is smaller than the model's window ({scan} of {window} voxels, cropped and resampled): air "
            "was put around it."]


def label_prepared(
    voxels: np.ndarray,
    predictor: Predictor,
    tiling: Tiling,
    *,
    air: float | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Labels of a prepared scan on the prepared grid, for validation while training.

    Args:
        voxels: float32 [z, y, x], normalised.
        predictor: of the network.
        tiling: how the windows walk.
        air: normalised value beside a scan that is smaller than a patch; None takes the least there is.
        progress: called after every window.

    Returns:
        uint8 [z, y, x].
    """
    shape = (voxels.shape[0], voxels.shape[1], voxels.shape[2])
    slabs = probabilities_prepared(voxels, predictor, tiling, air=air, progress=progress)
    return restore_labels(slabs, Undo(shape, Box((0, 0, 0), shape), shape), predictor.num_outputs)


def probabilities_prepared(
    voxels: np.ndarray,
    predictor: Predictor,
    tiling: Tiling,
    *,
    air: float | None = None,
    progress: Progress | None = None,
) -> Iterator[np.ndarray]:
    """As `label_prepared`, but mean probabilities float32 [K, dz, y, x], slab by slab in z order."""
    return _Walk(predictor, tiling, float(voxels.min()) if air is None else air).slabs(voxels, progress)


def plan_memory(undo: Undo, predictor: Predictor, segment_options: SegmentOptions, name: str = "scan") -> MemoryPlan:
    """How the scan will be worked through within the memory there is.

    Raises:
        ResourceError: MEMORY, no way fits.
    """
    padded = tuple(max(n, p) for n, p in zip(undo.prepared_shape, predictor.patch_size, strict=True))
    activations = {size: predictor.activation_bytes(size) for size in (segment_options.batch_size, 1)}
    # Asked last, since the dry run behind the activations loads modules of its own.
    held = max(0, resident_bytes() - 4 * math.prod(undo.native_shape))
    wish, smaller = (
        estimate_ram_bytes(
            undo.native_shape, padded, predictor.num_outputs, predictor.patch_size,  # type: ignore[arg-type]
            activations[size], size, held,
        )
        for size in (segment_options.batch_size, 1)
    )
    where = f"{name} ({' x '.join(map(str, undo.native_shape))} voxels)"
    return fit_memory(wish, smaller, segment_options.max_ram_bytes, where)


@dataclass(frozen=True)
class _Walk:
    """Windows over a prepared scan, predicted and stitched.

    Windows that hold nothing but air are one and the same input: the predictor sees the first of them, and its answer
    is used again. The result is the same to the last bit.
    """

    predictor: Predictor
    tiling: Tiling
    air: float
    """Normalised value beside the scan."""
    memory: MemoryPlan | None = None
    """None: one window at a time, sums in memory."""
    name: str = ""
    """Of the scan, to say how long it takes; empty says nothing."""
    _blank: dict[float, np.ndarray] = field(default_factory=dict)
    """The least value that a window held throughout, and its probabilities."""

    def slabs(self, ct: np.ndarray, progress: Progress | None) -> Iterator[np.ndarray]:
        """Mean probabilities float32 [K, dz, h, w] of a prepared scan [z, y, x], in z order."""
        size = self.predictor.patch_size
        ct, padding = pad_to(ct, size, self.air)
        starts = grid_starts(ct.shape, size, self.tiling.overlap)
        windows = _reported(self._windows(ct, starts), len(starts), progress)
        yield from _finite(unpad_slabs(stitch(windows, self._stitcher(ct.shape)), padding, ct.shape))

    def _windows(self, ct: np.ndarray, starts: list[Size]) -> Iterator[tuple[np.ndarray, Size]]:
        """(probabilities [K, D, H, W], start) in order. One batch ahead runs in a thread, while the last is added."""
        step = self.memory.batch_size if self.memory else 1
        duration = Duration(self.name, sum(not _is_blank(self._crop(ct, s)) for s in starts)) if self.name else None
        batches = [starts[i : i + step] for i in range(0, len(starts), step)]
        with ThreadPoolExecutor(1, thread_name_prefix="predict") as pool:
            coming = pool.submit(self._predict, ct, batches[0], duration)
            for batch, following in itertools.zip_longest(batches, batches[1:]):
                probs = coming.result()
                if following is not None:
                    coming = pool.submit(self._predict, ct, following, duration)
                yield from zip(probs, batch, strict=True)

    def _crop(self, ct: np.ndarray, start: Size) -> np.ndarray:
        return ct[tuple(slice(s, s + n) for s, n in zip(start, self.predictor.patch_size, strict=True))]

    def _predict(self, ct: np.ndarray, starts: list[Size], duration: Duration | None) -> list[np.ndarray]:
        crops = [self._crop(ct, start) for start in starts]
        values = [float(crop[0, 0, 0]) if _is_blank(crop) else None for crop in crops]
        known = dict(self._blank)
        # Of equal windows in one batch the first is seen.
        seen = [i for i, v in enumerate(values) if v is None or (v not in known and v not in values[:i])]
        began = time.perf_counter()
        fresh = self.predictor.predict(np.stack([crops[i] for i in seen])[:, None]) if seen else ()
        if duration is not None and seen:
            duration.add(len(seen), time.perf_counter() - began)
        probs = dict(zip(seen, fresh, strict=True))
        for i in seen:
            if (value := values[i]) is not None:
                known[value] = probs[i].copy()
        if known:  # one answer is kept, that of the least value: air
            least = min(known)
            self._blank.clear()
            self._blank[least] = known[least]
        return [probs[i] if i in probs else known[value] for i, value in enumerate(values)]  # type: ignore[index]

    def _stitcher(self, shape: tuple[int, ...]) -> Stitcher:
        size, memory = self.predictor.patch_size, self.memory
        scratch = memory.scratch if memory else None
        try:
            return Stitcher(
                shape, self.predictor.num_outputs, size, self.tiling.weights(size),  # type: ignore[arg-type]
                dtype=np.float16 if memory and memory.half else np.float32, scratch=scratch,
            )
        except OSError as error:
            if scratch is None:
                raise
            raise ResourceError(
                "NO_SPACE", scratch, f"no room for the sums of the windows ({error.strerror}, "
                f"{size_text(shutil.disk_usage(scratch).free)} free)",
                "free some space, name another folder in TMPDIR, or use a machine with more memory",
            ) from error


def _is_blank(crop: np.ndarray) -> bool:
    """Whether all voxels have one value; a corner that differs from the middle settles most windows at once."""
    first, middle = crop[0, 0, 0], crop[tuple(n // 2 for n in crop.shape)]
    return bool(first == middle and (crop == first).all())


def _reported(
    windows: Iterable[tuple[np.ndarray, Size]], total: int, progress: Progress | None
) -> Iterator[tuple[np.ndarray, Size]]:
    for done, window in enumerate(windows, start=1):
        yield window
        if progress is not None:
            progress(done, total)


def _finite(slabs: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for slab in slabs:
        if not math.isfinite(float(slab.sum())):
            raise CheckpointError(
                "NONFINITE", "model", "expected probabilities, the network returned NaN or infinity",
                "take another checkpoint, or precision fp32",
            )
        yield slab
