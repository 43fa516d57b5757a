"""A real service process for tests, and requests that no polite client would send."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from exports import mini_export

FORMS = {"nifti", "seg", "seg-labelmap", "rtstruct", "json", "csv"}


class Running:
    """``autosam3d serve``, with the small export unless told otherwise."""

    def __init__(self, folder: Path, *args: object, env: Mapping[str, str] | None = None,
                 model: Sequence[object] | None = ()) -> None:
        self.folder = folder / "state"
        self.log = folder / "log.txt"
        told = os.environ | {"OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(folder)} | dict(env or {})
        small = () if model is None else model or (mini_export(), "--backend", "onnxruntime", "--threads", 1)
        words = [sys.executable, "-m", "autosam3d", "-v", "serve", *small, "--port", 0, "--folder", self.folder, *args]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=log, env=told,
                                            text=True)
        self.url = self._ready()

    def _ready(self) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 120)
        line = self.process.stdout.readline() if ready else ""
        assert line.startswith("autosam3d serves at http://"), f"{line!r}: {self.log.read_text()}"
        return line.split()[3].rstrip("/")

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host.strip("[]"), int(port)

    def client(self, **how: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **how)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(seconds)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code

    def workers(self) -> list[int]:
        """Process ids of its worker processes."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for path in children for pid in path.read_text().split()]

    def files(self) -> list[str]:
        """What lies in the folders of jobs and temporaries; ".ses" is ONNX Runtime's."""
        while True:
            with contextlib.suppress(FileNotFoundError):  # deleted in this moment
                return sorted(str(p.relative_to(self.folder)) for name in ("jobs", "tmp") for p in
                              (self.folder / name).rglob("*") if p.is_file() and p.name != ".ses")


@contextlib.contextmanager
def running(folder: Path, *args: object, **how: Any) -> Iterator[Running]:
    folder.mkdir(exist_ok=True)
    service = Running(folder, *args, **how)
    try:
        yield service
    finally:
        if service.process.poll() is None:
            service.stop(signal.SIGKILL)
        elif service.process.stdout is not None:
            service.process.stdout.close()


def send(client: httpx.Client, path: Path, **query: Any) -> str:
    """A scan as a form; the new job's id."""
    with path.open("rb") as file:
        answer = client.post("/jobs", files={"file": (path.name, file)}, params=query)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def outcome(client: httpx.Client, job_id: str, seconds: float = 60) -> dict[str, Any]:
    """The job's state, once it is done or failed."""
    return until(lambda: client.get(f"/jobs/{job_id}").json(), lambda job: job["state"] in ("done", "failed"), seconds)


def until(ask: Any, enough: Any = bool, seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not enough(answer := ask()):
        assert time.monotonic() < end, f"still {answer!r}"
        time.sleep(0.05)
    return answer


def fault(answer: httpx.Response, status: int, code: str) -> str:
    """The contract of an error: JSON with three entries, nothing of the machine or of Python in it."""
    assert answer.status_code == status, f"expected {status} {code}, got {answer.status_code}: {answer.text[:300]}"
    told = answer.json()
    assert set(told) == {"code", "message", "request_id"} and told["code"] == code, told
    assert told["request_id"] == answer.headers["x-request-id"]
    assert "/tmp" not in answer.text and "Traceback" not in answer.text and ".py" not in answer.text
    return told["message"]


@contextlib.contextmanager
def connected(service: Running) -> Iterator[socket.socket]:
    with socket.create_connection(service.address, timeout=60) as raw:
        yield raw


def head(service: Running, *lines: str, method: str = "POST", path: str = "/jobs") -> bytes:
    """The head of a request, with a Host that is right."""
    host = service.url.removeprefix("http://")
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode()


def answer_of(raw: socket.socket) -> bytes:
    """All that comes until the service closes, or until an answer is whole."""
    content = b""
    with contextlib.suppress(ConnectionError):
        while chunk := raw.recv(1 << 16):
            content += chunk
            before, found, after = content.partition(b"\r\n\r\n")
            sizes = [line.split(b":")[1] for line in before.lower().split(b"\r\n")
                     if line.startswith(b"content-length:")]
            if found and sizes and len(after) >= int(sizes[0]):
                break
    return content
