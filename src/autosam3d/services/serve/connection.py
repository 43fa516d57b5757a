"""uvicorn's connections under one clock and with limits on their number: in all, and a peer.

uvicorn itself waits for ever for headers, for a body that an application asks for, and for a reader that does not read.
Here every connection is looked at each second: where the next move is the client's (its headers, its body, its reading)
and it does not come, or comes too slowly, the connection is ended. Where there is no room for a newcomer, it takes the
place of the one that has kept us waiting longest, so that silent connections shut nobody out.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import ipaddress
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from autosam3d.services.serve.settings import ServeSettings

RECEIVING, REFUSED = "receiving", "refused"
"""Keys of a request's state: a scan is being taken in, which keeps its place; its body is read to be thrown away."""
_LOOK_SECONDS = 1.0
# The application's own limits on a body are told in words, so they come first.
_GRACE_SECONDS = 2.0
_MIN_CONNECTIONS = 16
_CROWD = 64
# An answer waits where more than this is not taken yet.
_WAITING_BYTES = 1 << 14
# Files, pipes and sockets that the service opens beside its connections.
_OTHER_FILES = 192


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """What clients may do with connections."""

    header_seconds: float
    """From the start of the wait to the end of the headers."""
    silent_seconds: float
    """Without a byte of a body, or of an answer taken."""
    min_rate: float
    """Bytes a second of a body, or of an answer that waits to be taken, over `rate_seconds`."""
    rate_seconds: float
    max_connections: int
    max_peer_connections: int
    """From one address of IPv4, or one network of 64 bits of IPv6."""

    @classmethod
    def of(cls, settings: ServeSettings) -> ConnectionLimits:
        """Those of a service; fewer connections where the process may open few files."""
        most = max(_MIN_CONNECTIONS, min(settings.max_connections, _max_files() - _OTHER_FILES))
        return cls(header_seconds=settings.header_seconds, silent_seconds=settings.chunk_seconds + _GRACE_SECONDS,
                   min_rate=settings.min_rate, rate_seconds=settings.rate_seconds + _GRACE_SECONDS,
                   max_connections=most, max_peer_connections=min(settings.max_peer_connections, most))


def patient_protocol(limits: ConnectionLimits) -> type[H11Protocol]:
    """uvicorn's protocol class, whose connections share one clock and one count."""
    open_now = _Connections(limits)

    class PatientProtocol(H11Protocol):
        _seen: _Seen | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            transport.set_write_buffer_limits(high=_WAITING_BYTES)
            counted = _Counted(transport)
            super().connection_made(counted)  # type: ignore[arg-type]
            self._seen = _Seen(self, counted, peer_of(self.client))
            if not open_now.admit(self._seen, self.loop):
                transport.abort()

        def data_received(self, data: bytes) -> None:
            assert self._seen is not None
            self._seen.came(len(data))
            super().data_received(data)

        def resume_writing(self) -> None:
            if self._seen is not None:
                self._seen.moved = time.monotonic()
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._seen is not None:
                open_now.forget(self._seen)
            super().connection_lost(exc)

    return PatientProtocol


def peer_of(client: tuple[str, int] | None) -> str:
    """The peer that a connection counts for."""
    host = client[0] if client is not None else ""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host.partition("%")[0])
        if address.version == 6:
            return str(ipaddress.ip_network((address, 64), strict=False))
    return host


