"""The NRRD header, attached to its voxels. *Source*: "Definition of NRRD File Format", teem.sourceforge.net."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from autosam3d.errors import VolumeError
from autosam3d.io.itk.header import (
    ItkHeader,
    demand_spacings,
    demand_volume,
    demanded,
    field_error,
    header_error,
    no_orientation,
    numbers,
    whole_numbers,
)
from autosam3d.io.options import ReadOptions

MAGIC = re.compile(rb"NRRD000[1-5]\r?\n")
_TYPES = {
    "i1": ("signed char", "int8", "int8_t"), "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"), "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",), "f8": ("double",),
}
_DTYPES = {name: code for code, names in _TYPES.items() for name in names}
# What the world's axes have to be multiplied by to run to the right, the front and the head.
_SPACES = {
    "right-anterior-superior": (1, 1, 1), "ras": (1, 1, 1), "left-anterior-superior": (-1, 1, 1), "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1), "lps": (-1, -1, 1),
}
_UNIT_MM = {"mm": 1.0, "millimeter": 1.0, "millimeters": 1.0, "cm": 10.0, "m": 1000.0, "um": 0.001, "µm": 0.001}
_VECTOR = re.compile(r"none|\([^()]*\)")


def parse_nrrd(text: str, data_offset: int, path: Path, options: ReadOptions) -> ItkHeader:
    """Check every field that the voxels or their place depend on.

    Args:
        text: of the header, without its magic line and the empty line at its end.
        data_offset: of the byte after that line.

    Raises:
        VolumeError: HEADER, PAIR, DIMS, NDIM, DTYPE, CODEC, NO_ORIENTATION, SPACING. UsageError: VOLUME_INDEX.
    """
    fields, keys = _fields(text, path)
    if "data file" in fields:
        raise VolumeError("PAIR", path, "its voxels lie in another file", "save it as one .nrrd file")
    sizes = whole_numbers(demanded(fields, "sizes", path), path, "sizes")
    if len(sizes) not in (3, 4) or fields.get("dimension") != str(len(sizes)):
        raise VolumeError("NDIM", path, f"expected one 3D scan, got dimension {fields.get('dimension')!r} and the "
                          f"sizes {' x '.join(map(str, sizes))}", "give the whole scan, as one volume")
    directions, fourth = _directions(fields, len(sizes), path)
    is_segmentation = "Segment0_ID" in keys or "Segment0_Name" in keys
    warnings = demand_volume(
        1 if fourth is None else sizes[fourth], sizes, path, options,
        "its segments overlap: export them in 3D Slicer as one label map" if is_segmentation
        else options.choose_volume())
    affine = _affine(fields, directions, path, options, warnings)
    shape = tuple(size for axis, size in enumerate(sizes) if axis != fourth)
    for field in ("old min", "old max"):
        if field in fields:
            warnings.append(f"the field {field} is not applied: stored numbers are taken as they are")
    return ItkHeader(
        kind="NRRD", shape=shape,  # type: ignore[arg-type]
        num_volumes=1 if fourth is None else sizes[fourth], volumes_interleaved=fourth == 0,
        dtype=_dtype(fields, path), affine=affine, data_path=path, data_offset=data_offset,
        compression=_compression(fields, path), organs=_organs(keys, options.volume_index), warnings=tuple(warnings))


def _fields(text: str, path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(fields of the format, key/value pairs of whoever wrote it)."""
    fields: dict[str, str] = {}
    keys: dict[str, str] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        name, mark, value = re.match(r"(.*?)(:=|: ?|$)(.*)", line).groups()  # type: ignore[union-attr]
        if mark == ":=":
            keys[name] = value
        elif mark == "" or name.strip().lower() in fields:
            raise field_error(path, line)
        else:
            fields[name.strip().lower()] = value.strip()
    for other, name in (("datafile", "data file"), ("lineskip", "line skip"), ("byteskip", "byte skip")):
        if other in fields:
            fields[name] = fields.pop(other)
    return fields, keys


