"""The MetaImage header, of .mha and .mhd. *Source*: ITK's MetaIO documentation; its world is LPS, as ITK's is."""

from __future__ import annotations

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

LAST_KEY = "ElementDataFile"
_TYPES = {"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
          "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8"}
_MATRIX = ("TransformMatrix", "Rotation", "Orientation")
_ORIGIN = ("Offset", "Position", "Origin")


def parse_metaimage(text: str, data_offset: int, path: Path, options: ReadOptions) -> ItkHeader:
    """Check every field that the voxels or their place depend on.

    Args:
        text: of the header, its last line included.
        data_offset: of the byte after that line.

    Raises:
        VolumeError: HEADER, PAIR, DIMS, NDIM, DTYPE, CODEC, SCALE, NO_ORIENTATION, SPACING. UsageError: VOLUME_INDEX.
    """
    fields = _fields(text, path)
    sizes = whole_numbers(demanded(fields, "DimSize", path), path, "DimSize")
    if len(sizes) not in (3, 4) or fields.get("NDims") != str(len(sizes)):
        raise VolumeError("NDIM", path, f"expected one 3D scan, got NDims {fields.get('NDims')!r} and the sizes "
                          f"{' x '.join(map(str, sizes))}", "give the whole scan, as one volume")
    if fields.get("ElementNumberOfChannels", "1") != "1":
        raise VolumeError("DTYPE", path, "expected one real number a voxel, got several channels",
                          "export the scan as 16-bit integers")
    for key, neutral in (("ElementToIntensityFunctionSlope", 1.0), ("ElementToIntensityFunctionOffset", 0.0)):
        if key in fields and numbers(fields[key], 1, path, key)[0] != neutral:
            raise VolumeError("SCALE", path, f"expected no {key}, which readers apply in different ways",
                              "export the scan again, its voxels in Hounsfield units")
    num_volumes = sizes[3] if len(sizes) == 4 else 1
    warnings = demand_volume(num_volumes, sizes, path, options, options.choose_volume())
    affine = _affine(fields, len(sizes), path, options, warnings)
    data_path, offset = _data_place(fields, data_offset, path)
    return ItkHeader(
        kind="MetaImage", shape=(sizes[0], sizes[1], sizes[2]), num_volumes=num_volumes, volumes_interleaved=False,
        dtype=_dtype(fields, path), affine=affine, data_path=data_path, data_offset=offset,
        compression=_compression(fields, path), organs={}, warnings=tuple(warnings))


def _fields(text: str, path: Path) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in filter(str.strip, text.splitlines()):
        key, mark, value = line.partition("=")
        if not mark or key.strip() in fields:
            raise field_error(path, line)
        fields[key.strip()] = value.strip()
    if fields.get("ObjectType", "Image") != "Image":
        raise header_error(path, f"expected an image, got the ObjectType {fields['ObjectType'][:20]!r}")
    return fields


def _is(fields: Mapping[str, str], name: str, path: Path, default: str) -> bool:
    word = fields.get(name, default).lower()
    if word not in ("true", "false", "1", "0"):
        raise header_error(path, f"expected True or False for {name}, got {word[:20]!r}")
    return word in ("true", "1")


def _dtype(fields: Mapping[str, str], path: Path) -> np.dtype:
    name = demanded(fields, "ElementType", path)
    if name not in _TYPES:  # MET_LONG is of four or of eight bytes, as the machine has it that writes
        raise VolumeError("DTYPE", path, f"expected one real number a voxel, got the type {name[:20]!r}",
                          "export the scan as 16-bit integers")
    dtype = np.dtype(_TYPES[name])
    order = next((name for name in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB") if name in fields), None)
    if order is None and dtype.itemsize > 1:
        raise header_error(path, "expected BinaryDataByteOrderMSB, got none: the order of bytes is unknown")
    return dtype.newbyteorder(">" if order is not None and _is(fields, order, path, "False") else "<")


def _compression(fields: Mapping[str, str], path: Path) -> Literal["zlib"] | None:
    if not _is(fields, "BinaryData", path, "False"):
        raise VolumeError("CODEC", path, "expected binary voxels, got text", "save it as binary data")
    return "zlib" if _is(fields, "CompressedData", path, "False") else None


def _data_place(fields: Mapping[str, str], data_offset: int, path: Path) -> tuple[Path, int]:
    name = demanded(fields, LAST_KEY, path)
    if name == "LOCAL":
        return path, data_offset
    # A name alone: a path could lead to any file of this machine.
    if name.split()[0] in ("LIST", "LOCAL") or "%" in name or "/" in name or "\\" in name or name in (".", ".."):
        raise VolumeError("PAIR", path, "expected the voxels in one file beside the header, got several or a path",
                          "save it as one .mha file")
    skip = fields.get("HeaderSize", "0")
    if not (skip == "-1" or skip.isdecimal()):
        raise header_error(path, f"expected a HeaderSize of -1 or more, got {skip[:20]!r}")
    return path.with_name(name), int(skip)


def _affine(fields: Mapping[str, str], num_axes: int, path: Path, options: ReadOptions, warnings: list[str]
            ) -> np.ndarray:
    """File voxel indexes to RAS+ mm."""
    name = next((name for name in ("ElementSpacing", "ElementSize") if name in fields), None)
    if name is None:
        raise VolumeError("SPACING", path, "expected ElementSpacing, got none", "export the scan again")
    spacings = numbers(fields[name], num_axes, path, name)[:3]
    demand_spacings(spacings, path)
    affine = np.eye(4)
    matrix, origin = (next((n for n in names if n in fields), None) for names in (_MATRIX, _ORIGIN))
    if matrix is None or origin is None:
        if not options.assume_ras:
            raise no_orientation(path, "TransformMatrix and Offset", options)
        warnings.append("the file has no orientation; it is taken as stored right, anterior, superior")
        affine[:3, :3] = np.diag(spacings)
        return affine
    axes = numbers(fields[matrix], num_axes**2, path, matrix).reshape(num_axes, num_axes)
    if num_axes == 4 and (np.any(axes[3, :3]) or np.any(axes[:3, 3])):
        raise header_error(path, "expected a fourth axis apart from space")
    # Axis after axis, each as its direction in LPS.
    affine[:3, :3] = axes[:3, :3].T * spacings
    affine[:3, 3] = numbers(fields[origin], num_axes, path, origin)[:3]
    affine[:2] *= -1
    return affine
