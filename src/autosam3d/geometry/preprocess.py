"""From a scan to the numbers a model sees, and back onto the scan's own grid.

Both grids cover the same cuboid of space, corner on corner: index j of an axis with m prepared voxels lies at native
index ``(j + 0.5) * n / m - 0.5`` (half-pixel alignment, ``align_corners=False`` in PyTorch's words).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from autosam3d.axes import Size
from autosam3d.geometry.resample import Taps, lerp, lerp_plane, rows_first
from autosam3d.volume import Volume

# The range of CT values: -1024 HU is air as scanners store it, 3071 the top of 12 bits; padding is below, metal above.
_CT_RANGE_HU = (-1024.0, 3071.0)
_COARSE_MM = 5.0
_PART_MM3 = 10_000.0
# Lungs lie near -850 HU, with emphysema down to about -930; air outside, with padding and foam, near -1000.
_LUNG_MEAN_HU = -950.0


@dataclass(frozen=True, kw_only=True)
class HuWindow:
    low_hu: float
    """Everything below becomes this value. No default: the dataset decides."""
    high_hu: float
    """Everything above becomes this value."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low_hu) and math.isfinite(self.high_hu) and self.low_hu < self.high_hu):
            raise ValueError(f"hu_window: expected low_hu < high_hu, got {self.low_hu} and {self.high_hu}")


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Orient, crop to the body, resample, clip, normalise: ``(clip(hu) - subtract_hu) / divide_hu``."""

    spacing_mm: tuple[float, float, float] | None
    """(z, y, x); None keeps the scan's own spacing."""
    hu_window: HuWindow
    subtract_hu: float
    divide_hu: float
    crop_to_body: bool = True

    def __post_init__(self) -> None:
        if self.spacing_mm is not None and not all(math.isfinite(s) and 0.1 <= s <= 20 for s in self.spacing_mm):
            raise ValueError(f"spacing_mm: expected three numbers from 0.1 to 20, got {self.spacing_mm}")
        if not (math.isfinite(self.subtract_hu) and math.isfinite(self.divide_hu) and self.divide_hu > 0):
            raise ValueError(f"divide_hu: expected a positive number, got {self.divide_hu}")

    @property
    def air(self) -> float:
        """What air becomes; the fill beside a scan that is smaller than a patch."""
        return (max(_CT_RANGE_HU[0], self.hu_window.low_hu) - self.subtract_hu) / self.divide_hu


