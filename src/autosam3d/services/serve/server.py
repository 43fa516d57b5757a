"""The service from start to end: its folder and address, the model, the queue, and an orderly stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import anyio.to_thread
import uvicorn
from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response

from autosam3d.errors import AutoSam3dError, UsageError
from autosam3d.export.web import write_web_folder
from autosam3d.io.folders import make_folder, writable_folder
from autosam3d.io.lock_file import hold_folder
from autosam3d.scans.open_model import kept_export
from autosam3d.services.addresses import cannot_listen, no_such_address
from autosam3d.services.serve.app import make_app
from autosam3d.services.serve.connection import ConnectionLimits, patient_protocol
from autosam3d.services.serve.guard import Guard
from autosam3d.services.serve.intake import ScanService
from autosam3d.services.serve.monai import add_monai_label
from autosam3d.services.serve.page import STYLE, no_app_page, static_app
from autosam3d.services.serve.runner import Runner, worker_settings
from autosam3d.services.serve.settings import ServeSettings, SteadyClock, demand_token_off_loopback
from autosam3d.services.serve.store import JobStore
from autosam3d.services.workers.messages import WorkerSettings

_log = logging.getLogger(__name__)

LOCK = "serve.lock"
_STATE = "jobs.sqlite"
_OURS = {LOCK, _STATE, f"{_STATE}-wal", f"{_STATE}-shm", "jobs", "tmp", "web"}
_MODE = 0o700
"""What lies there are scans of patients."""
_REMEDY = "name another folder with --folder"
_DISK_THREADS = _FILE_THREADS = 8
_BACKLOG = 512
# Connections that are accepted in one go: between two goes those that are there are answered.
_ACCEPTED_AT_ONCE = 32
# What the system keeps of an answer for a client that does not read; it would grow to megabytes a connection.
_SEND_BUFFER_BYTES = 1 << 18


def serve(settings: ServeSettings, workers: WorkerSettings, on_ready: Callable[[str], None]) -> None:
    """Serve until a signal stops it; the signal is raised again after everything is closed.

    Args:
        settings: of the service.
        workers: model and limits of the worker processes.
        on_ready: called with the address once requests are answered.

    Raises:
        UsageError: NO_TOKEN, PORT_IN_USE, ADDRESS, LOCKED, OUTPUT_EXISTS, OUTPUT_PATH.
        ResourceError: NO_LOCK, NOT_WRITABLE.
        AutoSam3dError: as `open_model`.
    """
    demand_token_off_loopback(settings.host, settings.token)
    with contextlib.ExitStack() as stack:
        stack.callback(os.umask, os.umask(0o077))  # files are readable by their owner alone
        stack.enter_context(_own_folder(settings.folder))
        listening = stack.enter_context(contextlib.closing(_bind(settings.host, settings.port)))
        store = JobStore(settings.folder / _STATE)
        stack.callback(store.close)
        clock = SteadyClock()
        store.recover(clock.now())
        _remove_orphans(settings.folder / "jobs", store)
        runner = Runner(settings, worker_settings(workers, settings), store, clock)
        deadline = _Deadline(settings.drain_seconds)
        stack.callback(lambda: runner.stop(deadline.monotonic()))
        facts = runner.start()
        threads = stack.enter_context(ThreadPoolExecutor(_DISK_THREADS, thread_name_prefix="disk"))
        service = ScanService(settings, store, runner, clock, facts, threads)
        app = make_app(service)
        add_monai_label(app, service)
        _add_page(app, settings, workers.model)
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # its tracebacks may quote what was sent
        config = uvicorn.Config(
            Guard(app, settings), http=patient_protocol(ConnectionLimits.of(settings)), ws="none", lifespan="off",
            loop="asyncio", access_log=False, log_config=None, server_header=False, proxy_headers=False,
            timeout_graceful_shutdown=max(1, int(settings.drain_seconds)), backlog=_ACCEPTED_AT_ONCE,
        )
        server = _Server(config, runner, deadline)
        listening.listen(_BACKLOG)  # from here on connections are accepted
        host, port = listening.getsockname()[:2]
        on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}/")
        asyncio.run(server.serve(sockets=[listening]))


class _Deadline:
    """The time at which running scans must be finished, counted from the signal."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._at = seconds, None

    def begin(self) -> None:
        if self._at is None:
            self._at = time.monotonic() + self._seconds

    def monotonic(self) -> float:
        # Without a signal the service has failed, and does not wait.
        return self._at if self._at is not None else time.monotonic()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, runner: Runner, deadline: _Deadline) -> None:
        super().__init__(config)
        self._runner, self._deadline = runner, deadline

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # Threads that read files for answers; the default of 40 holds tens of megabytes where all of them are at work.
        anyio.to_thread.current_default_thread_limiter().total_tokens = _FILE_THREADS
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(_BACKLOG)  # uvicorn has set what waits to what is accepted at once

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._deadline.begin()
        self._runner.begin_stop()
        super().handle_exit(sig, frame)


def _add_page(app: FastAPI, settings: ServeSettings, model: Path | None) -> None:
    """The browser app, or why there is none."""

    @app.get("/docs.css", include_in_schema=False)
    async def style() -> Response:
        return Response(STYLE, media_type="text/css")

    reason = "This service has its API alone."
    if settings.app:
        try:
            export = kept_export(model)
            if export is not None:
                write_web_folder(export, settings.folder / "web", overwrite=True)
                app.mount("/", static_app(settings.folder / "web"))
                return
            reason = "This model is not exported, so it has no browser app. Serve a folder of autosam3d export."
        except AutoSam3dError as error:
            reason = "The browser app could not be made for this model."
            _log.warning("there is no browser app: %s", error.fault)

    @app.get("/", include_in_schema=False)
    async def nothing() -> HTMLResponse:
        return HTMLResponse(no_app_page(reason))


@contextlib.contextmanager
def _own_folder(folder: Path) -> Iterator[None]:
    """The service's folder, closed to others, held by this process, and clean of what a former one left.

    Two services would take the same jobs and clear each other's uploads away, so without locks the folder is refused,
    and the signature of another machine is believed.
    """
    with writable_folder(folder, _REMEDY):
        if folder.is_dir() and any(path.name not in _OURS for path in folder.iterdir()):
            raise UsageError("OUTPUT_EXISTS", folder, "expected an empty folder or one of a service, got other files",
                             _REMEDY)
    with hold_folder(folder, LOCK, what="folder of a service", option="--folder", demand_lock=True,
                     believe_signature=True, mode=_MODE):
        for name in ("jobs", "tmp"):
            make_folder(folder / name, mode=_MODE, remedy=_REMEDY)
        with writable_folder(folder, _REMEDY):
            _empty(folder / "tmp")
        try:
            yield
        finally:
            _empty(folder / "tmp")
            shutil.rmtree(folder / "web", ignore_errors=True)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM,
                                                                 flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise no_such_address(host, error) from None
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(address)
        return listening
    except OSError as error:
        listening.close()
        raise cannot_listen(host, port, error) from None


def _remove_orphans(jobs: Path, store: JobStore) -> None:
    """Delete uploads that the end of an earlier service interrupted, and files of deleted jobs."""
    known = store.ids()
    for folder in jobs.iterdir():
        if folder.name not in known:
            shutil.rmtree(folder, ignore_errors=True)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
