"""The voxels of a NRRD or MetaImage file: every byte that the header claims, their checksum, and nothing after them."""

from __future__ import annotations

import zlib
from typing import BinaryIO

import numpy as np

from autosam3d.errors import VolumeError
from autosam3d.io.files import open_regular, readable
from autosam3d.io.inflate import MAX_DEFLATE_RATIO, MAX_PADDING_BYTES
from autosam3d.io.itk.header import EXPORT, ItkHeader
from autosam3d.io.memory import demand_ram, size_text

_CHUNK_BYTES = 1 << 20
_WRAPPERS = {"gzip": 31, "zlib": 15}  # of zlib.decompressobj, which checks CRC-32 or Adler-32 at the end
_COPY = "copy or download the file again"


def read_payload(header: ItkHeader, bytes_per_voxel: int, max_ram_bytes: int | None) -> np.ndarray:
    """The stored numbers [i, j, k] of all volumes, [volume, i, j, k].

    Args:
        bytes_per_voxel: that the caller makes of each one of a volume.
        max_ram_bytes: that the process may hold.

    Raises:
        VolumeError: SIZE, TRUNCATED, CRC, TRAILING; NOT_A_FILE, UNREADABLE. ResourceError: MEMORY.
    """
    path = header.data_path
    with open_regular(path) as file, readable(path):
        size = file.seek(0, 2)
        offset = header.data_offset if header.data_offset >= 0 else size - header.data_bytes
        most = max(0, size - offset) * (MAX_DEFLATE_RATIO if header.compression else 1)
        if header.data_bytes > most or offset < 0:
            shape = " x ".join(map(str, header.shape))
            raise VolumeError("SIZE", path, f"the header claims {size_text(header.data_bytes)} ({shape} voxels), the "
                              f"file holds at most {size_text(most)}", f"the file or its header is damaged; {_COPY}")
        demand_ram(header.data_bytes + bytes_per_voxel * header.num_voxels, path, max_ram_bytes)
        file.seek(offset)
        data = np.empty(header.data_bytes, np.uint8)
        rest = _inflate(file, header, data) if header.compression else _read(file, data)
        _demand_padding(file, rest, header)
    i, j, k = header.shape
    if header.volumes_interleaved:
        return np.moveaxis(data.view(header.dtype).reshape(k, j, i, header.num_volumes), 3, 0).transpose(0, 3, 2, 1)
    return data.view(header.dtype).reshape(header.num_volumes, k, j, i).transpose(0, 3, 2, 1)


def _read(file: BinaryIO, data: np.ndarray) -> bytes:
    view, filled = data.data, 0
    while filled < len(view) and (got := file.readinto(view[filled:])):  # type: ignore[attr-defined]
        filled += got
    assert filled == len(view), "the file was measured"
    return b""


def _inflate(file: BinaryIO, header: ItkHeader, data: np.ndarray) -> bytes:
    """Fill `data`; what follows the compressed stream in the bytes that were read."""
    path, filled, pending = header.data_path, 0, b""
    inflater = zlib.decompressobj(_WRAPPERS[header.compression or "gzip"])
    while not inflater.eof:
        pending = pending or file.read(_CHUNK_BYTES)
        if not pending:
            raise VolumeError("TRUNCATED", path, "the compressed voxels end before their checksum", _COPY)
        try:
            chunk = inflater.decompress(pending, _CHUNK_BYTES)
        except zlib.error as error:
            reason = str(error).rpartition(": ")[2] or "invalid data"
            raise VolumeError("CRC", path, f"the compressed voxels are damaged ({reason})", _COPY) from None
        pending = inflater.unconsumed_tail
        if filled + len(chunk) > data.size:
            raise VolumeError("TRAILING", path, f"expected {data.size} bytes of voxels as the header claims, got more",
                              f"{EXPORT}; the file or its header is damaged")
        data[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
        filled += len(chunk)
    if filled < data.size:
        raise VolumeError("SIZE", path, f"the header claims {size_text(data.size)} of voxels, the file has "
                          f"{size_text(filled)}", f"the file is cut or its header is wrong; {_COPY}")
    return inflater.unused_data


def _demand_padding(file: BinaryIO, rest: bytes, header: ItkHeader) -> None:
    rest += file.read(MAX_PADDING_BYTES + 1)
    if len(rest) > MAX_PADDING_BYTES or any(rest):
        raise VolumeError("TRAILING", header.data_path, f"expected the end after {header.data_bytes} bytes of voxels "
                          "as the header claims, got more data", f"{EXPORT}; the file or its header is damaged")
