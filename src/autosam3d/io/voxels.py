"""From the numbers that a file of one volume stores to a CT in Hounsfield units or to labels, whatever its format."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from autosam3d.errors import VolumeError
from autosam3d.io.grid import canonical_affine, to_canonical
from autosam3d.io.intensity import settle_intensity
from autosam3d.io.options import ReadOptions
from autosam3d.volume import Segmentation, SourceGrid, Volume, log_warnings

MIN_SLICES = 8
# What a float32 scaling may leave of a whole number, and no interpolation.
_FLOAT_ROUNDING = 1e-4


def as_ct(stored: np.ndarray, source: SourceGrid, scaling: tuple[float, float], path: str | Path, options: ReadOptions,
          warnings: list[str]) -> Volume:
    """A CT as float32 HU [z, y, x] nearest RAS+.

    Args:
        stored: numbers of the file, [i, j, k].
        source: the file's grid.
        scaling: slope and intercept; a voxel is stored * slope + intercept.
        path: of the file.
        options: what may be accepted by force, and what is added to every voxel.
        warnings: what there was to say of the file so far.

    Raises:
        VolumeError: FEW_SLICES, and the codes of `io.intensity`.
    """
    slope, intercept = scaling
    _check_slices(source.shape, path, options, warnings)
    with np.errstate(over="ignore", invalid="ignore"):
        voxels = np.ascontiguousarray(to_canonical(stored, source), dtype=np.float32)
        if scaling != (1.0, 0.0):
            # In float64 a slab at a time, so that the sum is rounded once, as in nibabel.
            for slab, stored_slab in zip(voxels, to_canonical(stored, source), strict=True):
                slab[...] = stored_slab * np.float64(slope) + intercept
    warnings += settle_intensity(voxels, path, options, may_be_nonfinite=stored.dtype.kind == "f")
    return Volume(voxels, canonical_affine(source), source, log_warnings(path, warnings), str(path),
                  options.intensity or "hu")


def as_labels(stored: np.ndarray, source: SourceGrid, scaling: tuple[float, float], path: str | Path,
              warnings: list[str], organs: dict[int, str]) -> Segmentation:
    """A label map as uint8 (or uint16, beyond 255) [z, y, x] nearest RAS+.

    Args:
        stored, source, scaling, path, warnings: as for `as_ct`.
        organs: label to name, where the file says so.

    Raises:
        VolumeError: LABEL_FLOAT where values are no whole numbers (a label map that was resampled by interpolation);
            LABEL_RANGE for values below 0 or above 65535.
    """
    slope, intercept = scaling
    labels = to_canonical(stored, source)
    if scaling != (1.0, 0.0):
        labels = labels * slope + intercept
    if labels.dtype.kind == "f":
        # An array of floats that nibabel saves under a header of integers: 1 is stored as the nearest step, 0.9961.
        step = abs(slope) if stored.dtype.kind in "iu" and abs(slope) < 1 else 0.0
        labels, off = _whole(labels, path, step / 2)
        warnings.append("the labels are stored as floating-point numbers, all whole; they are taken as integers"
                        if off <= _FLOAT_ROUNDING else f"the labels are stored in steps of {step:.3g} and lie up to "
                        f"{off:.2g} from whole numbers, within half a step; they are taken as those")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > 65535:
        raise VolumeError("LABEL_RANGE", path, f"expected labels from 0 to 65535, got {low} to {high}",
                          "remap the labels; 0 is background")
    labels = np.ascontiguousarray(labels, dtype=np.uint8 if high <= 255 else np.uint16)
    return Segmentation(labels, canonical_affine(source), source, organs, log_warnings(path, warnings))


def _check_slices(shape: tuple[int, int, int], path: str | Path, options: ReadOptions, warnings: list[str]) -> None:
    if min(shape) >= MIN_SLICES:
        return
    fault = f"expected at least {MIN_SLICES} voxels along each axis, got {' x '.join(map(str, shape))}"
    if not options.force:
        raise VolumeError("FEW_SLICES", path, fault, options.remedy("force", True, "give the whole scan"))
    warnings.append(f"accepted by force: {fault}")


def _whole(labels: np.ndarray, path: str | Path, half_step: float) -> tuple[np.ndarray, float]:
    """(float labels as integers, how far the furthest was from one) where all are whole but for rounding."""
    if not np.isfinite(labels).all():
        raise VolumeError("LABEL_FLOAT", path, "expected whole numbers, got NaN or infinite labels", "export it again")
    rounded = np.rint(labels)
    off = np.abs(labels - rounded)
    broken = off > max(_FLOAT_ROUNDING, half_step * (1 + 1e-4))
    if broken.any():
        examples = ", ".join(f"{v:.4g}" for v in np.unique(labels[broken])[:5])
        raise VolumeError("LABEL_FLOAT", path, f"expected whole numbers, got {int(broken.sum())} voxels between them "
                          f"({examples})", "the label map was interpolated; resample it by nearest neighbour")
    return np.clip(rounded, -(2.0**31), 2.0**31).astype(np.int64), float(off.max(initial=0))
