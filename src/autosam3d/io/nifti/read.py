"""Reads NIfTI files: a CT as `Volume`, a label map as `Segmentation`. A file is read and checked as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from autosam3d.errors import VolumeError
from autosam3d.io.grid import check_extent, source_grid
from autosam3d.io.inflate import ByteStream
from autosam3d.io.memory import demand_ram, size_text
from autosam3d.io.nifti.header import NIFTI2_BYTES, NiftiHeader, parse_header
from autosam3d.io.options import DEFAULTS, ReadOptions
from autosam3d.io.voxels import as_ct, as_labels
from autosam3d.volume import Segmentation, SourceGrid, Volume

# NIfTI extension code for a comment in plain text. *Source*: nifti1_io.h, NIFTI_ECODE_COMMENT.
COMMENT_ECODE = 6
ORGANS_KEY = "autosam3d_organs"
_MAX_SIDE_CAR_BYTES = 1 << 20


def read_nifti_ct(path: str | Path, options: ReadOptions = DEFAULTS) -> Volume:
    """A CT from .nii or .nii.gz, NIfTI-1 or NIfTI-2, as float32 HU [z, y, x] nearest RAS+.

    The whole file is read and its checksum compared. What the reader corrects is listed in `Volume.warnings`; what has
    more than one meaning is refused.

    Raises:
        VolumeError: the scan is broken or is not CT in Hounsfield units; the codes are those of `io.nifti.header`,
            `io.grid`, `io.intensity` and `io.inflate`, and FEW_SLICES.
        ResourceError: MEMORY, before anything large is allocated.
        UsageError: VOLUME_INDEX.
    """
    header, stored, source, warnings, _ = _read(path, options, bytes_per_voxel=4)
    return as_ct(stored, source, (header.slope, header.intercept), path, options, warnings)


def read_nifti_labels(path: str | Path, options: ReadOptions = DEFAULTS) -> Segmentation:
    """A label map from .nii or .nii.gz as uint8 (or uint16, beyond 255) [z, y, x] nearest RAS+.

    Organ names come from this package's NIfTI extension, else from the side-car ``NAME.json``, else there are none.

    Raises:
        VolumeError: as `read_nifti_ct` for file and grid; LABEL_FLOAT where values are no whole numbers (a label
            map that was resampled by interpolation); LABEL_RANGE for values below 0 or above 65535.
        ResourceError: MEMORY.
    """
    header, stored, source, warnings, extensions = _read(path, options, bytes_per_voxel=2)
    organs = _organs_in(extensions) or _organs_beside(Path(path))
    return as_labels(stored, source, (header.slope, header.intercept), path, warnings, organs)


def _read(path: str | Path, options: ReadOptions, bytes_per_voxel: int
          ) -> tuple[NiftiHeader, np.ndarray, SourceGrid, list[str], bytes]:
    """(header, stored values [i, j, k], grid, warnings, extension bytes) of a file read to its end."""
    _refuse_pairs(Path(path))
    with ByteStream(path) as stream:
        start = stream.read_upto(NIFTI2_BYTES)
        header = parse_header(start, path, stream.max_bytes, options)
        warnings = list(header.warnings)
        if stream.is_gzip != str(path).lower().endswith(".gz"):
            warnings.append("the file is " + ("gzip" if stream.is_gzip else "not gzip") + ", whatever its name says")
        warnings += check_extent(header.affine, header.shape, path, options)
        demand_ram(header.data_bytes + bytes_per_voxel * header.num_voxels, path, options.max_ram_bytes)
        before = (start + stream.read_upto(max(0, header.data_offset - len(start))))[len(header.raw) :]
        data = np.empty(header.data_bytes, np.uint8)
        # The start is as long as a NIfTI-2 header; of a NIfTI-1 file it may hold the first voxels.
        early = np.frombuffer(start[header.data_offset :][: data.size], np.uint8)
        data[: early.size] = early
        got = early.size + stream.read_into(data.data[early.size :])
        if got < data.size:
            raise VolumeError("SIZE", path, f"the header claims {size_text(data.size)} of voxels, the file has "
                              f"{size_text(got)}", "the file is cut or its header is wrong; copy it again")
        stream.finish(header.data_offset + header.data_bytes)
    volumes = data.view(header.dtype).reshape((header.num_volumes, *header.shape[::-1]))
    stored = volumes[options.volume_of(header.num_volumes)].T
    source = source_grid("nifti", header.shape, header.affine, header.raw)
    return header, stored, source, warnings, before[: header.data_offset - len(header.raw)]


def _refuse_pairs(path: Path) -> None:
    if path.name.lower().removesuffix(".gz").endswith((".hdr", ".img")):
        raise VolumeError("PAIR", path, "a .hdr/.img pair is not read", "convert it to one .nii.gz file")


def _organs_in(extensions: bytes) -> dict[int, str]:
    """The names in this package's comment extension; {} where there is none or it is damaged.

    *Source* of the layout: nifti1.h, 4 flag bytes, then (esize, ecode, esize - 8 bytes) each.
    """
    if len(extensions) < 4 or extensions[0] == 0:
        return {}
    for order in ("<", ">"):
        at = 4
        while at + 8 <= len(extensions):
            size, code = (int(n) for n in np.frombuffer(extensions[at : at + 8], f"{order}i4"))
            if size < 16 or size % 16 or at + size > len(extensions):
                break
            if code == COMMENT_ECODE:
                organs = _organs_from_json(extensions[at + 8 : at + size].rstrip(b"\0"), ORGANS_KEY)
                if organs:
                    return organs
            at += size
    return {}


def _organs_beside(path: Path) -> dict[int, str]:
    """The names in the side-car ``NAME.json``; {} where there is none."""
    side_car = path.with_name(stem_of(path) + ".json")
    try:
        if not side_car.is_file() or side_car.stat().st_size > _MAX_SIDE_CAR_BYTES:
            return {}
        return _organs_from_json(side_car.read_bytes(), "organs")
    except OSError:
        return {}


def stem_of(path: str | Path) -> str:
    """The file name without .nii or .nii.gz."""
    name = Path(path).name
    for suffix in (".nii.gz", ".nii"):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def _organs_from_json(text: bytes, key: str) -> dict[int, str]:
    try:
        tree: Any = json.loads(text)
        names = tree[key]
        return {int(value): name for value, name in names.items() if isinstance(name, str) and int(value) > 0}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
