"""The command line: python -m server."""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    # The imports below take seconds, as does reading a bundle. Until uvicorn listens, a container's
    # first process would miss the signal: for that one the kernel drops what it has no handler for.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))

import gc
import logging
import math
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType

import uvicorn

from model.bundle import BundleError
from server.app import create_app
from server.binding import authority, bound, listen
from server.connection import Protocol
from server.listening import Acceptor
from server.logs import configure
from server.served import Served
from server.settings import Settings, SettingsError, load_settings

log = logging.getLogger("offramp")

SWITCH_SECONDS = 0.0005
"""After so long a thread lets go of Python's lock if another waits. With the usual 5 ms, the engine
would wait that long after every operation of torch whenever the event loop is busy."""


class Server(uvicorn.Server):
    """Tells the application as soon as the signal comes that it leaves, then that it drains."""

    def __init__(
        self,
        config: uvicorn.Config,
        served: Served,
        notice_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(config)
        self._served = served
        self._notice_seconds = notice_seconds
        self._clock = clock
        self._drain_at = math.inf
        self._acceptors: list[Acceptor] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers if self.started else ():
            for listening in server.sockets:
                host, port = listening.getsockname()[:2]
                log.info("listening on http://%s", authority(host, port))
                self._acceptors.append(Acceptor(listening, self._protocol))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._served.stop_compiling()  # which a request may wait for
        for acceptor in self._acceptors:
            acceptor.close()
        await super().shutdown(sockets)

    def _protocol(self) -> Protocol:
        return Protocol(self.config, self.server_state, self.lifespan.state)

    async def on_tick(self, counter: int) -> bool:
        """Whether to end: when told to, or when the network cannot run, or not any more."""
        if self._clock() >= self._drain_at:
            self._drain()
        return await super().on_tick(counter) or self._served.failed

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain, then exit with status 0; uvicorn's own would die of the signal afterwards.

        Before that, who sends requests to a ready server may get notice; a second signal ends it.
        """
        again = self.should_exit or self._served.leaving
        self.force_exit = again and sig == signal.SIGINT
        if self._notice_seconds and self._served.ready:
            self._served.leaving = True
            # Who keeps a connection would stay to the end, and lose what is on its way then.
            self.config.encoded_headers.append((b"connection", b"close"))
            self._drain_at = self._clock() + self._notice_seconds
        else:
            self._drain()

    def _drain(self) -> None:
        self._served.draining = True
        self.should_exit = True


def main(argv: list[str] | None = None) -> int:
    """Serve until a signal; a start that cannot succeed is one sentence and exit status 2."""
    with ExitStack() as held:
        try:
            settings = load_settings(sys.argv[1:] if argv is None else argv)
            configure(settings.log_format, settings.log_level)
            sockets = held.enter_context(bound(settings.host, settings.port))
            # Not to be looked through for garbage, which takes 0.1 s for all that torch brings, and
            # nothing is answered meanwhile; a bundle and its requests take 10 ms.
            gc.freeze()
            served = Served(settings)
            listen(sockets)
        except (SettingsError, BundleError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        sys.setswitchinterval(SWITCH_SECONDS)
        server = Server(_config(served, settings), served, settings.drain_notice_seconds)
        server.run(sockets)
        return 1 if served.failed else 0


def _config(served: Served, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(served),
        http=Protocol,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here asks who the client is
        # Without any time uvicorn would not look whether there is anything to wait for.
        timeout_graceful_shutdown=max(0.1, settings.drain_seconds),  # type: ignore[arg-type]
    )


if __name__ == "__main__":
    sys.exit(main())
