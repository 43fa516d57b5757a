"""From a file's own voxel axes to [z, y, x] nearest RAS+, and back; and the checks that a grid must pass.

Everything that touches axis order is in this module, so left and right can be lost in one place only.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from nibabel.orientations import io_orientation

from autosam3d.errors import VolumeError
from autosam3d.io.options import ReadOptions
from autosam3d.volume import SAME_GRID_VOX, Segmentation, SourceGrid, Volume, grid_apart_vox, same_grid

# Off-orthonormal: the largest |cosine| between two axes. Rounding to float32 or to DICOM's 16 characters stays
# below the first; up to the second the nearest rotation is taken.
_ROUNDING_COSINE = 1e-4
_MAX_COSINE = 1e-3
# No scanner's coordinates reach a kilometre.
_MAX_ENTRY_MM = 1e6
# What float32 leaves of a grid that was copied.
_ROUNDING_VOX = 1e-3
_MIN_SPACING_MM, _MAX_SPACING_MM = 0.1, 20.0
_MIN_FOV_MM, _MAX_FOV_MM = 20.0, 2500.0


def source_grid(kind: str, shape: tuple[int, int, int], affine: np.ndarray, header: bytes | None = None) -> SourceGrid:
    """The grid of a file with `affine` (file voxel indexes to RAS+ mm), with its way to the nearest RAS+ order."""
    orientation = io_orientation(affine)  # one row per file axis: (canonical axis, +1 or -1)
    canonical_of = orientation[:, 0].astype(int)
    axis_of = tuple(int(np.flatnonzero(canonical_of == axis)[0]) for axis in range(3))
    flipped = tuple(bool(orientation[axis, 1] < 0) for axis in axis_of)
    return SourceGrid(kind, shape, np.array(affine, np.float64), axis_of, flipped, header)  # type: ignore[arg-type]


def canonical_shape(source: SourceGrid) -> tuple[int, int, int]:
    """(z, y, x) of the array in memory."""
    x, y, z = (source.shape[axis] for axis in source.axis_of)
    return z, y, x


def canonical_affine(source: SourceGrid) -> np.ndarray:
    """4x4, voxel (x, y, z) of the array in memory to RAS+ mm."""
    return source.affine @ _to_file(source.shape, source.axis_of, source.flipped)


def grid_stored_as(shape: tuple[int, int, int], affine: np.ndarray, axis_codes: str) -> SourceGrid:
    """The grid of a file that stores a [z, y, x] array of this `shape` and `affine` in another orientation.

    Args:
        axis_codes: where the file's axes run to, for example "LPS" for left, posterior, superior.

    Raises:
        ValueError: `axis_codes` does not name each axis once.
    """
    codes = axis_codes.upper()
    axes = [next((axis for axis, pair in enumerate(("RL", "AP", "SI")) if code in pair), -1) for code in codes]
    if sorted(axes) != [0, 1, 2]:
        raise ValueError(f"axis_codes: expected one each of R/L, A/P, S/I, got {axis_codes!r}")
    axis_of = (axes.index(0), axes.index(1), axes.index(2))
    flipped = (codes[axis_of[0]] == "L", codes[axis_of[1]] == "P", codes[axis_of[2]] == "I")
    xyz = shape[::-1]
    file_shape = (xyz[axes[0]], xyz[axes[1]], xyz[axes[2]])
    file_affine = np.asarray(affine, float) @ np.linalg.inv(_to_file(file_shape, axis_of, flipped))
    return SourceGrid("array", file_shape, file_affine, axis_of, flipped)


def to_canonical(array: np.ndarray, source: SourceGrid) -> np.ndarray:
    """A view [z, y, x] of an array that is indexed as the file is, [i, j, k]."""
    view = array.transpose(source.axis_of)
    return view[tuple(slice(None, None, -1 if flip else None) for flip in source.flipped)].T


def from_canonical(array: np.ndarray, source: SourceGrid) -> np.ndarray:
    """The inverse of `to_canonical`: a view indexed as the file is."""
    view = array.T[tuple(slice(None, None, -1 if flip else None) for flip in source.flipped)]
    return view.transpose(np.argsort(source.axis_of))


def _to_file(shape: tuple[int, int, int], axis_of: tuple[int, int, int], flipped: tuple[bool, bool, bool]
             ) -> np.ndarray:
    """4x4 from voxel (x, y, z) in memory to voxel (i, j, k) in the file."""
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for axis, (file_axis, flip) in enumerate(zip(axis_of, flipped, strict=True)):
        matrix[file_axis, axis] = -1 if flip else 1
        matrix[file_axis, 3] = shape[file_axis] - 1 if flip else 0
    return matrix


def check_affine(affine: np.ndarray, where: str | Path, name: str = "affine", remedy: str = "repair the header"
                 ) -> tuple[np.ndarray, list[str]]:
    """The affine, checked and where possible corrected, with a warning for each correction.

    Args:
        remedy: where nothing can be made of it.

    Raises:
        VolumeError: AFFINE_NONFINITE, AFFINE_SINGULAR or AFFINE_SHEAR.
    """
    if not (np.abs(affine) <= _MAX_ENTRY_MM).all():
        raise VolumeError("AFFINE_NONFINITE", where, f"the {name} has NaN, infinite or absurdly large entries", remedy)
    linear = affine[:3, :3]
    lengths = np.linalg.norm(linear, axis=0)
    directions = linear / np.where(lengths > 0, lengths, 1)
    if (lengths == 0).any() or abs(np.linalg.det(directions)) < 1e-3:
        raise VolumeError("AFFINE_SINGULAR", where, f"the {name} does not map voxels to three directions of space",
                          remedy)
    gram = directions.T @ directions
    cosine = float(np.abs(gram - np.diag(np.diag(gram))).max())
    if cosine <= _ROUNDING_COSINE:
        return affine, []
    if cosine > _MAX_COSINE:
        raise VolumeError("AFFINE_SHEAR", where, f"the {name} is sheared: expected axes at right angles, got a cosine "
                          f"of {cosine:.4f}", "resample the scan to an orthogonal grid first")
    u, _, vt = np.linalg.svd(directions)
    repaired = affine.copy()
    repaired[:3, :3] = (u @ vt) * lengths
    return repaired, [f"the {name} is off right angles by a cosine of {cosine:.5f}; the nearest rotation is taken"]


def check_extent(affine: np.ndarray, shape: tuple[int, int, int], where: str | Path, options: ReadOptions) -> list[str]:
    """Refuse spacings and fields of view that no CT of a human has; a list of warnings where that is forced.

    Raises:
        VolumeError: SPACING.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    fov = spacing * shape
    spacing_text = " x ".join(f"{s:.4g}" for s in spacing)
    fov_text = " x ".join(f"{f:.4g}" for f in fov)
    fault = None
    if (spacing < _MIN_SPACING_MM).any() or (spacing > _MAX_SPACING_MM).any():
        fault = f"expected spacings from {_MIN_SPACING_MM} to {_MAX_SPACING_MM:g} mm, got {spacing_text}"
    elif (fov < _MIN_FOV_MM).any() or (fov > _MAX_FOV_MM).any():
        fault = f"expected a field of view from {_MIN_FOV_MM:g} to {_MAX_FOV_MM:g} mm, got {fov_text}"
    if fault is None:
        return []
    if options.force:
        return [f"accepted by force: {fault}"]
    raise VolumeError("SPACING", where, fault,
                      options.remedy("force", True, "correct the header", ", or use {} if it is right"))


