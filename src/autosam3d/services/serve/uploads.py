"""Writes a request's body to disk as it comes, and refuses one that is too large or too slow."""

from __future__ import annotations

import asyncio
import errno
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from autosam3d.services.room import FILE_BYTES, NoRoomError, Place
from autosam3d.services.serve.faults import ServiceFault, disk_failed, disk_full
from autosam3d.services.serve.settings import ServeSettings

MULTIPART = "multipart/form-data"
RAW = ("application/octet-stream", "application/zip", "application/x-zip-compressed", "application/gzip",
       "application/x-gzip", "application/nifti", "application/x-nifti", "application/dicom")
_MAX_FILES, _MAX_FIELDS, _MAX_FIELD_BYTES = 5000, 16, 1 << 16
_WRITE_BYTES = 1 << 18
_PLAIN, _MAX_SHOWN = re.compile(r"[A-Za-z0-9_.\[\]-]{1,40}"), 3
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DISCARD_BYTES, _DISCARD_SECONDS = 32 << 20, 15.0


@dataclass
class Upload:
    """A scan as it was sent."""

    source: Path
    """The file, or the folder where several were sent."""
    fields: dict[str, str] = field(default_factory=dict)
    num_bytes: int = 0


def demand_body(request: Request, settings: ServeSettings) -> int:
    """Refuse a request by its headers alone; returns the size of its body in bytes, 0 where it is not told.

    Raises:
        ServiceFault: 415 CONTENT_TYPE or CONTENT_ENCODING, 413 TOO_LARGE, 400 CONTENT_LENGTH.
    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ServiceFault(415, "CONTENT_ENCODING", "expected a body without Content-Encoding; .nii.gz and .zip are "
                           "sent as they are")
    kind = _content_type(request)
    if kind not in (MULTIPART, *RAW):
        raise ServiceFault(415, "CONTENT_TYPE", f"expected {MULTIPART} with a file, or {RAW[0]} with the scan alone")
    length = request.headers.get("content-length")
    if length is not None and not (length.isascii() and length.isdigit() and len(length) < 20):
        raise ServiceFault(400, "CONTENT_LENGTH", "expected a number in Content-Length")
    size = int(length or 0)
    if size > settings.max_upload_bytes:
        raise _too_large(settings)
    return size


async def discard(request: Request, places: asyncio.Semaphore) -> None:
    """Read a small body that is refused, since most clients read the answer only after they have sent it.

    Args:
        places: limits how many bodies are read at once, so that other requests do not wait.
    """
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > _DISCARD_BYTES:
        return
    taken = 0
    try:
        async with asyncio.timeout(_DISCARD_SECONDS), places:
            async for chunk in request.stream():
                taken += len(chunk)
                if taken > _DISCARD_BYTES:
                    return
    except (TimeoutError, ClientDisconnect, RuntimeError):
        return


async def receive(request: Request, folder: Path, settings: ServeSettings, threads: Executor, place: Place,
                  file_fields: tuple[str, ...] = ("file",)) -> Upload:
    """Write the body into `folder`, which is made, under names of our own.

    Args:
        place: room on the disk, which grows with the body.
        file_fields: names of the form's parts that are scans; several together are the slices of one series.

    Raises:
        ServiceFault: 400 MULTIPART, BODY_CUT, NO_FILE; 408 SLOW; 413 TOO_LARGE; 507 NO_SPACE.
    """
    folder.mkdir(mode=0o700, parents=True)
    upload = Upload(folder)
    body = _chunks(request, settings)
    loop = asyncio.get_running_loop()

    async def flush() -> None:
        num_bytes = sink.num_pending
        try:
            place.need(num_bytes)
            await loop.run_in_executor(threads, sink.flush)
            place.wrote(num_bytes)
        except NoRoomError:
            raise disk_full() from None
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise disk_full() from None
            raise disk_failed() from None

    sink, form = _Sink(folder), None
    try:
        if _content_type(request) == MULTIPART:
            form = _Form(request, sink, file_fields, upload.fields)
            async for chunk in body:
                form.write(chunk)
                if sink.is_full:
                    await flush()
            form.finish()
        else:
            sink.begin()
            async for chunk in body:
                sink.add(chunk)
                if sink.is_full:
                    await flush()
            sink.end()
        await flush()
    finally:
        sink.close()
    upload.num_bytes = sink.num_bytes
    if not sink.paths or not sink.num_bytes:
        raise _no_scan(file_fields, list(upload.fields) if form is not None and not sink.paths else None)
    if form is not None and form.long_field is not None:
        raise ServiceFault(413, "FIELD", f"expected at most {_MAX_FIELD_BYTES >> 10} KiB in the field "
                           f"{_shown(form.long_field)}, which is no scan")
    upload.source = sink.paths[0] if len(sink.paths) == 1 else folder
    return upload


async def _chunks(request: Request, settings: ServeSettings) -> AsyncIterator[bytes]:
    """The body as it comes; refused at most one chunk beyond the size limit, or where it comes too slowly."""
    total, began = 0, time.monotonic()
    window_began, window_bytes = began, 0
    expected = int(request.headers.get("content-length") or -1)
    stream = request.stream()
    while True:
        try:
            # The limit is on the sender alone, not on the work on a chunk.
            async with asyncio.timeout(settings.chunk_seconds):
                chunk = await anext(stream, None)
        except TimeoutError:
            raise too_slow() from None
        except ClientDisconnect:
            raise body_cut() from None
        if chunk is None:
            break
        now = time.monotonic()
        total += len(chunk)
        window_bytes += len(chunk)
        if total > settings.max_upload_bytes:
            raise _too_large(settings)
        if now - began > settings.upload_seconds:
            raise too_slow()
        if now - window_began > settings.rate_seconds:
            if window_bytes < settings.min_rate * (now - window_began):
                raise too_slow()
            window_began, window_bytes = now, 0
        yield chunk
    if 0 <= expected != total:
        raise body_cut()


class _Sink:
    """Files under our own names; added bytes stay in memory until `flush` writes them in a thread."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, None
        self._pending: list[tuple[str, bytes]] = []
        self._pending_bytes = 0
        self.paths: list[Path] = []
        self.num_bytes = 0

    @property
    def num_pending(self) -> int:
        """Bytes that `flush` will take of the disk."""
        return self._pending_bytes + FILE_BYTES * sum(kind == "begin" for kind, _ in self._pending)

    @property
    def is_full(self) -> bool:
        return self._pending_bytes >= _WRITE_BYTES or len(self._pending) > 1000

    def begin(self) -> None:
        self.paths.append(self._folder / f"{len(self.paths) + 1:06d}")
        self._pending.append(("begin", b""))

    def add(self, data: bytes) -> None:
        self._pending.append(("data", data))
        self._pending_bytes += len(data)
        self.num_bytes += len(data)

    def end(self) -> None:
        self._pending.append(("end", b""))

    def flush(self) -> None:
        """Write the pending bytes. Called in a thread."""
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        opened = len(self.paths) - sum(kind == "begin" for kind, _ in pending)
        for kind, data in pending:
            if kind == "begin":
                self._file = self._open(self.paths[opened])
                opened += 1
            elif kind == "data" and self._file is not None:
                self._file.write(data)
            elif kind == "end":
                self.close()

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    @staticmethod
    def _open(path: Path) -> BinaryIO:
        return path.open("xb", buffering=0)


