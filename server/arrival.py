"""When a request came."""

from __future__ import annotations

import time

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

ARRIVED = "offramp.arrived"
"""In a request's scope: seconds of `time.perf_counter` when its first byte was read."""


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, which notes when a request came.

    A request's own code runs a turn of the event loop later or more, and under load a turn takes
    long: a deadline counted from there would be kept on paper alone.
    """

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[ARRIVED] = time.perf_counter()  # type: ignore[typeddict-unknown-key]
