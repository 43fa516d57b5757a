"""uvicorn's connections with limits: on their number, and on the time until a request's headers are there."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 1000


def patient_protocol(header_seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol class with a limit on the wait for headers; uvicorn itself waits for ever.

    Args:
        header_seconds: from the start of the wait to the end of the headers.
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
            # While an answer is being sent the connection is kept; uvicorn closes it later.
            if self.conn.their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete):
                self.transport.close()

    return PatientProtocol
