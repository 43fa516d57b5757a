"""safetensors files, written without the temporary file of the library's own writer, which a killed process leaves."""

from __future__ import annotations

import errno
import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autosam3d.errors import CheckpointError
from autosam3d.io.files import FileToWrite, atomic_write_all, sha256_of

# The format's names, in the order in which the library lays them out: the widest first, so that all are aligned.
_DTYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}
_ALIGNMENT = 8


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors to a safetensors file: the whole file or none, the same bytes as the library's.

    Args:
        path: of the file; `files.atomic_write` says what is left where it fails.
        tensors: contiguous, on the CPU.

    Raises:
        ResourceError, UsageError: as `files.atomic_write`; IO also where what is read back differs.
    """
    digest = tensors_sha256(tensors)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            for chunk in _chunks(tensors):
                file.write(chunk)

    def verify(temporary: Path) -> None:
        if sha256_of(temporary) != digest:
            raise OSError(errno.EIO, "what was read back differs from what was written")

    atomic_write_all([FileToWrite(path, write, verify, sum(len(chunk) for chunk in _chunks(tensors)))])


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the file that `write_tensors` makes of `tensors`."""
    digest = hashlib.sha256()
    for chunk in _chunks(tensors):
        digest.update(chunk)
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file by name, on the CPU.

    Raises:
        CheckpointError: CORRUPT.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError("CORRUPT", path, f"not a readable safetensors file ({error})",
                              "copy the file again") from None


def _chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The file's bytes, a piece a tensor.

    *Source*: the format as safetensors' README gives it; the order of tensors as its version 0.8 has it.
    """
    widest_first = list(_DTYPES)
    ordered = sorted(tensors.items(), key=lambda item: (widest_first.index(item[1].dtype), item[0]))
    header, end = {}, 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    yield struct.pack("<Q", len(text)) + text
    for _, tensor in ordered:
        yield tensor.reshape(-1).view(torch.uint8).numpy().data
