"""What a scan and a segmentation are, once they are in memory.

Arrays are indexed [z, y, x]: z grows to the head (S), y to the front (A), x to the right (R), as near as the
file's axes allow. The affine maps voxel (x, y, z) to world millimetres, RAS+, as nibabel has it. The order of the
file is kept in `SourceGrid`, which only `io` uses.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from autosam3d.axes import Size

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AcquiredSlices:
    """Where the slices of a DICOM series lie on the grid that they were resampled to.

    Voxel (column, row) of slice `k` lies at ``(column + shifts[k, 0], row + shifts[k, 1], heights[k])`` of the grid.
    """

    heights: np.ndarray
    """float64 [slice], in slices of the grid."""
    shifts: np.ndarray
    """float64 [slice, 2], columns and rows."""
    shape: tuple[int, int]
    """Rows and columns of each slice."""


@dataclass(frozen=True)
class SourceGrid:
    """How the file stored the array, so that a segmentation can be written back onto the same grid.

    Canonical axis ``i`` (0 = x, 1 = y, 2 = z) is the file's axis ``axis_of[i]``, reversed where ``flipped[i]``.
    """

    kind: str
    """"nifti", "dicom" or "array"."""
    shape: tuple[int, int, int]
    """In the file's own axis order."""
    affine: np.ndarray
    """4x4, the file's voxel indexes to RAS+ mm, as the file has it."""
    axis_of: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]
    header: bytes | None = None
    """The NIfTI header's own bytes; None for other kinds."""
    acquired: AcquiredSlices | None = None
    """Of a DICOM series whose slices lean or lie unevenly; None where they are the grid's own."""


@dataclass(frozen=True)
class Volume:
    """One CT scan.

    Attributes:
        voxels_hu: float32 [z, y, x] in Hounsfield units, or as they are stored where `intensity` is raw.
        affine: 4x4 float64, voxel (x, y, z) to RAS+ mm, for `voxels_hu` as it lies here.
        source: the grid of the file it came from, None for an array made in memory.
        warnings: what the reader put right or found odd, one sentence each.
        name: what messages call it; of a scan that was read, its path.
        intensity: what the numbers are.
    """

    voxels_hu: np.ndarray
    affine: np.ndarray
    source: SourceGrid | None = None
    warnings: tuple[str, ...] = ()
    name: str = "scan"
    intensity: Literal["hu", "raw"] = "hu"

    def __post_init__(self) -> None:
        if self.voxels_hu.ndim != 3:
            raise ValueError(f"voxels_hu: expected 3 axes [z, y, x], got shape {self.voxels_hu.shape}")
        if np.shape(self.affine) != (4, 4):
            raise ValueError(f"affine: expected 4x4, got shape {np.shape(self.affine)}")

    def __repr__(self) -> str:
        """One line without arrays and without the folder, which may name a patient."""
        return f"Volume({Path(self.name).name}, {_grid_text(self)})"

    @property
    def shape(self) -> Size:
        """Voxels (z, y, x)."""
        return self.voxels_hu.shape  # type: ignore[return-value]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """(z, y, x), in the order of the array."""
        return spacing_of(self.affine)


@dataclass(frozen=True)
class Segmentation:
    """Integer labels on a grid.

    Attributes:
        labels: uint8 or uint16 [z, y, x]; 0 is background.
        affine: as in `Volume`.
        source: as in `Volume`.
        organs: label value to organ name, where the file or the model says so.
        warnings: as in `Volume`, and what the segmentation itself found.
        confidence: of a model's result, label value to the mean probability that the model gave the voxels which it
            won, 0 to 1; not a chance of being right.
    """

    labels: np.ndarray
    affine: np.ndarray
    source: SourceGrid | None = None
    organs: dict[int, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    confidence: dict[int, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        """One line without arrays."""
        return f"Segmentation({_grid_text(self)}, {names_text(self.organs.values())})"

    @property
    def shape(self) -> Size:
        """Voxels (z, y, x)."""
        return self.labels.shape  # type: ignore[return-value]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """(z, y, x), in the order of the array."""
        return spacing_of(self.affine)

    def volume_ml(self, label: int) -> float:
        """The volume of one label in millilitres; 0.0 where no voxel has it."""
        voxel_mm3 = math.prod(self.spacing_mm)
        return float(np.count_nonzero(self.labels == label)) * voxel_mm3 / 1000


def names_text(names: Iterable[str], most: int = 5) -> str:
    """How many organs and which, the first `most` by name: "13 organs: spleen, right_kidney, ...": for one line."""
    names = list(names)
    if not names:
        return "no organ names"
    shown = [*names[:most], *(["..."] if len(names) > most else [])]
    return f"{len(names)} {'organ' if len(names) == 1 else 'organs'}: {', '.join(shown)}"


def _grid_text(image: Volume | Segmentation) -> str:
    shape, spacing = " x ".join(map(str, image.shape)), " x ".join(f"{mm:.4g}" for mm in image.spacing_mm)
    return f"{shape} voxels of {spacing} mm [z, y, x]"


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Voxel edge lengths (z, y, x) in mm of an affine whose columns are (x, y, z)."""
    x, y, z = np.linalg.norm(np.asarray(affine, float)[:3, :3], axis=0)
    return float(z), float(y), float(x)


SAME_GRID_VOX = 0.05
"""How far the corners of two grids may lie apart that are still one: headers round origins and spacings, and a
twentieth of a voxel moves no label."""


def same_grid(a: Volume | Segmentation, b: Volume | Segmentation, tolerance_vox: float = 1e-3) -> bool:
    """True where shapes agree and no corner of the one lies further than `tolerance_vox` voxels from the other's."""
    return a.shape == b.shape and grid_apart_vox(a, b) <= tolerance_vox + 1e-5  # what float32 headers leave of a limit


def grid_apart_vox(a: Volume | Segmentation, b: Volume | Segmentation) -> float:
    """How far the corners of two grids of one shape lie apart, along an axis of space, in the shortest voxel edge of
    `a`."""
    far = np.array([(x, y, z, 1.0) for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    far[:, :3] *= np.array(a.shape[::-1]) - 1
    apart_mm = np.abs((far @ (np.asarray(a.affine) - np.asarray(b.affine)).T)[:, :3]).max()
    return float(apart_mm / min(a.spacing_mm))


def log_warnings(where: str | Path, warnings: Iterable[str]) -> tuple[str, ...]:
    """Log each warning under `where`, the name of what it is about, and return them all as a tuple."""
    warnings = tuple(warnings)
    for warning in warnings:
        _log.warning("%s: %s", where, warning)
    return warnings
