"""NRRD and MetaImage files in, told from NIfTI by their first bytes: a CT as `Volume`, labels as `Segmentation`."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from autosam3d.errors import VolumeError
from autosam3d.io.files import open_regular, readable
from autosam3d.io.grid import check_affine, check_extent, source_grid
from autosam3d.io.itk.header import MAX_HEADER_BYTES, ItkHeader
from autosam3d.io.itk.metaimage import LAST_KEY, parse_metaimage
from autosam3d.io.itk.nrrd import MAGIC, parse_nrrd
from autosam3d.io.itk.payload import read_payload
from autosam3d.io.options import DEFAULTS, ReadOptions
from autosam3d.io.voxels import as_ct, as_labels
from autosam3d.volume import Segmentation, SourceGrid, Volume

_META_START = re.compile(rb"\s*(ObjectType|NDims|Comment)\s*=")
_META_END = re.compile(rb"^" + LAST_KEY.encode() + rb"\s*=[^\n]*\n", re.MULTILINE)
_NRRD_END = re.compile(rb"\n\r?\n")


def is_itk(path: str | Path) -> bool:
    """Whether a file begins as a NRRD or a MetaImage does; False where it cannot be looked at.

    Raises:
        VolumeError: NOT_A_FILE, UNREADABLE. ResourceError: IO.
    """
    with open_regular(path) as file, readable(path):
        start = file.read(64)
    return MAGIC.match(start) is not None or _META_START.match(start) is not None


def files_of(path: str | Path) -> list[Path]:
    """The files that hold a scan: a .mhd names another one for its voxels; of every other name it is itself.

    Raises:
        VolumeError: as `read_itk_ct` for the header, where there is one.
    """
    path = Path(path)
    if not path.name.lower().endswith(".mhd") or not is_itk(path):
        return [path]
    data_path = _header(path, ReadOptions(assume_ras=True, volume_index=0)).data_path
    return [path] if data_path == path else [path, data_path]


def read_itk_ct(path: str | Path, options: ReadOptions = DEFAULTS) -> Volume:
    """A CT from .nrrd, .mha or .mhd as float32 HU [z, y, x] nearest RAS+.

    Raises:
        VolumeError: the scan is broken, ambiguous or not CT in Hounsfield units: the codes of `io.itk`, `io.grid`,
            `io.intensity`, and FEW_SLICES.
        ResourceError: MEMORY, before anything large is allocated.
        UsageError: VOLUME_INDEX.
    """
    _, stored, source, warnings = _read(Path(path), options, bytes_per_voxel=4)
    return as_ct(stored, source, (1.0, 0.0), path, options, warnings)


def read_itk_labels(path: str | Path, options: ReadOptions = DEFAULTS) -> Segmentation:
    """A label map from .nrrd, .seg.nrrd, .mha or .mhd as uint8 (or uint16, beyond 255) [z, y, x] nearest RAS+.

    Organ names are those of 3D Slicer's segments, where the file has them.

    Raises:
        VolumeError: as `read_itk_ct` for file and grid; LABEL_FLOAT, LABEL_RANGE. ResourceError: MEMORY.
    """
    header, stored, source, warnings = _read(Path(path), options, bytes_per_voxel=2)
    return as_labels(stored, source, (1.0, 0.0), path, warnings, header.organs)


def _read(path: Path, options: ReadOptions, bytes_per_voxel: int
          ) -> tuple[ItkHeader, np.ndarray, SourceGrid, list[str]]:
    """(header, stored numbers [i, j, k] of the one volume, grid, warnings)."""
    header = _header(path, options)
    affine, repaired = check_affine(header.affine, path, f"{header.kind} header's transform")
    warnings = [*header.warnings, *repaired, *check_extent(affine, header.shape, path, options)]
    stored = read_payload(header, bytes_per_voxel, options.max_ram_bytes)[options.volume_of(header.num_volumes)]
    return header, stored, source_grid(header.kind.lower(), header.shape, affine), warnings


def _header(path: Path, options: ReadOptions) -> ItkHeader:
    with open_regular(path) as file, readable(path):
        start = file.read(MAX_HEADER_BYTES)
    magic = MAGIC.match(start)
    end = (_NRRD_END if magic else _META_END).search(start, magic.end() - 1 if magic else 0)
    if end is None:
        fault = "the file ends inside its header"
        if len(start) == MAX_HEADER_BYTES:
            fault = "expected a header of at most 1 MiB"
        raise VolumeError("TRUNCATED", path, fault, "copy or download it again")
    # Comments may be in any encoding of their time; what is read of a header is ASCII.
    text = start[magic.end() if magic else 0 : end.end()].decode("utf-8", errors="replace")
    return (parse_nrrd if magic else parse_metaimage)(text, end.end(), path, options)
