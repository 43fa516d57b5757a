"""What a NRRD or MetaImage header says, whichever of the two it was.

Both are a few lines of text before the voxels. They are read here and not by a library: of 60 single flipped bits in
compressed voxels SimpleITK 2.5.7 took 8 in a NRRD file and all 60 in a MetaImage, and it takes a file without an
orientation for one that has it. The formats are small, and the checks of NIfTI files hold for them as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from autosam3d.errors import VolumeError
from autosam3d.io.options import ReadOptions

MAX_HEADER_BYTES = 1 << 20
EXPORT = "export the scan again"


@dataclass(frozen=True, kw_only=True)
class ItkHeader:
    """A sound header.

    Attributes:
        kind: the format's name, for messages.
        shape: three axes in the file's order, the fastest first.
        num_volumes: of a file with a fourth axis; 1 otherwise.
        volumes_interleaved: whether the fourth axis is the fastest one.
        dtype: of the voxels, with byte order.
        affine: 4x4, file voxel indexes to RAS+ mm.
        data_path: of the file that holds the voxels: the header's own, or one beside it.
        data_offset: of the voxels there; -1 where they end the file.
        compression: of the voxels.
        organs: label value to organ, where the header names them.
    """

    kind: str
    shape: tuple[int, int, int]
    num_volumes: int
    volumes_interleaved: bool
    dtype: np.dtype
    affine: np.ndarray
    data_path: Path
    data_offset: int
    compression: Literal["gzip", "zlib"] | None
    organs: dict[int, str]
    warnings: tuple[str, ...]

    @property
    def num_voxels(self) -> int:
        return math.prod(self.shape)

    @property
    def data_bytes(self) -> int:
        return self.num_voxels * self.num_volumes * self.dtype.itemsize


def header_error(path: str | Path, fault: str) -> VolumeError:
    """HEADER, for what a whole file's header says never."""
    return VolumeError("HEADER", path, fault, f"the header is damaged; {EXPORT}")


def field_error(path: str | Path, line: str) -> VolumeError:
    """HEADER, for a line that cannot be understood."""
    shown = "".join(filter(str.isprintable, line))[:40]
    return header_error(path, f"a line is no field, or stands twice: {shown!r}")


def no_orientation(path: str | Path, fields: str, options: ReadOptions) -> VolumeError:
    """NO_ORIENTATION, for a file without the fields that say where left and right are."""
    remedy = options.remedy("assume_ras", True, "convert it from the original scan",
                            ", or use {} if it is stored right, anterior, superior")
    return VolumeError("NO_ORIENTATION", path, f"expected {fields}: left and right are unknown", remedy)


def demand_spacings(spacings: np.ndarray, path: str | Path) -> None:
    """Raises VolumeError SPACING where one is no length."""
    if not (np.isfinite(spacings).all() and (spacings > 0).all()):
        listed = ", ".join(f"{s:g}" for s in spacings)
        raise VolumeError("SPACING", path, f"expected positive spacings, got {listed}", EXPORT)


def demanded(fields: Mapping[str, str], name: str, path: str | Path) -> str:
    """The text of a field. Raises VolumeError HEADER where there is none."""
    if name not in fields:
        raise header_error(path, f"expected the field {name}, got none")
    return fields[name]


def whole_numbers(text: str, path: str | Path, field: str) -> list[int]:
    """Sizes and the like. Raises VolumeError DIMS where they are none."""
    try:
        found = [int(word) for word in text.split()]
    except ValueError:
        found = []
    if not found or any(not 0 < n < 1 << 31 for n in found):
        raise VolumeError("DIMS", path, f"expected positive whole numbers for {field}, got {text[:40]!r}", EXPORT)
    return found


def numbers(text: str, count: int, path: str | Path, field: str) -> np.ndarray:
    """float64 [count]; NaN and infinity are left for the affine's own check. Raises VolumeError HEADER."""
    try:
        found = np.array([float(word) for word in text.split()])
    except ValueError:
        found = np.empty(0)
    if len(found) != count:
        raise header_error(path, f"expected {count} numbers for {field}, got {text[:40]!r}")
    return found


def demand_volume(num_volumes: int, sizes: Sequence[int], path: str | Path, options: ReadOptions, remedy: str
                  ) -> list[str]:
    """Of a file with a fourth axis: a warning where one volume is or was chosen.

    Raises:
        VolumeError: NDIM. UsageError: VOLUME_INDEX.
    """
    index = options.volume_index
    if index is not None and not options.has_volume(num_volumes):
        raise options.no_volume(path, num_volumes)
    if num_volumes > 1 and index is None:
        raise VolumeError("NDIM", path, f"expected one 3D scan, got {num_volumes} volumes "
                          f"({' x '.join(map(str, sizes))})", remedy)
    if num_volumes > 1:
        return [f"volume {index} of {num_volumes} is taken"]
    return ["4D with one volume is taken as 3D"] if len(sizes) > 3 else []