@dataclass(frozen=True)
class Box:
    """A cuboid of voxels: `start` lies inside, `stop` outside, both (z, y, x)."""

    start: Size
    stop: Size

    @property
    def shape(self) -> Size:
        """Voxels (z, y, x)."""
        return _size(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """Index of an array [z, y, x]."""
        z, y, x = (slice(a, b) for a, b in zip(self.start, self.stop, strict=True))
        return z, y, x


@dataclass(frozen=True)
class Undo:
    """The two grids, as `restore.SlabRestorer` and `prepare_labels` need them.

    Attributes:
        native_shape: of the scan.
        box: the part of the scan that was kept.
        prepared_shape: of the grid the model sees, which covers `box` corner on corner.
    """

    native_shape: Size
    box: Box
    prepared_shape: Size


@dataclass(frozen=True)
class Prepared:
    """A scan as a model sees it.

    Attributes:
        voxels: float32 [z, y, x], normalised.
        spacing_mm: (z, y, x), the recipe's but for the rounding to whole voxels.
        undo: the two grids, for the way back.
    """

    voxels: np.ndarray
    spacing_mm: tuple[float, float, float]
    undo: Undo


def find_body(
    voxels_hu: np.ndarray,
    spacing_mm: tuple[float, float, float],
    *,
    margin_mm: float = 10.0,
    threshold_hu: float = -300.0,
) -> Box:
    """The cuboid around the patient, without table and outside air.

    Looks at every few voxels (about 5 mm). Body is what is denser than `threshold_hu`, and lung; opened by one coarse
    voxel, which drops table shells and blankets; of that all connected parts of 10 ml or more: a second leg, a hand,
    or what is left in a scan that was cut to a region. A larger box costs time, a smaller one an organ. A connected
    region of low density is lung where its mean is clearly above that of outside air, which keeps lungs that the
    field of view cuts open.

    Args:
        voxels_hu: [z, y, x].
        spacing_mm: (z, y, x).
        margin_mm: added on all sides; more than the opening can take away.
        threshold_hu: between fat (-100) and lung (-850).

    Returns:
        A box inside the volume; the whole volume where nothing is found.
    """
    whole = Box((0, 0, 0), _size(voxels_hu.shape))
    steps = [max(1, int(_COARSE_MM / mm)) for mm in spacing_mm]
    coarse = voxels_hu[tuple(slice(None, None, step) for step in steps)]
    dense = coarse > threshold_hu
    body = dense | _lungs(coarse, ~dense)
    # What lies beyond the border counts as body in the erosion: a single slice or a close-up must survive it.
    body = ndimage.binary_dilation(ndimage.binary_erosion(body, border_value=1))
    parts: np.ndarray = ndimage.label(body)[0]  # type: ignore[index]
    sizes = np.bincount(parts.ravel())[1:]
    if sizes.size == 0:
        return whole
    cuboids = ndimage.find_objects(parts)
    smallest = min(sizes.max(), _PART_MM3 / math.prod(step * mm for step, mm in zip(steps, spacing_mm, strict=True)))
    found = [cuboids[i] for i in np.flatnonzero(sizes >= smallest)]
    margins = [math.ceil(margin_mm / mm) for mm in spacing_mm]
    # The body may end anywhere between the last coarse voxel inside and the first outside.
    start = (min(f[i].start for f in found) * steps[i] - (steps[i] - 1) - margins[i] for i in range(3))
    stop = (max(f[i].stop for f in found) * steps[i] + margins[i] for i in range(3))
    return Box(
        _size(max(0, a) for a in start), _size(min(n, b) for n, b in zip(voxels_hu.shape, stop, strict=True))
    )


def _lungs(coarse_hu: np.ndarray, thin: np.ndarray) -> np.ndarray:
    """The connected regions of `thin` that are too dense on average to be outside air."""
    regions: np.ndarray = ndimage.label(thin)[0]  # type: ignore[index]
    voxels = np.bincount(regions.ravel())
    total_hu = np.bincount(regions.ravel(), weights=coarse_hu.ravel())
    is_lung = np.asarray(total_hu > _LUNG_MEAN_HU * voxels)
    is_lung[0] = False
    return is_lung[regions]


def plan_grid(volume: Volume, spec: Preprocess) -> Undo:
    """The prepared grid of a scan, before anything is allocated for it.

    Per axis ``m = max(1, round(n * spacing / target))`` voxels; the effective spacing is then ``n * spacing / m``.
    """
    crops = spec.crop_to_body and volume.intensity == "hu"  # a body is found by Hounsfield units
    box = find_body(volume.voxels_hu, volume.spacing_mm) if crops else Box((0, 0, 0), volume.shape)
    target_mm = spec.spacing_mm or volume.spacing_mm
    shape = (
        max(1, round(n * mm / wish)) for n, mm, wish in zip(box.shape, volume.spacing_mm, target_mm, strict=True)
    )
    return Undo(native_shape=volume.shape, box=box, prepared_shape=_size(shape))


def prepare_ct(volume: Volume, spec: Preprocess, undo: Undo | None = None) -> Prepared:
    """Crop, resample linearly, clip to the HU window, normalise.

    Values outside the range of CT (padding, metal) are clipped before the resampling, so that they do not bleed into
    their neighbours. Slice by slice: the memory needed is that of the result.

    Args:
        volume: the scan.
        spec: the recipe's.
        undo: the grid, where `plan_grid` was called before.
    """
    undo = undo or plan_grid(volume, spec)
    window = spec.hu_window
    low, high = min(_CT_RANGE_HU[0], window.low_hu), max(_CT_RANGE_HU[1], window.high_hu)
    source = volume.voxels_hu[undo.box.slices]
    z, y, x = (Taps.between(n, m) for n, m in zip(undo.box.shape, undo.prepared_shape, strict=True))
    rows_before_columns = rows_first(undo.box.shape, undo.prepared_shape)
    planes: dict[int, np.ndarray] = {}

    def plane(index: int) -> np.ndarray:
        if index not in planes:
            planes[index] = lerp_plane(np.clip(source[index], low, high, dtype=np.float32), y, x, rows_before_columns)
        return planes[index]

    voxels = np.empty(undo.prepared_shape, np.float32)
    for j, out in enumerate(voxels):
        below, above = int(z.below[j]), int(z.above[j])
        for old in [index for index in planes if index < below]:
            del planes[old]
        lerp(plane(below), plane(above), z.weight[j], out)
        np.clip(out, window.low_hu, window.high_hu, out=out)
        out -= np.float32(spec.subtract_hu)
        out /= np.float32(spec.divide_hu)
    spacing_mm = tuple(
        n * mm / m for n, mm, m in zip(undo.box.shape, volume.spacing_mm, undo.prepared_shape, strict=True)
    )
    return Prepared(voxels=voxels, spacing_mm=spacing_mm, undo=undo)  # type: ignore[arg-type]


def prepare_labels(labels: np.ndarray, undo: Undo) -> np.ndarray:
    """Labels on the prepared grid: of each prepared voxel the native voxel that its centre lies in.

    Args:
        labels: integers 0..255 [z, y, x] on the scan's grid.
        undo: of the scan's `prepare_ct`.

    Returns:
        uint8 [z, y, x].

    Raises:
        ValueError: another shape than the scan's, or values beyond 0 to 255.
    """
    if labels.shape != undo.native_shape:
        raise ValueError(f"labels: expected the scan's shape {undo.native_shape}, got {labels.shape}")
    if labels.dtype != np.uint8 and (labels.min(initial=0) < 0 or labels.max(initial=0) > 255):
        raise ValueError(f"labels: expected values 0 to 255, got {labels.min()} to {labels.max()}")
    # floor((j + 0.5) * n / m) in whole numbers: no rounding can move a label by a voxel.
    z, y, x = (
        (2 * np.arange(m) + 1) * n // (2 * m) for n, m in zip(undo.box.shape, undo.prepared_shape, strict=True)
    )
    source = labels[undo.box.slices]
    return np.stack([source[i][y[:, None], x] for i in z]).astype(np.uint8, copy=False)


def _size(numbers: Iterable[int]) -> Size:
    z, y, x = (int(n) for n in numbers)
    return z, y, x
