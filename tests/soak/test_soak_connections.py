"""The long form of tests/services/serve/test_connections.py: a thousand bad connections at once, and a real service."""

from __future__ import annotations

import contextlib
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
from load import _ASK, Held
from running import Running, head, running, until

pytestmark = pytest.mark.alone

NUM = 1000
SECONDS = 20.0
HEALTH_MS = 250.0
GROWTH_BYTES = 40 << 20
KINDS = {
    "no headers": lambda service: b"",
    "a login body that never comes": lambda service: head(service, "Content-Length: 4000", path="/auth/token"),
    "an answer that is not read": lambda service: head(service, method="GET", path="/ort/ort-wasm-simd-threaded.wasm"),
    "refused senders who stay silent": lambda service: head(service, "Content-Type: text/html", "Content-Length: 9999"),
    "uploads that stop": lambda service: head(service, "Content-Type: application/zip", "Content-Length: 9999") + b"PK",
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    with running(tmp_path_factory.mktemp("service")) as service:
        yield service
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_connections_shut_nobody_out(kind: str, service: Running, figures: Callable[..., None]) -> None:
    host, port = service.address
    before = Held.by(service.process.pid, service.folder)
    with contextlib.ExitStack() as stack:
        asking = subprocess.Popen([sys.executable, "-c", _ASK, host, str(port)], stdout=subprocess.PIPE, text=True)
        stack.callback(asking.kill)
        time.sleep(1)
        for _ in range(NUM):
            raw = stack.enter_context(socket.create_connection(service.address, timeout=30))
            with contextlib.suppress(OSError):  # its place was taken already
                raw.sendall(KINDS[kind](service))
        time.sleep(SECONDS)
        assert asking.poll() is None, "a question was not answered"
        asking.terminate()
        seconds = sorted(float(line) for line in asking.communicate()[0].splitlines())
        p99_ms = 1000 * seconds[int(0.99 * len(seconds))]
        after = Held.by(service.process.pid, service.folder)
        figures("T12", f"{NUM} connections for {SECONDS:.0f} s: {kind}",
                f"/health p99 {p99_ms:.0f} ms, max {1000 * seconds[-1]:.0f} ms of {len(seconds)}; RSS "
                f"{before.rss >> 20} to {after.rss >> 20} MiB; files {before.files} to {after.files}")
        assert p99_ms < HEALTH_MS and after.rss - before.rss < GROWTH_BYTES
        until(lambda: Held.by(service.process.pid, service.folder).files <= before.files + 3, seconds=30)
