"""One clock for every phase of a connection, and a cap on the connections of a peer: on sockets, without a model."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from running import answer_of, until

from autosam3d.services.serve import connection
from autosam3d.services.serve.connection import RECEIVING, REFUSED, ConnectionLimits, patient_protocol, peer_of
from autosam3d.services.serve.guard import host_name
from autosam3d.services.serve.settings import ServeSettings

LIMITS = ConnectionLimits(header_seconds=0.4, silent_seconds=0.4, min_rate=10_000, rate_seconds=0.8,
                          max_connections=20, max_peer_connections=12)


async def _app(scope: Any, receive: Any, send: Any) -> None:
    path = scope["path"]
    if path in ("/receiving", "/refused"):
        scope["state"][RECEIVING if path == "/receiving" else REFUSED] = True
    if path == "/work":
        await asyncio.sleep(0.9)
    size = 30 << 20 if path == "/large" else 2
    try:
        while path not in ("/work", "/large", "/health") and (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200,
                    "headers": [(b"content-length", str(size).encode())]})
        for _ in range(max(1, size >> 16)):
            await send({"type": "http.response.body", "body": bytes(min(size, 1 << 16)), "more_body": True})
        await send({"type": "http.response.body"})
    finally:
        scope["state"][RECEIVING] = False


@contextlib.contextmanager
def _served(limits: ConnectionLimits) -> Iterator[tuple[tuple[str, int], set[Any]]]:
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(_app, http=patient_protocol(limits), ws="none", lifespan="off",
                                           loop="asyncio", log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    thread.start()
    try:
        until(lambda: server.started, seconds=10)
        yield listening.getsockname(), server.server_state.connections
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_LOOK_SECONDS", 0.05)


def _opened(address: tuple[str, int], sent: bytes) -> socket.socket:
    raw = socket.create_connection(address, timeout=10)
    raw.sendall(sent)
    return raw


def _head(path: str, *lines: str, method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *lines, "", ""]).encode()


def _drip(raw: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            raw.sendall(b"x")
            time.sleep(0.05)


SILENT = {
    "no headers": (b"", None),
    "half of the headers": (b"GET / HTTP/1.1\r\nHos", None),
    "headers a byte at a time": (b"GET / HTTP/1.1\r\nX: ", _drip),
    "a body that never comes": (_head("/", "Content-Length: 4000"), None),
    "a body that stops": (_head("/", "Content-Length: 4000") + b"x", None),
    "a chunk that never comes": (_head("/", "Transfer-Encoding: chunked"), None),
    "a body a byte at a time": (_head("/", "Content-Length: 4000"), _drip),
    "a refused sender who stays": (_head("/refused", "Content-Length: 4000"), None),
    "an answer that is not read": (_head("/large", method="GET"), None),
    "an answer that is not read, and a body": (_head("/large", "Content-Length: 4000"), _drip),
}


def test_who_keeps_us_waiting_is_let_go() -> None:
    """Each kind has a connection of its own; all of them are waited for together."""
    with _served(LIMITS) as (address, connections), contextlib.ExitStack() as stack:
        began, kinds = time.monotonic(), {}
        for kind, (sent, more) in SILENT.items():
            raw = stack.enter_context(_opened(address, sent))
            kinds[raw.getsockname()] = kind
            if more is not None:
                threading.Thread(target=more, args=(raw,), daemon=True).start()
        gone = {}
        while len(gone) < len(SILENT) and time.monotonic() < began + 5:
            time.sleep(0.02)
            there = {one.client for one in connections.copy()}
            left = [kind for at, kind in kinds.items() if at not in there and kind not in gone]
            gone |= dict.fromkeys(left, time.monotonic() - began)
        assert gone.keys() == SILENT.keys(), set(SILENT) - set(gone)
        assert min(gone.values()) > 0.3, gone


def test_who_waits_for_us_or_takes_his_answer_is_kept() -> None:
    with _served(LIMITS) as (address, _):
        with _opened(address, _head("/work", method="GET")) as raw:  # our work, longer than any limit
            assert answer_of(raw).startswith(b"HTTP/1.1 200")
        with _opened(address, _head("/large", method="GET")) as raw:  # more than a second, in sips
            num = 0
            while num < 30 << 20:
                num += len(raw.recv(1 << 20))
                time.sleep(0.004)
        with _opened(address, _head("/", "Content-Length: 30000")) as raw:
            for _ in range(10):
                raw.sendall(bytes(3000))
                time.sleep(0.1)
            assert answer_of(raw).startswith(b"HTTP/1.1 200")


def test_a_newcomer_takes_the_place_of_the_longest_silent() -> None:
    patient = replace(LIMITS, header_seconds=60, silent_seconds=60, rate_seconds=60)
    with _served(patient) as (address, connections), contextlib.ExitStack() as stack:
        def opened(sent: bytes) -> socket.socket:
            raw = stack.enter_context(_opened(address, sent))
            until(lambda: any(one.client == raw.getsockname() and one.cycle for one in connections.copy()), seconds=5)
            return raw

        kept = opened(_head("/receiving", "Content-Length: 4000"))
        silent = [opened(_head("/", "Content-Length: 4000")) for _ in range(20)]
        assert len(connections) <= 13
        for _ in range(20):
            with _opened(address, _head("/health", method="GET")) as raw:
                assert answer_of(raw).startswith(b"HTTP/1.1 200")
        kept.sendall(bytes(4000))
        assert answer_of(kept).startswith(b"HTTP/1.1 200")
        silent[-1].sendall(bytes(4000))  # the youngest is still there, the eldest is not
        assert answer_of(silent[-1]).startswith(b"HTTP/1.1 200")
        assert answer_of(silent[0]) == b""


def test_what_is_only_read_makes_room_and_work_does_not() -> None:
    few = replace(LIMITS, silent_seconds=60, rate_seconds=60, max_connections=3, max_peer_connections=3)
    with _served(few) as (address, connections), contextlib.ExitStack() as stack:
        def busy(method: str) -> socket.socket:
            raw = stack.enter_context(_opened(address, _head("/work", method=method)))
            until(lambda: any(one.client == raw.getsockname() and one.cycle for one in connections.copy()), seconds=5)
            return raw

        posts, read = [busy("POST"), busy("POST")], busy("GET")
        with _opened(address, _head("/health", method="GET")) as raw:
            assert answer_of(raw).startswith(b"HTTP/1.1 200")
        assert answer_of(read) == b""
        assert all(answer_of(raw).startswith(b"HTTP/1.1 200") for raw in posts)


def test_where_nobody_can_go_the_newcomer_does() -> None:
    few = replace(LIMITS, silent_seconds=60, rate_seconds=60, max_connections=3, max_peer_connections=3)
    with _served(few) as (address, connections), contextlib.ExitStack() as stack:
        busy = [stack.enter_context(_opened(address, _head("/receiving", "Content-Length: 10"))) for _ in range(3)]
        until(lambda: len(connections) == 3 and all(one.cycle for one in connections), seconds=5)
        with _opened(address, b"") as raw, contextlib.suppress(ConnectionError):
            assert raw.recv(1) == b""
        for raw in busy:
            raw.sendall(bytes(10))
            assert answer_of(raw).startswith(b"HTTP/1.1 200")


def test_limits_of_a_service_and_peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    told = ConnectionLimits.of(ServeSettings(folder=tmp_path))
    assert told.max_peer_connections <= 256 and told.max_connections <= 1000 and told.silent_seconds <= 15
    files: Callable[[int], tuple[int, int]] = lambda kind: (256, 256)  # noqa: E731
    monkeypatch.setattr("resource.getrlimit", files)
    few = ConnectionLimits.of(ServeSettings(folder=tmp_path))
    assert (few.max_connections, few.max_peer_connections) == (64, 64)
    assert [peer_of((host, 1)) for host in ("10.1.2.3", "::1", "2001:db8::1", "2001:db8::ffff:1", "fe80::1%eth0")] == [
        "10.1.2.3", "::/64", "2001:db8::/64", "2001:db8::/64", "fe80::/64"]
    assert peer_of(None) == ""


@pytest.mark.parametrize(("host", "name"), [
    ("127.0.0.1", "127.0.0.1"), ("127.0.0.1:8000", "127.0.0.1"), ("Localhost:", "localhost"), ("[::1]", "::1"),
    ("[::1]:8000", "::1"), ("[0:0:0:0:0:0:0:1]", "::1"), ("ct.example.org:1", "ct.example.org"),
    *((bad, None) for bad in ("[::1]evil", "[::1]evil:8000", "[::1].evil.example", "[::1]:8000evil", "[::1", "::1",
                              "::1]", "127.0.0.1]", "[127.0.0.1]", "[localhost]", "[[::1]]", "127.0.0.1:80:90",
                              "127.0.0.1:evil", "localhost:80@evil", "evil@localhost", "localhost/", "localhost#x",
                              "localhost?x", "", ":8000", "localhost,evil", "[fe80::1%25eth0]", "local host", "é")),
])
def test_a_host_is_a_name_or_an_address_and_nothing_more(host: str, name: str | None) -> None:
    assert host_name(host) == name


def test_a_closing_connection_may_go() -> None:
    """Its answer waits to be read for ever: it is no obstacle for others."""
    transport = SimpleNamespace(get_write_buffer_size=lambda: 5, is_closing=lambda: True)
    seen = connection._Seen(SimpleNamespace(cycle=None), transport, "x")  # type: ignore[arg-type]
    assert seen.may_go() and seen.owed() == "answer"
