"""One connection as uvicorn has it, and no longer than it takes to say what one wants."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 1000


def patient_protocol(header_seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which by itself waits for a request's headers for ever.

    Args:
        header_seconds: from the first byte that is waited for to the end of the headers.
    """

    class PatientProtocol(H11Protocol):
        _due: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > MAX_CONNECTIONS:
                transport.close()
                return
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def _watch(self) -> None:
            if self.conn.their_state is not h11.IDLE:
                self._forget()
            elif self._due is None:
                self._due = self.loop.call_later(header_seconds, self._give_up)

        def _forget(self) -> None:
            if self._due is not None:
                self._due.cancel()
                self._due = None

        def _give_up(self) -> None:
            self._due = None
            # An answer may be on its way, to a request whose follower has not come: that is uvicorn's to end.
            if self.conn.their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete):
                self.transport.close()

    return PatientProtocol