class _Counted:
    """A transport that counts what it is given to send."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport, self._given = transport, 0

    def write(self, data: bytes) -> None:
        self._given += len(data)
        self._transport.write(data)

    @property
    def num_sent(self) -> int:
        return self._given - self._transport.get_write_buffer_size()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Seen:
    """One connection as the clock sees it."""

    def __init__(self, protocol: H11Protocol, transport: _Counted, peer: str) -> None:
        self.protocol, self.transport, self.peer = protocol, transport, peer
        self.moved = time.monotonic()
        """When the client last did something, or we did while the next move was ours."""
        self._since, self._owed, self._at_since = self.moved, "", 0
        self._num_came = self._num_moved = 0

    def came(self, num_bytes: int) -> None:
        self._num_came += num_bytes
        self.moved = time.monotonic()

    def owed(self) -> str:
        """What the client's next move must be: "answer" to be read, "headers", "body"; "" where the move is ours."""
        protocol, cycle = self.protocol, self.protocol.cycle
        if self.transport.get_write_buffer_size():
            return "answer"
        if cycle is None or cycle.response_complete:
            return "headers"
        is_body_due = cycle.more_body and not cycle.body and not cycle.waiting_for_100_continue
        return "body" if is_body_due and not protocol.flow.read_paused else ""

    def may_go(self) -> bool:
        """Whether a newcomer may take its place: who only reads may ask again, other work of ours goes on."""
        cycle = self.protocol.cycle
        state = {} if cycle is None else cycle.scope.get("state", {})
        if state.get(RECEIVING):
            return False
        if self.owed() or state.get(REFUSED) or self.transport.is_closing():
            return True
        return cycle is not None and (cycle.response_started or cycle.scope["method"] in ("GET", "HEAD"))

    def is_late(self, now: float, limits: ConnectionLimits) -> bool:
        """Look at the connection; whether it has kept us waiting too long."""
        owed, num = self.owed(), self._num_came + self.transport.num_sent
        if num != self._num_moved or not owed:
            self._num_moved, self.moved = num, now
        if owed != self._owed or not owed:
            self._owed, self._since, self._at_since = owed, now, num
            return False
        waited = now - self._since
        if owed == "headers":
            return waited > limits.header_seconds
        if now - self.moved > limits.silent_seconds:
            return True
        if waited > limits.rate_seconds:
            is_slow = num - self._at_since < limits.min_rate * waited
            self._since, self._at_since = now, num
            return is_slow
        return False

    def end(self) -> None:
        """Close in order where only headers are missing; else at once, since what is not read is never flushed."""
        if self._owed == "headers":
            self.transport.close()
        else:
            self.transport.abort()


class _Connections:
    """All connections of a service. Only the event loop's thread uses it."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self._limits = limits
        self._peers: dict[str, dict[_Seen, None]] = {}
        self._count, self._was_crowded = 0, False
        self._due: asyncio.TimerHandle | None = None

    def admit(self, new: _Seen, loop: asyncio.AbstractEventLoop) -> bool:
        """Take a newcomer in, if need be in another's place; False where nobody can go."""
        limits, own = self._limits, self._peers.get(new.peer, {})
        if len(own) >= limits.max_peer_connections and not self._make_room(own):
            return False
        if self._count >= limits.max_connections:
            most = max(map(len, self._peers.values()))
            crowd = [one for peers in self._peers.values() if len(peers) == most for one in peers]
            if not self._make_room(crowd) and not self._make_room(one for all_ in self._peers.values() for one in all_):
                return False
        self._peers.setdefault(new.peer, {})[new] = None
        self._count += 1
        if self._due is None:
            self._due = loop.call_later(_LOOK_SECONDS, self._look, loop)
        return True

    def forget(self, one: _Seen) -> None:
        peers = self._peers.get(one.peer, {})
        if one in peers:
            del peers[one]
            self._count -= 1
            if not peers:
                del self._peers[one.peer]

    def _make_room(self, among: Iterable[_Seen]) -> bool:
        longest = min((one for one in among if one.may_go()), key=lambda one: one.moved, default=None)
        if longest is None:
            return False
        self.forget(longest)
        longest.transport.abort()
        return True

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now = time.monotonic()
        for one in [one for peers in self._peers.values() for one in peers]:
            if one.is_late(now, self._limits):
                one.end()
        self._was_crowded |= self._count > _CROWD
        if self._was_crowded and self._count < _CROWD // 4:
            self._was_crowded = False
            _give_memory_back()
        self._due = loop.call_later(_LOOK_SECONDS, self._look, loop) if self._peers else None


def _give_memory_back() -> None:
    """glibc keeps what was freed; after a crowd that is tens of megabytes."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _max_files() -> int:
    """Files that this process may open."""
    with contextlib.suppress(ImportError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if limit != resource.RLIM_INFINITY:
            return limit
    return 1 << 20
