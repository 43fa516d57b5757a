"""The NIfTI header: read, checked, and turned into one affine in RAS+ millimetres.

nibabel and SimpleITK read the same odd header in different ways (units, missing codes, broken slopes, wrong magic);
each such case is decided here, once, or refused. *Source*: nifti1.h and nifti2.h of the NIfTI data format group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from nibabel.nifti1 import header_dtype as _nifti1_dtype
from nibabel.nifti2 import header_dtype as _nifti2_dtype
from nibabel.quaternions import quat2mat

from autosam3d.errors import VolumeError
from autosam3d.io.grid import check_affine, corners_apart_vox
from autosam3d.io.memory import size_text
from autosam3d.io.options import ReadOptions

NIFTI1_BYTES, NIFTI2_BYTES = 348, 540
# dtype codes whose voxels are one real number each.
REAL_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_REPAIR = "repair the header"
_OTHER_TYPES = {1: "1-bit", 32: "complex", 128: "RGB", 1536: "128-bit float", 1792: "complex", 2048: "complex",
                2304: "RGBA"}
_UNIT_MM = {1: (1000.0, "metres"), 2: (1.0, "millimetres"), 3: (0.001, "micrometres")}
# Real extensions have kilobytes; a larger offset is forged or damaged.
_MAX_OFFSET_BYTES = 1 << 26
_MAX_SLOPE = 1e6
_CONFLICT_VOX = 0.1
_TEXT_FIELDS = ("data_type", "db_name", "descrip", "aux_file", "intent_name")
_KNOWN_FORMATS = {b"NRRD": "NRRD", b"\x89HDF": "HDF5", b"PK\x03\x04": "a zip archive", b"BZh": "bzip2",
                  b"\x28\xb5\x2f\xfd": "zstandard", b"\xfd7zXZ": "xz", b"ObjectType": "MetaImage", b"<": "XML or HTML"}


@dataclass(frozen=True)
class NiftiHeader:
    """The content of a valid header.

    Attributes:
        shape: three axes in the file's order.
        num_volumes: of a 4D file; 1 otherwise.
        dtype: of the voxels, with byte order.
        affine: 4x4, file voxel indexes to RAS+ mm.
        slope, intercept: value = stored * slope + intercept.
        raw: the header's own 348 or 540 bytes, its free text blanked.
    """

    shape: tuple[int, int, int]
    num_volumes: int
    dtype: np.dtype
    data_offset: int
    affine: np.ndarray
    slope: float
    intercept: float
    raw: bytes
    warnings: tuple[str, ...]

    @property
    def data_bytes(self) -> int:
        """Of all volumes, as the file stores them."""
        return math.prod(self.shape) * self.num_volumes * self.dtype.itemsize

    @property
    def num_voxels(self) -> int:
        """Of one volume."""
        return math.prod(self.shape)


def header_length(start: bytes) -> tuple[int, Literal["<", ">"]] | None:
    """(bytes, byte order) by the first field, None where it is neither NIfTI-1 nor NIfTI-2."""
    orders: tuple[Literal["<"], Literal[">"]] = ("<", ">")
    for order in orders:
        length = int(np.frombuffer(start[:4], f"{order}i4")[0]) if len(start) >= 4 else 0
        if length in (NIFTI1_BYTES, NIFTI2_BYTES):
            return length, order
    return None


def header_fields(raw: bytes) -> np.void:
    """The fields of 348 or 540 header bytes, by nibabel's names, in the file's byte order.

    Raises:
        ValueError: the bytes are no header of NIfTI-1 or NIfTI-2.
    """
    found = header_length(raw)
    if found is None:
        raise ValueError("raw: expected the bytes of a NIfTI header")
    dtype = _nifti1_dtype if found[0] == NIFTI1_BYTES else _nifti2_dtype
    return np.frombuffer(raw[: found[0]], dtype.newbyteorder(found[1]))[0]


def parse_header(start: bytes, where: str | Path, max_bytes: int, options: ReadOptions) -> NiftiHeader:
    """Check every field that the voxels or their place depend on.

    Args:
        start: the first 540 bytes of the inflated file, or all of a shorter one.
        max_bytes: the most bytes that the file can hold.

    Raises:
        VolumeError: EMPTY, NOT_NIFTI, TRUNCATED, HEADER, PAIR, MAGIC, DIMS, NDIM, DTYPE, OFFSET, SIZE, SCALE,
            SPACING, NO_ORIENTATION, AFFINE_*.
        UsageError: VOLUME_INDEX.
    """
    length = _check_kind(start, where)
    fields = header_fields(start[:length])
    warnings: list[str] = []
    shape, num_volumes = _shape(fields, where, options, warnings)
    dtype = _dtype(fields, where)
    offset = _data_offset(fields, length, where, max_bytes)
    claimed = offset + math.prod(shape) * num_volumes * dtype.itemsize
    if claimed > max_bytes:
        size = "x".join(map(str, shape))
        raise VolumeError("SIZE", where, f"the header claims {size_text(claimed)} ({size} voxels), the file holds at "
                          f"most {size_text(max_bytes)}", "the file is cut or its header is wrong; copy it again")
    slope, intercept = _scaling(fields, where, warnings)
    affine = _affine(fields, shape, where, options, warnings)
    raw = _without_free_text(fields)
    return NiftiHeader(shape, num_volumes, dtype, offset, affine, slope, intercept, raw, tuple(warnings))


def _without_free_text(fields: np.void) -> bytes:
    """The header's bytes with its text fields blank, since these may hold names and dates of patients."""
    blank = np.empty((), fields.dtype)
    blank[...] = fields
    for name in set(_TEXT_FIELDS).intersection(blank.dtype.names or ()):
        blank[name] = b""
    return blank.tobytes()


