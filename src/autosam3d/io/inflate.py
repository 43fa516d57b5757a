"""A file's bytes, decompressed where it is gzip: to the end, checked, and never more than its header claims.

Common readers stop as soon as they have their voxels, which is before gzip's checksum, so that flipped bits and
truncated files pass as data. Here the whole stream is read, every member's CRC and length are checked, and only zero
padding may follow the data. A decompression bomb is stopped at the size that its header claims, or before, at the
memory budget.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from autosam3d.errors import VolumeError
from autosam3d.io.files import open_regular, readable

GZIP_MAGIC = b"\x1f\x8b"
MAX_PADDING_BYTES = 1 << 20
# Deflate cannot do better than 1032 to 1. *Source*: zlib technical details, "maximum compression factor".
MAX_DEFLATE_RATIO = 1032
_CHUNK_BYTES = 1 << 20


class ByteStream:
    """The inflated bytes of one open file, read strictly forward.

    Args:
        path: a regular file.

    Attributes:
        size_bytes: on disk.
        is_gzip: found by the first two bytes, whatever the name says.
        max_bytes: the most bytes that the file can decompress to.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self._file: BinaryIO = open_regular(path)
        with readable(path):
            self.size_bytes = self._file.seek(0, 2)
            self._file.seek(0)
            self.is_gzip = self._file.read(2) == GZIP_MAGIC
            self._file.seek(0)
        self.max_bytes = self.size_bytes * MAX_DEFLATE_RATIO if self.is_gzip else self.size_bytes
        self._chunks = self._inflated() if self.is_gzip else self._plain()
        self._rest = memoryview(b"")

    def __enter__(self) -> ByteStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._chunks.close()
        self._file.close()

    def read_upto(self, num_bytes: int) -> bytes:
        """The next bytes; fewer only at the end."""
        target = bytearray(num_bytes)
        return bytes(target[: self.read_into(memoryview(target))])

    def read_into(self, target: memoryview) -> int:
        """Fill `target`; returns the number of bytes, which is smaller than its length only at the end.

        Raises:
            VolumeError: TRUNCATED, CRC or TRAILING (gzip), UNREADABLE.
        """
        filled = 0
        while filled < len(target):
            if not self._rest:
                if not self.is_gzip:  # straight into place, without a copy
                    with readable(self.path):
                        got = self._file.readinto(target[filled:])  # type: ignore[attr-defined]
                    if not got:
                        break
                    filled += got
                    continue
                self._rest = memoryview(next(self._chunks, b""))
                if not self._rest:
                    break
            num = min(len(self._rest), len(target) - filled)
            target[filled : filled + num] = self._rest[:num]
            self._rest = self._rest[num:]
            filled += num
        return filled

    def finish(self, claimed_bytes: int) -> None:
        """Read to the end: only zero padding may follow; checksums are checked.

        Args:
            claimed_bytes: what the header claims, for the message.

        Raises:
            VolumeError: TRAILING, TRUNCATED, CRC.
        """
        padding = 0
        while True:
            chunk = self._rest if self._rest else memoryview(next(self._chunks, b""))
            self._rest = memoryview(b"")
            if not chunk:
                return
            padding += len(chunk)
            if padding > MAX_PADDING_BYTES or np.frombuffer(chunk, np.uint8).any():
                raise VolumeError("TRAILING", self.path, f"expected the end after {claimed_bytes} bytes as the header "
                                  "claims, got more data", "export the scan again; the file or its header is damaged")

    def _plain(self) -> Generator[bytes, None, None]:
        with readable(self.path):
            while chunk := self._file.read(_CHUNK_BYTES):
                yield chunk

    def _inflated(self) -> Generator[bytes, None, None]:
        """Chunks of at most 1 MiB; raises at a bad checksum, a truncated stream, or bytes after the last member."""
        pending = b""
        while True:
            inflater = zlib.decompressobj(31)  # gzip wrapper: CRC-32 and length are checked at each member's end
            while not inflater.eof:
                with readable(self.path):
                    pending = pending or self._file.read(_CHUNK_BYTES)
                if not pending:
                    raise VolumeError("TRUNCATED", self.path, "the gzip stream ends before its checksum",
                                      "copy or download the file again")
                try:
                    chunk = inflater.decompress(pending, _CHUNK_BYTES)
                except zlib.error as error:
                    raise VolumeError("CRC", self.path, f"the gzip stream is damaged ({_zlib_reason(error)})",
                                      "copy or download the file again") from None
                pending = inflater.unconsumed_tail
                if chunk:
                    yield chunk
            pending = inflater.unused_data
            pending = self._skip_zeros(pending)
            if not pending:
                return
            if not pending.startswith(GZIP_MAGIC):
                raise VolumeError("TRAILING", self.path, "bytes that are no gzip data follow the gzip stream",
                                  "export the scan again; the file is damaged")

    def _skip_zeros(self, pending: bytes) -> bytes:
        """The bytes after a member without zero padding; empty at the end of the file."""
        padding = 0
        while True:
            pending = pending.lstrip(b"\0")
            if len(pending) >= 2 or padding > MAX_PADDING_BYTES:
                return pending or b"\0"
            with readable(self.path):
                more = self._file.read(_CHUNK_BYTES)
            if not more:
                return pending
            padding += len(more)
            pending += more


def _zlib_reason(error: zlib.error) -> str:
    return str(error).rpartition(": ")[2] or "invalid data"