def demand_same_grid(labels: Segmentation, path: str | Path, other: Volume | Segmentation, what: str) -> list[str]:
    """Refuse labels that lie on another grid than what they belong to.

    Args:
        labels: of the file at `path`.
        other: what they belong to.
        what: it is called, with its article: "the scan".

    Returns:
        A warning with the distance, where headers that were rounded place the grids a little apart; else none.

    Raises:
        VolumeError: SHAPE or AFFINE_MISMATCH.
    """
    if labels.shape != other.shape:
        shape, expected = (" x ".join(map(str, s)) for s in (labels.shape, other.shape))
        raise VolumeError("SHAPE", path, f"expected {expected} voxels (z, y, x) as {what} has, got {shape}",
                          f"export it on the grid of {what}")
    apart = grid_apart_vox(other, labels)
    if not same_grid(other, labels, SAME_GRID_VOX):
        raise VolumeError("AFFINE_MISMATCH", path, f"expected the grid of {what}, got one whose corners lie "
                          f"{apart:.3g} voxels off (up to {SAME_GRID_VOX:g} would be taken)",
                          f"export it on the grid of {what}")
    if apart <= _ROUNDING_VOX:
        return []
    return [f"its grid lies {apart:.2g} voxels off that of {what}; it is taken as the same"]


def corners_apart_vox(a: np.ndarray, b: np.ndarray, shape: tuple[int, int, int]) -> float:
    """The largest distance of a grid's corners under two affines, in voxels of the finer one."""
    far = np.array([(i, j, k, 1.0) for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    far[:, :3] *= np.array(shape) - 1
    apart_mm = np.linalg.norm((far @ (a - b).T)[:, :3], axis=1).max()
    finest = min(np.linalg.norm(m[:3, :3], axis=0).min() for m in (a, b))
    return float(apart_mm / finest)
