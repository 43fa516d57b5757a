"""From a request with a scan to a job in the queue, or to a refusal after which no file is left."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import Request

from autosam3d.io import ReadOptions
from autosam3d.io.dicom.archive import is_zip
from autosam3d.services.room import NoRoomError, Room
from autosam3d.services.serve.connection import RECEIVING
from autosam3d.services.serve.faults import NO_SUCH_JOB, ServiceFault, disk_full
from autosam3d.services.serve.guard import request_id_of
from autosam3d.services.serve.runner import UPLOAD, Runner
from autosam3d.services.serve.settings import ServeSettings, SteadyClock
from autosam3d.services.serve.store import QUEUED, SESSION, JobStore, SentTwice, StoredJob
from autosam3d.services.serve.uploads import Upload, demand_body, receive
from autosam3d.services.workers.messages import ModelFacts

T = TypeVar("T")

_ID = re.compile(r"[A-Za-z0-9_-]{22}")
_ONCE = re.compile(r"[A-Za-z0-9_-]{8,128}")
_ID_BYTES = 16
"""128 bits, which nobody guesses: who knows an id may see the job."""
BUSY_SECONDS = 10
_ROOM_LEFT_BYTES = 256 << 20
"""Free disk space that uploads leave for results and the table of jobs."""
_SESSIONS_PER_PLACE = 2


@dataclass
class ScanService:
    """The service as the routes use it; only the event loop's thread changes it."""

    settings: ServeSettings
    store: JobStore
    runner: Runner
    clock: SteadyClock
    facts: ModelFacts
    threads: Executor
    """For work on the disk."""
    receiving: int = 0
    app_version: str = ""
    room: Room = field(init=False)
    """Of the disk that uploads lie on."""
    _receiving_once: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.room = Room(self.settings.folder, _ROOM_LEFT_BYTES)

    async def on_disk(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread; a database error becomes a 503 answer."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.threads, work)
        except sqlite3.Error:
            raise ServiceFault(503, "STORE", "the table of jobs cannot be used right now; try again", 10) from None

    async def job(self, job_id: str) -> StoredJob:
        """The job with this id.

        Raises:
            ServiceFault: 404, there is no such job.
        """
        job = await self.on_disk(lambda: self.store.get(job_id)) if _ID.fullmatch(job_id) else None
        if job is None or job.state == SESSION:
            raise NO_SUCH_JOB
        return job

    async def accept(self, request: Request, forms: Sequence[str], read_options: ReadOptions, *,
                     overlap: float | None = None, file_fields: tuple[str, ...] = ("file",), state: str = QUEUED
                     ) -> tuple[str, Upload]:
        """Receive the body and queue it as a job. Returns the new job's id and its upload.

        Raises:
            ServiceFault: as `demand_body` and `receive`; 429 QUEUE_FULL, 503 BUSY or STOPPING, 409 SENT_TWICE.
        """
        num_bytes = demand_body(request, self.settings)
        once = await self._once(request)
        self._demand_place(state)
        try:
            place = self.room.place(num_bytes)
        except NoRoomError:
            raise disk_full() from None
        job_id = secrets.token_urlsafe(_ID_BYTES)
        folder = self.runner.folder(job_id)
        self.receiving += 1
        if once:
            self._receiving_once.add(once)
        try:
            request.scope["state"] |= {"body_begun": True, RECEIVING: True}
            upload = await receive(request, folder / UPLOAD, self.settings, self.threads, place, file_fields)
            name = await self.on_disk(lambda: _named(upload, folder))
            content = {"upload": name, "forms": list(forms), "read": asdict(read_options), "overlap": overlap,
                    "request_id": request_id_of(request)}
            await self._add(job_id, state, content, once)
        except BaseException:
            # Not awaited: this task may have been cancelled, because the client closed the connection.
            self.threads.submit(shutil.rmtree, folder, True)
            raise
        finally:
            request.scope["state"][RECEIVING] = False
            place.close()
            self.receiving -= 1
            self._receiving_once.discard(once or "")
        self.runner.wake()
        return job_id, upload

    async def again(self, session_id: str, request: Request, forms: Sequence[str]) -> str:
        """Queue a new job for the scan of a session. Returns its id.

        Raises:
            ServiceFault: 404, 429, 503.
        """
        session = await self.session(session_id)
        self._demand_place(QUEUED)
        job_id = secrets.token_urlsafe(_ID_BYTES)
        source, folder = self.runner.folder(session_id), self.runner.folder(job_id)
        try:
            await self.on_disk(lambda: _linked(source / UPLOAD, folder / UPLOAD))
            await self._add(job_id, QUEUED, session.request | {"forms": list(forms),
                                                               "request_id": request_id_of(request)}, None)
        except BaseException:
            self.threads.submit(shutil.rmtree, folder, True)
            raise
        self.runner.wake()
        return job_id

    async def session(self, session_id: str) -> StoredJob:
        """The session with this id: a scan that was sent to be used several times.

        Raises:
            ServiceFault: 404.
        """
        found = await self.on_disk(lambda: self.store.get(session_id)) if _ID.fullmatch(session_id) else None
        if found is None or found.state != SESSION:
            raise ServiceFault(404, "NO_SUCH_SESSION", "there is no such session, or it was deleted")
        return found

    def _demand_place(self, state: str) -> None:
        if self.runner.stopping:
            raise ServiceFault(503, "STOPPING", "the service is about to stop; try again later", 30)
        if self.receiving >= self.settings.max_receiving:
            raise ServiceFault(503, "BUSY", "too many scans are being sent right now; try again", BUSY_SECONDS)
        if state == SESSION:
            if self.store.num_sessions >= _SESSIONS_PER_PLACE * self.settings.queue:
                raise ServiceFault(429, "SESSIONS", "too many sessions are open; try again later", 60)
        elif self.store.num_queued + self.receiving >= self.settings.queue:
            raise ServiceFault(429, "QUEUE_FULL", "the queue is full; try again later", BUSY_SECONDS)

    async def _once(self, request: Request) -> str | None:
        key = request.headers.get("idempotency-key")
        if key is None:
            return None
        if not _ONCE.fullmatch(key):
            raise ServiceFault(400, "IDEMPOTENCY_KEY", "expected 8 to 128 letters, digits, - and _ in Idempotency-Key")
        once = hashlib.sha256(key.encode()).hexdigest()
        if once in self._receiving_once or await self.on_disk(lambda: self.store.knows(once)):
            raise _twice()
        # Another request with the same key may have come while the table was read.
        if once in self._receiving_once:
            raise _twice()
        return once

    async def _add(self, job_id: str, state: str, content: dict[str, Any], once: str | None) -> None:
        try:
            await self.on_disk(lambda: self.store.add(job_id, state, content, self.clock.now(), once))
        except SentTwice:
            raise _twice() from None


def _named(upload: Upload, folder: Path) -> str:
    """Rename the upload by its format; returns its name in the folder of uploads, "." for a folder."""
    if upload.source.is_dir():
        return "."
    ending = ".zip" if is_zip(upload.source) else ".nii.gz" if _is_gzip(upload.source) else ".nii"
    upload.source = upload.source.rename(folder / UPLOAD / f"scan{ending}")
    return upload.source.name


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _linked(source: Path, target: Path) -> None:
    """Hard links to the files of a session, so that each job deletes its own."""
    target.mkdir(mode=0o700, parents=True)
    for file in source.iterdir():
        (target / file.name).hardlink_to(file)


def _twice() -> ServiceFault:
    return ServiceFault(409, "SENT_TWICE", "a scan with this Idempotency-Key was sent before")
