"""NIfTI files out: a segmentation on the very grid of its scan, a CT, or any array with any affine.

Headers are built from nothing, so no free text of the input (names, dates, descriptions) can reach an output. Files
are written beside their place, read back, compared and renamed; equal input gives equal bytes.
"""

from __future__ import annotations

import errno
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti1 import header_dtype as _nifti1_dtype
from nibabel.nifti2 import Nifti2Header
from nibabel.nifti2 import header_dtype as _nifti2_dtype

from autosam3d.errors import ResourceError, UsageError, VolumeError
from autosam3d.io.files import FileToWrite, atomic_write_all
from autosam3d.io.grid import canonical_shape, from_canonical, grid_stored_as
from autosam3d.io.inflate import ByteStream
from autosam3d.io.nifti.header import NIFTI1_BYTES, NIFTI2_BYTES, REAL_TYPES, header_fields, header_length
from autosam3d.io.nifti.read import COMMENT_ECODE, ORGANS_KEY, stem_of
from autosam3d.io.nifti.side_cars import side_cars
from autosam3d.labels import LabelMap
from autosam3d.volume import Segmentation, SourceGrid, Volume

_MM = 2
_SCANNER = 1
_MAX_NIFTI1_EDGE = 32767
# What says where the voxels lie. Nothing else of an input's header is carried over.
_PLACE_FIELDS = ("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y",
                 "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units")
_QFORM_FIELDS = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
_SFORM_FIELDS = ("srow_x", "srow_y", "srow_z")
_COMPARE_BYTES = 1 << 20


def write_segmentation(
    path: str | Path, segmentation: Segmentation, label_map: LabelMap, *, overwrite: bool = True
) -> None:
    """Write labels onto the grid of the scan they belong to, with the scan's own transforms and axis order.

    Beside the image come ``NAME.json``, ``NAME.labels.txt`` (ITK-SNAP) and ``NAME.ctbl`` (3D Slicer); the organ names
    are also in the image, as a NIfTI comment extension. All files are complete before the first one appears, and
    the image appears last. Without a source, the grid is the segmentation's own, stored R, A, S.

    Args:
        path: ends with .nii.gz or .nii.
        segmentation: uint8 or uint16 labels [z, y, x].
        label_map: names, colours and codes of the labels.
        overwrite: whether an image of that name may be replaced.

    Raises:
        UsageError: OUTPUT_NAME, OUTPUT_EXISTS, OUTPUT_PATH.
        ResourceError: NO_SPACE, NOT_WRITABLE, IO; old files are untouched then.
    """
    if segmentation.labels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"labels: expected uint8 or uint16, got {segmentation.labels.dtype}")
    path = _checked_name(path, overwrite)
    source = segmentation.source or grid_stored_as(segmentation.shape, segmentation.affine, "RAS")
    dtype = np.dtype(np.uint8 if segmentation.labels.max(initial=0) <= 255 else np.uint16)
    comment = json.dumps({ORGANS_KEY: {str(value): name for value, name in label_map.by_index.items()}})
    image = _image_file(path, segmentation.labels, source, dtype, comment)
    atomic_write_all([*side_cars(path.parent, stem_of(path), label_map), image])


def write_ct(path: str | Path, volume: Volume, *, axis_codes: str | None = None, overwrite: bool = True) -> None:
    """Write a CT as 16-bit integer HU, rounded and clipped to that range; numbers of another scale exactly.

    Args:
        path: ends with .nii.gz or .nii.
        axis_codes: store it in this orientation, for example "LPS"; None keeps the orientation of `volume.source`,
            or R, A, S without one.

    Raises:
        As `write_segmentation`.
    """
    path = _checked_name(path, overwrite)
    if axis_codes is not None or volume.source is None:
        source = grid_stored_as(volume.shape, volume.affine, axis_codes or "RAS")
    else:
        source = volume.source
    stored = np.clip(np.rint(volume.voxels_hu), -32768, 32767).astype(np.int16)
    if volume.intensity == "raw" and not np.array_equal(stored, volume.voxels_hu):
        stored = volume.voxels_hu
    atomic_write_all([_image_file(path, stored, source, stored.dtype, None)])


def write_array(path: str | Path, array: np.ndarray, affine: np.ndarray, *, overwrite: bool = True) -> None:
    """Write real numbers [i, j, k] as they lie, with any affine (file voxel indexes to RAS+ mm).

    Raises:
        As `write_segmentation`.
    """
    path = _checked_name(path, overwrite)
    if array.ndim != 3 or np.shape(affine) != (4, 4):
        raise ValueError(f"expected a 3D array and a 4x4 affine, got {array.shape} and {np.shape(affine)}")
    source = SourceGrid("array", array.shape, np.asarray(affine, float), (0, 1, 2), (False, False, False))
    atomic_write_all([_image_file(path, array.T, source, array.dtype, None)])


def _checked_name(path: str | Path, overwrite: bool) -> Path:
    path = Path(path)
    if not path.name.lower().endswith((".nii", ".nii.gz")) or not stem_of(path):
        raise UsageError("OUTPUT_NAME", path, "expected a name that ends with .nii.gz or .nii", "rename the output")
    if not overwrite and path.exists():
        raise UsageError("OUTPUT_EXISTS", path, "the output exists", "choose another name or allow --overwrite")
    return path