class _Form:
    """Parses a multipart body as it comes."""

    def __init__(self, request: Request, sink: _Sink, file_fields: tuple[str, ...], fields: dict[str, str]) -> None:
        _, options = parse_options_header(request.headers.get("content-type", ""))
        boundary = options.get(b"boundary", b"")
        if not 1 <= len(boundary) <= 200:
            raise _bad_form()
        self._sink, self._file_fields, self._fields = sink, file_fields, fields
        self._header = [bytearray(), bytearray()]
        self._disposition = b""
        self._name, self._text = "", bytearray()
        self._is_file, self._ended, self._num_files, self._num_fields = False, False, 0, 0
        self.long_field: str | None = None
        """Name of the first field that is too long to be one."""
        self._parser = MultipartParser(boundary, {
            "on_part_begin": self._begin, "on_header_field": self._on_header(0), "on_header_value": self._on_header(1),
            "on_header_end": self._header_end, "on_headers_finished": self._headers_finished,
            "on_part_data": self._data, "on_part_end": self._end, "on_end": self._finished,
        })

    def write(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except (FormParserError, ValueError):
            raise _bad_form() from None

    def finish(self) -> None:
        if not self._ended:
            raise _bad_form()

    def _begin(self) -> None:
        self._disposition = b""

    def _on_header(self, which: int) -> Callable[[bytes, int, int], None]:
        def take(data: bytes, start: int, end: int) -> None:
            self._header[which] += data[start:end]

        return take

    def _header_end(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = bytes(value)
        self._header = [bytearray(), bytearray()]

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", errors="replace")
        self._is_file = self._name in self._file_fields
        self._text = bytearray()
        self._num_files += self._is_file
        self._num_fields += not self._is_file
        if self._num_files > _MAX_FILES or self._num_fields > _MAX_FIELDS:
            raise ServiceFault(413, "PARTS", f"expected at most {_MAX_FILES} files and {_MAX_FIELDS} fields")
        if self._is_file:
            self._sink.begin()

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._sink.add(bytes(data[start:end]))
            return
        self._text += data[start:end]
        if len(self._text) > _MAX_FIELD_BYTES:
            # Read to its end and dropped: who sends a scan under another name then reads the answer.
            del self._text[_MAX_FIELD_BYTES:]
            self.long_field = self._name if self.long_field is None else self.long_field

    def _end(self) -> None:
        if self._is_file:
            self._sink.end()
        else:
            self._fields[self._name] = self._text.decode("utf-8", errors="replace")

    def _finished(self) -> None:
        self._ended = True


def _no_scan(wanted: Sequence[str], names: Sequence[str] | None) -> ServiceFault:
    """The answer to a body without a scan: a form with parts of these names, or None where the scan's part is empty."""
    where = " or ".join(f"`{name}`" for name in wanted)
    if names is None:
        return ServiceFault(400, "NO_FILE", "expected a scan, got an empty body or an empty part")
    got = f"the part {', '.join(map(_shown, names[:_MAX_SHOWN]))}" if names else "none"
    return ServiceFault(400, "NO_FILE", f"expected the scan in a part of the name {where}, got {got}; give the part "
                        f"with the scan this name")


def _shown(name: str) -> str:
    """A part's name as an answer says it: whole where it is a plain word, since it may be anything."""
    return f"`{name}`" if _PLAIN.fullmatch(name) else "(a name with other signs)" if name else "(without a name)"


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", RAW[0]).partition(";")[0].strip().lower()


def _too_large(settings: ServeSettings) -> ServiceFault:
    return ServiceFault(413, "TOO_LARGE", f"expected at most {settings.max_upload_bytes >> 20} MiB")


def too_slow() -> ServiceFault:
    """The answer to a body that does not come, or comes a few bytes at a time."""
    return ServiceFault(408, "SLOW", "the body came too slowly; try again over a better connection")


def body_cut() -> ServiceFault:
    """The answer, which nobody reads, to a sender who has gone."""
    return ServiceFault(400, "BODY_CUT", "the body ended too early")


def _bad_form() -> ServiceFault:
    return ServiceFault(400, "MULTIPART", "expected a whole multipart form with the scan in one part")
