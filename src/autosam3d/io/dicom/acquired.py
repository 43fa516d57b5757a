"""Slices as a scanner made them, and the straight, even grid that they are resampled to: there and back.

A tilted gantry lets a stack lean: each slice is shifted in its own plane against the one below. Slices may also lie at
uneven heights. Models and readers of NIfTI know straight grids alone, DICOM results belong to the slices.
"""

from __future__ import annotations

import numpy as np

from autosam3d.volume import AcquiredSlices, SourceGrid


def even_heights(voxels: np.ndarray, heights_mm: np.ndarray, step_mm: float) -> np.ndarray:
    """float32 [slice, row, column] at even heights by linear interpolation between neighbours; the last one lies at or
    below the last given."""
    num_slices = int(np.floor(heights_mm[-1] / step_mm + 1e-6)) + 1
    resampled = np.empty((num_slices, *voxels.shape[1:]), np.float32)
    for index in range(num_slices):
        height = index * step_mm
        above = int(np.clip(np.searchsorted(heights_mm, height), 1, len(heights_mm) - 1))
        weight = np.clip((height - heights_mm[above - 1]) / (heights_mm[above] - heights_mm[above - 1]), 0, 1)
        resampled[index] = (1 - weight) * voxels[above - 1] + weight * voxels[above]
    return resampled


def straightened(voxels: np.ndarray, shifts: np.ndarray, air: float) -> np.ndarray:
    """The stack [slice, row, column] with each slice moved by its shift, linearly interpolated, air around it.

    Args:
        voxels: float32.
        shifts: [slice, 2], columns and rows, not negative.
        air: the value of what no slice reaches.
    """
    columns, rows = (int(np.ceil(shift - 1e-6)) for shift in shifts.max(axis=0))
    out = np.full((len(voxels), voxels.shape[1] + rows, voxels.shape[2] + columns), air, np.float32)
    for plane, slice_hu, (right, down) in zip(out, voxels, shifts, strict=True):
        plane[:] = _moved(_moved(slice_hu, down, rows, 0, air), right, columns, 1, air)
    return out


def _moved(plane: np.ndarray, shift: float, room: int, axis: int, air: float) -> np.ndarray:
    """The plane, `room` longer along one axis, moved by `shift` of at most that; beyond its ends is air. A border voxel
    keeps its value up to half a voxel outwards, so that tissue that the field of view cuts is not mixed with air."""
    length = plane.shape[axis]
    at = np.arange(length + room) - shift
    below = np.clip(np.floor(at), 0, length - 1).astype(np.intp)
    above = np.minimum(below + 1, length - 1)
    weight = np.clip(at - below, 0, 1).astype(np.float32)
    weight = weight[:, None] if axis == 0 else weight
    low, high = plane.take(below, axis), plane.take(above, axis)
    moved = low + (high - low) * weight
    outside = (at < -0.5) | (at > length - 0.5)
    moved[(outside, slice(None)) if axis == 0 else (slice(None), outside)] = air
    return moved


def as_acquired(planes: np.ndarray, source: SourceGrid) -> np.ndarray:
    """Labels [slice, row, column] of the grid on the slices as they were acquired: of each voxel of a slice the voxel
    of the grid that its centre lies in."""
    acquired = source.acquired
    if acquired is None:
        return planes
    rows, columns = acquired.shape
    out = np.zeros((len(acquired.heights), rows, columns), planes.dtype)
    for plane, height, (right, down) in zip(out, acquired.heights, acquired.shifts, strict=True):
        z = int(np.clip(np.rint(height), 0, len(planes) - 1))
        y = np.clip(np.rint(np.arange(rows) + down), 0, planes.shape[1] - 1).astype(np.intp)
        x = np.clip(np.rint(np.arange(columns) + right), 0, planes.shape[2] - 1).astype(np.intp)
        plane[:] = planes[z][y[:, None], x]
    return out


def slice_shape(source: SourceGrid) -> tuple[int, int, int]:
    """(slices, rows, columns) as they were acquired."""
    if source.acquired is None:
        columns, rows, slices = source.shape
        return slices, rows, columns
    return len(source.acquired.heights), *source.acquired.shape


def slice_heights(source: SourceGrid) -> np.ndarray:
    """float64 [slice], of each acquired slice, in slices of the grid."""
    return np.arange(source.shape[2], dtype=float) if source.acquired is None else source.acquired.heights


def slice_affines(source: SourceGrid) -> np.ndarray:
    """float64 [slice, 4, 4]: (column, row, slices of the grid above it) of each acquired slice to RAS+ mm."""
    moves = np.tile(np.eye(4), (slice_shape(source)[0], 1, 1))
    moves[:, 2, 3] = slice_heights(source)
    if source.acquired is not None:
        moves[:, :2, 3] = source.acquired.shifts
    return source.affine @ moves


def slice_centres(planes: np.ndarray, source: SourceGrid, values: list[int]) -> dict[int, np.ndarray]:
    """Label to its centre in RAS+ mm, of labels on the acquired slices; labels without a voxel are left out."""
    affines = slice_affines(source)
    centres = {}
    for value in values:
        places = [affine[:3] @ [columns.sum(), rows.sum(), 0, len(rows)]
                  for affine, (rows, columns) in zip(affines, (np.nonzero(p == value) for p in planes), strict=True)]
        count = int(np.count_nonzero(planes == value))
        if count:
            centres[value] = np.sum(places, axis=0) / count
    return centres


def acquired_slices(heights_mm: np.ndarray, step_mm: float, lean: np.ndarray, shape: tuple[int, int]
                    ) -> tuple[AcquiredSlices, np.ndarray]:
    """(where the slices lie on the grid, columns and rows by which the grid begins before the first slice).

    Args:
        heights_mm: of the slices, above the first.
        step_mm: between slices of the grid.
        lean: columns and rows a millimetre of height.
        shape: rows and columns of a slice.
    """
    shifts = heights_mm[:, None] * lean
    start = np.minimum(shifts.min(axis=0), 0)
    return AcquiredSlices(heights_mm / step_mm, shifts - start, shape), start