def _check_kind(start: bytes, where: str | Path) -> int:
    """NIfTI-1 or NIfTI-2 in one file; the length of its header."""
    if not start:
        raise VolumeError("EMPTY", where, "the file is empty", "copy or export it again")
    found = header_length(start)
    if found is None:
        if start[344:348] == b"n+1\0" or start[4:8] == b"n+2\0":
            raise VolumeError("HEADER", where, "the first field, sizeof_hdr, is neither 348 nor 540",
                              "the header is damaged; export the scan again")
        raise VolumeError("NOT_NIFTI", where, f"expected a NIfTI file, got {_describe(start)}",
                          "give a .nii or .nii.gz file, or a folder with one DICOM series")
    length, _ = found
    if len(start) < length:
        raise VolumeError("TRUNCATED", where, f"the file ends inside its header, after {len(start)} bytes",
                          "copy or download it again")
    magic = start[344:348] if length == NIFTI1_BYTES else start[4:12]
    single, pair = (b"n+1\0", b"ni1\0") if length == NIFTI1_BYTES else (b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n")
    if magic == pair:
        raise VolumeError("PAIR", where, "this is the header of a .hdr/.img pair", "convert the pair to one .nii.gz")
    if magic != single:
        raise VolumeError("MAGIC", where, f"expected the magic {single[:3].decode()!r}, got {bytes(magic[:3])!r}",
                          "an ANALYZE file has no orientation: convert it from the original scan")
    return length


def _describe(start: bytes) -> str:
    if start[128:132] == b"DICM":
        return "one DICOM file"
    for magic, name in _KNOWN_FORMATS.items():
        if start.lstrip()[:16].startswith(magic):
            return name
    printable = "".join(chr(b) for b in start[:64] if 32 <= b < 127)[:20]
    return f"bytes that begin with {printable!r}"


def _shape(fields: Any, where: str | Path, options: ReadOptions, warnings: list[str]
           ) -> tuple[tuple[int, int, int], int]:
    """(three axes, number of volumes)."""
    dim = [int(n) for n in fields["dim"]]
    ndim = dim[0]
    if not 1 <= ndim <= 7 or any(n < 1 for n in dim[1 : ndim + 1]):
        raise VolumeError("DIMS", where, f"expected 1 to 7 positive dimensions, got dim = {dim}",
                          "the header is damaged; export the scan again")
    sizes = dim[1 : ndim + 1]
    text = " x ".join(map(str, sizes))
    if ndim < 3:
        raise VolumeError("NDIM", where, f"expected one 3D scan, got {ndim}D ({text})", "give the whole scan")
    shape = (sizes[0], sizes[1], sizes[2])
    if any(n > 1 for n in sizes[4:]):
        raise VolumeError("NDIM", where, f"expected one 3D scan, got {ndim}D ({text})", "split it into 3D files first")
    num_volumes = sizes[3] if ndim > 3 else 1
    index = options.volume_index
    if index is not None and not options.has_volume(num_volumes):
        raise options.no_volume(where, num_volumes)
    if num_volumes > 1 and index is None:
        raise VolumeError("NDIM", where, f"expected one 3D scan, got {num_volumes} volumes ({text})",
                          options.choose_volume())
    if num_volumes > 1:
        warnings.append(f"volume {index} of {num_volumes} is taken")
    elif ndim > 3:
        warnings.append(f"{ndim}D with one volume is taken as 3D")
    return shape, num_volumes


def _dtype(fields: Any, where: str | Path) -> np.dtype:
    code, bits = int(fields["datatype"]), int(fields["bitpix"])
    if code not in REAL_TYPES:
        kind = _OTHER_TYPES.get(code, f"the unknown data type {code}")
        raise VolumeError("DTYPE", where, f"expected one real number a voxel, got {kind}",
                          "export the scan as 16-bit integers")
    dtype = np.dtype(REAL_TYPES[code])
    if bits != 8 * dtype.itemsize:
        raise VolumeError("DTYPE", where, f"data type {code} has {8 * dtype.itemsize} bits, bitpix says {bits}",
                          "the header is damaged; export the scan again")
    return dtype.newbyteorder(fields.dtype["dim"].base.byteorder)


def _data_offset(fields: Any, length: int, where: str | Path, max_bytes: int) -> int:
    offset = float(fields["vox_offset"])
    # Four bytes of extension flags always follow the header.
    last = min(_MAX_OFFSET_BYTES, max_bytes)
    if not math.isfinite(offset) or offset != int(offset) or not length + 4 <= offset <= last:
        raise VolumeError("OFFSET", where, f"expected the voxels to start between byte {length + 4} and the end of the "
                          f"file, got vox_offset = {offset:g}", "the header is damaged; export the scan again")
    return int(offset)


def _scaling(fields: Any, where: str | Path, warnings: list[str]) -> tuple[float, float]:
    slope, intercept = float(fields["scl_slope"]), float(fields["scl_inter"])
    if slope == 0:
        if intercept != 0:
            warnings.append(f"scl_slope is 0, which means no scaling: scl_inter {intercept:g} is not applied")
        return 1.0, 0.0
    if not math.isfinite(slope) or not math.isfinite(intercept) or max(abs(slope), abs(intercept)) > _MAX_SLOPE:
        raise VolumeError("SCALE", where, f"expected a finite scaling, got scl_slope {slope:g} and scl_inter "
                          f"{intercept:g}", "export the scan again")
    return slope, intercept


def _affine(fields: Any, shape: tuple[int, int, int], where: str | Path, options: ReadOptions,
            warnings: list[str]) -> np.ndarray:
    """The transform that is used, in millimetres and with axes at right angles."""
    unit_code = int(fields["xyzt_units"]) & 7
    unit_mm, unit = _UNIT_MM.get(unit_code, (1.0, "unknown"))
    if unit_code != 2:
        taken = "converted to mm" if unit_code in _UNIT_MM else "mm is taken"
        warnings.append(f"the spatial unit is {unit}, {taken}")
    affine, name, other = _choose_transform(fields, shape, where, options, warnings)
    to_mm = np.array([[unit_mm]] * 3 + [[1.0]])
    with np.errstate(over="ignore"):  # checked at once
        affine, repaired = check_affine(affine * to_mm, where, name, _remedy(name, other is not None, options))
        warnings += repaired
        if other is not None:
            other = check_affine(other * to_mm, where, "qform", _remedy("qform", True, options))[0]
            _check_agreement(affine, other, shape, where, options, warnings)
    edges = np.linalg.norm(affine[:3, :3], axis=0) / unit_mm
    pixdim = np.abs(fields["pixdim"][1:4].astype(float))
    if name == "sform" and not np.allclose(edges, pixdim, rtol=0.01):
        warnings.append("pixdim and the sform name different spacings; the sform is taken")
    return affine


def _choose_transform(
    fields: Any, shape: tuple[int, int, int], where: str | Path, options: ReadOptions, warnings: list[str]
) -> tuple[np.ndarray, str, np.ndarray | None]:
    """(affine in file units, its name, the other one where it is declared and to be compared)."""
    has = {"sform": int(fields["sform_code"]) > 0, "qform": int(fields["qform_code"]) > 0}
    spacing = fields["pixdim"][1:4].astype(float)
    if not has["sform"] and not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise VolumeError("SPACING", where, "expected positive spacings, got pixdim = "
                          + ", ".join(f"{s:g}" for s in spacing), "set the spacing, or better an sform, in the header")
    if not any(has.values()):
        if not options.assume_ras:
            raise VolumeError("NO_ORIENTATION", where, "sform_code and qform_code are both 0: left and right are "
                              "unknown", options.remedy("assume_ras", True, "convert it from the original scan",
                                                        ", or use {} if it is stored right, anterior, superior"))
        warnings.append("the file has no orientation; it is taken as stored right, anterior, superior")
        return np.diag([*spacing, 1.0]), "pixdim", None
    if options.prefer is not None and has[options.prefer]:
        if all(has.values()):
            warnings.append(f"the {options.prefer} is taken, as asked")
        return _transform(fields, options.prefer, where, _REPAIR), options.prefer, None
    if not all(has.values()):
        name = "sform" if has["sform"] else "qform"
        return _transform(fields, name, where, _REPAIR), name, None
    sform, qform = (_transform(fields, name, where, _remedy(name, True, options)) for name in ("sform", "qform"))
    return sform, "sform", qform


def _remedy(name: str, has_other: bool, options: ReadOptions) -> str:
    """Where the transform `name` is broken."""
    other = "qform" if name == "sform" else "sform"
    more = "; {} takes the other transform where that one is sound"
    return options.remedy("prefer", other, _REPAIR, more) if has_other else _REPAIR


def _transform(fields: Any, name: str, where: str | Path, remedy: str) -> np.ndarray:
    affine = np.eye(4)
    if name == "sform":
        affine[:3] = [fields["srow_x"], fields["srow_y"], fields["srow_z"]]
        return affine
    b, c, d = (float(fields[key]) for key in ("quatern_b", "quatern_c", "quatern_d"))
    offset = [float(fields[key]) for key in ("qoffset_x", "qoffset_y", "qoffset_z")]
    spacing = fields["pixdim"][1:4].astype(float)
    rest = 1.0 - (b * b + c * c + d * d)
    if not np.isfinite([b, c, d, *offset, *spacing]).all():
        return np.full((4, 4), np.nan)
    if rest < -1e-3 or (spacing <= 0).any():
        raise VolumeError("HEADER", where, "the qform is no rotation (quaternion longer than 1, or a spacing of 0)",
                          remedy)
    qfac = -1.0 if float(fields["pixdim"][0]) == -1.0 else 1.0
    # For a rotation by 180 degrees the rest is 0, and float32 rounds it to either side. *Source* of the limit:
    # nifti1_io.c, nifti_quatern_to_mat44. quat2mat normalises, as that function does.
    a = math.sqrt(rest) if rest >= 1e-7 else 0.0
    affine[:3, :3] = quat2mat([a, b, c, d]) * (spacing * (1, 1, qfac))
    affine[:3, 3] = offset
    return affine


def _check_agreement(sform: np.ndarray, qform: np.ndarray, shape: tuple[int, int, int], where: str | Path,
                     options: ReadOptions, warnings: list[str]) -> None:
    """Where both transforms are declared they must agree, except for a shift of the origin."""
    if corners_apart_vox(sform, qform, shape) <= _CONFLICT_VOX:
        return
    shifted = qform.copy()
    shifted[:3, 3] = sform[:3, 3]
    apart = corners_apart_vox(sform, shifted, shape)
    if apart > _CONFLICT_VOX:
        other = options.spelled("prefer", "qform")
        raise VolumeError("AFFINE_CONFLICT", where, f"sform and qform place the corners {apart:.1f} voxels apart",
                          options.remedy("prefer", "sform", "find out which one is right", f" and use {{}} or {other}"
                                         if other else ""))
    shift_mm = float(np.linalg.norm(sform[:3, 3] - qform[:3, 3]))
    warnings.append(f"sform and qform differ by a shift of {shift_mm:.2f} mm; the sform is taken")
