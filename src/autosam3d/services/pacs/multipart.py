"""multipart/related, in which DICOMweb carries files: parts are written to files as they come, within limits.

*Source* of the format: RFC 2046 section 5.1 and RFC 2387.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

_MAX_HEAD_BYTES = 8192
_CHUNK_BYTES = 1 << 20
_BOUNDARY = re.compile(r"""boundary="?([0-9A-Za-z'()+_,\-./:=? ]{1,70}?)"?\s*(;|$)""", re.IGNORECASE)


class BrokenMultipartError(ValueError):
    """A body that is not as its headers say; the message quotes nothing of it."""


class TooLargeError(ValueError):
    """More bytes or parts than were allowed."""


def boundary_of(content_type: str) -> bytes:
    """The boundary in a Content-Type.

    Raises:
        BrokenMultipartError
    """
    if not content_type.lower().startswith("multipart/related"):
        raise BrokenMultipartError("expected multipart/related")
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise BrokenMultipartError("expected a boundary")
    return found[1].encode("ascii")


def write_parts(chunks: Iterable[bytes], boundary: bytes, open_part: Callable[[int], BinaryIO], *, max_bytes: int,
                max_part_bytes: int, max_parts: int) -> int:
    """Write each part of a body into a file of its own, holding one chunk at a time.

    Args:
        chunks: of the body, in any sizes.
        boundary: of `boundary_of`.
        open_part: opens the file for part number n, from 0; it is closed here.
        max_bytes, max_part_bytes, max_parts: limits.

    Returns:
        The number of parts.

    Raises:
        BrokenMultipartError: also where the body ends before its last delimiter; then no part can be trusted.
        TooLargeError
    """
    reader = _Reader(chunks, max_bytes)
    delimiter = b"\r\n--" + boundary
    reader.buffer += b"\r\n"  # the first delimiter may stand at the very beginning
    reader.copy_until(delimiter, None, max_bytes)
    num_parts = 0
    while not reader.is_last_delimiter():
        if num_parts == max_parts:
            raise TooLargeError(f"more than {max_parts} parts")
        reader.skip_head()
        with open_part(num_parts) as file:
            reader.copy_until(delimiter, file, max_part_bytes)
        num_parts += 1
    return num_parts


def body_of(paths: Iterable[Path], boundary: str) -> tuple[Iterator[bytes], int]:
    """(a body of DICOM files in chunks, its length in bytes); each file is read when it is sent."""
    paths = list(paths)
    head = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode("ascii")
    end = f"--{boundary}--\r\n".encode("ascii")
    length = sum(len(head) + path.stat().st_size + 2 for path in paths) + len(end)

    def chunks() -> Iterator[bytes]:
        for path in paths:
            yield head
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    yield chunk
            yield b"\r\n"
        yield end

    return chunks(), length


class _Reader:
    """A stream of chunks with a buffer of what was read ahead."""

    def __init__(self, chunks: Iterable[bytes], max_bytes: int) -> None:
        self._chunks, self._left = iter(chunks), max_bytes
        self.buffer = bytearray()

    def _more(self) -> None:
        chunk = next(self._chunks, None)
        if chunk is None:
            raise BrokenMultipartError("it ends before its last delimiter")
        self._left -= len(chunk)
        if self._left < 0:
            raise TooLargeError("more bytes than allowed")
        self.buffer += chunk

    def copy_until(self, delimiter: bytes, file: BinaryIO | None, max_bytes: int) -> None:
        """Copy the bytes before `delimiter` into `file` and consume the delimiter."""
        num_copied = 0
        while True:
            at = self.buffer.find(delimiter)
            # Bytes that may be the beginning of a delimiter stay in the buffer.
            num_sure = at if at >= 0 else max(0, len(self.buffer) - len(delimiter) + 1)
            num_copied += num_sure
            if num_copied > max_bytes:
                raise TooLargeError("a part is larger than allowed")
            if file is not None:
                file.write(memoryview(self.buffer)[:num_sure])
            del self.buffer[: num_sure + (len(delimiter) if at >= 0 else 0)]
            if at >= 0:
                return
            self._more()

    def is_last_delimiter(self) -> bool:
        """Read what follows a delimiter: two dashes end the body; else blanks, which are consumed, and a line end."""
        while len(self.buffer) < 2:
            self._more()
        if self.buffer[:2] == b"--":
            return True
        while b"\r\n" not in self.buffer:
            if len(self.buffer) > _MAX_HEAD_BYTES:
                raise BrokenMultipartError("no line end after a delimiter")
            self._more()
        line, _, _ = bytes(self.buffer).partition(b"\r\n")
        if line.strip(b" \t"):
            raise BrokenMultipartError("something else follows a delimiter")
        del self.buffer[: len(line)]  # the line end stays: the headers of the part begin with it
        return False

    def skip_head(self) -> None:
        """Consume the headers of a part, up to the blank line."""
        while b"\r\n\r\n" not in self.buffer:
            if len(self.buffer) > _MAX_HEAD_BYTES:
                raise BrokenMultipartError("the headers of a part have no end")
            self._more()
        at = self.buffer.index(b"\r\n\r\n")
        if at > _MAX_HEAD_BYTES:
            raise BrokenMultipartError("the headers of a part have no end")
        del self.buffer[: at + 4]