def _image_file(path: Path, array: np.ndarray, source: SourceGrid, dtype: np.dtype, comment: str | None) -> FileToWrite:
    """The image as an entry for `atomic_write_all`; `array` is [z, y, x] in memory order."""
    if array.shape != canonical_shape(source):
        raise ValueError(f"expected shape {canonical_shape(source)} for the source's grid, got {array.shape}")
    extension = _extension(comment)
    head = _header(source, dtype, len(extension)) + extension
    # NIfTI lets the first axis run fastest, so the transposed array is written in C order.
    voxels = np.ascontiguousarray(from_canonical(array, source).T, dtype=dtype.newbyteorder("<"))
    parts = (np.frombuffer(head, np.uint8), voxels.reshape(-1).view(np.uint8))
    packed = path.name.lower().endswith(".gz")
    size = None if packed else sum(part.size for part in parts)
    return FileToWrite(path, _writer(parts, packed), _verifier(parts), size)


def _writer(parts: tuple[np.ndarray, ...], packed: bool) -> Callable[[Path], None]:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            if not packed:
                for part in parts:
                    file.write(part.data)
                return
            # No name and no time in the gzip header: equal content, equal bytes.
            with gzip.GzipFile("", "wb", compresslevel=4, fileobj=file, mtime=0) as stream:
                for part in parts:
                    stream.write(part.data)

    return write


def _verifier(parts: tuple[np.ndarray, ...]) -> Callable[[Path], None]:
    def verify(temporary: Path) -> None:
        try:
            with ByteStream(temporary) as stream:
                for part in parts:
                    for start in range(0, part.size, _COMPARE_BYTES):
                        meant = part[start : start + _COMPARE_BYTES]
                        if stream.read_upto(meant.size) != meant.tobytes():
                            raise OSError(errno.EIO, "what was read back differs from what was written")
                stream.finish(sum(part.size for part in parts))
        except (VolumeError, ResourceError) as error:
            raise OSError(errno.EIO, f"what was written cannot be read back: {error.fault}") from None

    return verify


def _extension(comment: str | None) -> bytes:
    """The four flag bytes, and the comment as an extension: size and code, text, zeros to a multiple of 16."""
    if comment is None:
        return bytes(4)
    text = comment.encode()
    size = -(-(len(text) + 8) // 16) * 16
    return b"\x01\0\0\0" + np.array([size, COMMENT_ECODE], "<i4").tobytes() + text.ljust(size - 8, b"\0")


def _header(source: SourceGrid, dtype: np.dtype, extension_bytes: int) -> bytes:
    """348 or 540 bytes, little-endian, that place the voxels as the source does."""
    length = _header_length(source)
    layout = _nifti1_dtype if length == NIFTI1_BYTES else _nifti2_dtype
    fields: Any = np.zeros((), layout.newbyteorder("<"))
    fields["sizeof_hdr"] = length
    fields["magic"] = b"n+1" if length == NIFTI1_BYTES else b"n+2"
    if length == NIFTI2_BYTES:
        fields["eol_check"] = (13, 10, 26, 10)
    fields["dim"] = (3, *source.shape, 1, 1, 1, 1)
    fields["pixdim"] = 1
    code = next((c for c, name in REAL_TYPES.items() if np.dtype(name) == dtype), None)
    if code is None:
        raise ValueError(f"expected an array of real numbers, got {dtype}")
    fields["datatype"], fields["bitpix"] = code, 8 * dtype.itemsize
    fields["vox_offset"] = length + extension_bytes
    fields["scl_slope"] = 1
    place = header_fields(source.header) if source.header is not None else _place_of(source.affine, length)
    for name in _PLACE_FIELDS:
        fields[name] = place[name]
    fields["pixdim"][:4] = place["pixdim"][:4]
    _drop_broken(fields)
    return fields.tobytes()


def _header_length(source: SourceGrid) -> int:
    if source.header is not None:
        found = header_length(source.header)
        assert found is not None, "a source's header has been read before"
        return found[0]
    return NIFTI1_BYTES if max(source.shape) <= _MAX_NIFTI1_EDGE else NIFTI2_BYTES


def _place_of(affine: np.ndarray, length: int) -> Any:
    """The placing fields of an affine without a header of its own."""
    header = Nifti1Header() if length == NIFTI1_BYTES else Nifti2Header()
    header.set_data_shape((1, 1, 1))
    header.set_qform(affine, _SCANNER)
    header.set_sform(affine, _SCANNER)
    header.structarr["xyzt_units"] = _MM
    return header.structarr


def _drop_broken(fields: Any) -> None:
    """A transform with NaN, from a scan that was read by the other one, must not be handed on."""
    if not all(np.isfinite(fields[name]).all() for name in _SFORM_FIELDS):
        fields["sform_code"] = 0
        for name in _SFORM_FIELDS:
            fields[name] = 0
    if not all(np.isfinite(fields[name]).all() for name in (*_QFORM_FIELDS, "pixdim")):
        fields["qform_code"] = 0
        for name in _QFORM_FIELDS:
            fields[name] = 0
        fields["pixdim"][:4] = 1
