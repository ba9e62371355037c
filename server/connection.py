"""uvicorn's HTTP protocol, which also notes what it knows of a request's time and client."""

from __future__ import annotations

import asyncio
import time

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.arrival import ARRIVED, READ
from server.departure import CONNECTION, Connection


class Protocol(HttpToolsProtocol):
    """Notes in each request's scope when it came, and its connection.

    A request's own code runs a turn of the event loop later or more, and under load a turn takes
    long: a deadline counted from there would be kept on paper alone.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._connection = Connection()
        self._cycles: list[RequestResponseCycle] = []
        """Of requests that are not answered, pipelined ones too; uvicorn knows the newest."""

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for cycle in self._unanswered():  # or uvicorn would log that they gave no response
            cycle.disconnected = True
            cycle.message_event.set()
        self._connection.lost()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[ARRIVED] = time.perf_counter()  # type: ignore[literal-required]
        self.scope[CONNECTION] = self._connection  # type: ignore[literal-required]

    def on_headers_complete(self) -> None:
        self.scope[READ] = time.perf_counter()  # type: ignore[literal-required]
        super().on_headers_complete()
        self._cycles = [*self._unanswered(), self.cycle]

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if not self.pipeline:  # a paused transport does not see its client leave
            self.flow.resume_reading()

    def _unanswered(self) -> list[RequestResponseCycle]:
        return [cycle for cycle in self._cycles if not cycle.response_complete]