def _dtype(fields: Mapping[str, str], path: Path) -> np.dtype:
    name = demanded(fields, "type", path).lower()
    if name not in _DTYPES:
        raise VolumeError("DTYPE", path, f"expected one real number a voxel, got the type {name[:20]!r}",
                          "export the scan as 16-bit integers")
    dtype = np.dtype(_DTYPES[name])
    if dtype.itemsize == 1:
        return dtype
    endian = demanded(fields, "endian", path).lower()
    if endian not in ("little", "big"):
        raise header_error(path, f"expected endian little or big, got {endian[:20]!r}")
    return dtype.newbyteorder("<" if endian == "little" else ">")


def _compression(fields: Mapping[str, str], path: Path) -> Literal["gzip"] | None:
    if any(fields.get(name, "0") != "0" for name in ("line skip", "byte skip")):
        raise header_error(path, "expected the voxels right after the header, got a line skip or a byte skip")
    encoding = demanded(fields, "encoding", path).lower()
    if encoding == "raw":
        return None
    if encoding in ("gzip", "gz"):
        return "gzip"
    raise VolumeError("CODEC", path, f"expected the encoding raw or gzip, got {encoding[:20]!r}",
                      "save it with one of these")


def _directions(fields: Mapping[str, str], num_axes: int, path: Path) -> tuple[np.ndarray | None, int | None]:
    """(3x3 with a column a spatial axis, or None where there is none; the axis that is not spatial)."""
    text = fields.get("space directions")
    if text is None:
        return None, (num_axes - 1 if num_axes == 4 else None)
    vectors = _VECTOR.findall(text)
    apart = [axis for axis, vector in enumerate(vectors) if vector == "none"]
    if len(vectors) != num_axes or len(apart) != num_axes - 3 or (apart and apart[0] not in (0, 3)):
        raise header_error(path, "expected a direction in space for each of three axes, the fourth first or last, got "
                           f"{text[:60]!r}")
    columns = [numbers(v.strip("()").replace(",", " "), 3, path, "space directions") for v in vectors if v != "none"]
    return np.stack(columns, axis=1), apart[0] if apart else None


def _affine(fields: Mapping[str, str], directions: np.ndarray | None, path: Path, options: ReadOptions,
            warnings: list[str]) -> np.ndarray:
    """File voxel indexes to RAS+ mm."""
    signs = _SPACES.get(fields.get("space", "").lower())
    affine = np.eye(4)
    if signs is None or directions is None:
        if not options.assume_ras:
            raise no_orientation(path, "the fields space (of a patient) and space directions", options)
        if directions is not None:
            spacings = np.linalg.norm(directions, axis=0)
        else:
            words = [word for word in fields.get("spacings", "").split() if word.lower() != "nan"][:3]
            spacings = numbers(" ".join(words), 3, path, "spacings")
        demand_spacings(spacings, path)
        warnings.append("the file has no orientation; it is taken as stored right, anterior, superior")
        affine[:3, :3] = np.diag(spacings)
        return affine
    origin = numbers(demanded(fields, "space origin", path).strip("()").replace(",", " "), 3, path, "space origin")
    affine[:3, :3], affine[:3, 3] = directions, origin
    affine[:3] *= np.array(signs, float)[:, None] * _unit_mm(fields, path, warnings)
    return affine


def _unit_mm(fields: Mapping[str, str], path: Path, warnings: list[str]) -> float:
    """mm a unit; a file that names none is in mm, as 3D Slicer's are."""
    units = set(re.findall(r'"([^"]*)"', fields.get("space units", '"mm"')))
    if len(units) != 1 or not units <= _UNIT_MM.keys():
        raise header_error(path, f"expected one known spatial unit, got {fields['space units'][:40]!r}")
    (unit,) = units
    if _UNIT_MM[unit] != 1:
        warnings.append(f"the spatial unit is {unit}, converted to mm")
    return _UNIT_MM[unit]


def _organs(keys: Mapping[str, str], volume_index: int | None) -> dict[int, str]:
    """Segments of 3D Slicer. *Source*: its documentation of .seg.nrrd: SegmentN_Name, _LabelValue and _Layer."""
    organs = {}
    for key, name in keys.items():
        segment = re.fullmatch(r"(Segment\d+)_Name", key)
        value = keys.get(f"{segment[1]}_LabelValue", "") if segment else ""
        layer = keys.get(f"{segment[1]}_Layer", "0") if segment else ""
        if value.isdecimal() and 0 < int(value) < 1 << 16 and layer == str(volume_index or 0):
            organs[int(value)] = name.strip()
    return organs
