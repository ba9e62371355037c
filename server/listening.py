"""Takes every connection that waits, where the event loop would take one a turn.

libuv, which uvloop runs on, accepts one connection in each turn of the loop. Under load a turn
takes milliseconds, and clients whose connections are all busy open more: at a burst's start
connections waited up to a second, unseen, since a request that is not read has not come.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

MOST_AT_ONCE = 1024
"""Connections accepted in one turn, so that requests get their turn too."""


class Acceptor:
    """Accepts what waits at a socket that others listen at as well.

    Args:
        listening: bound and listening; stays its owner's.
        protocol: makes the protocol of a connection.
    """

    def __init__(self, listening: socket.socket, protocol: Callable[[], asyncio.Protocol]) -> None:
        self._loop = asyncio.get_running_loop()
        self._listening = listening.dup()  # a loop watches a descriptor for one reader only
        self._listening.setblocking(False)
        self._protocol = protocol
        self._opening: set[asyncio.Task[object]] = set()
        self._loop.add_reader(self._listening.fileno(), self._accept)

    def close(self) -> None:
        """Accept no more."""
        self._loop.remove_reader(self._listening.fileno())
        self._listening.close()

    def _accept(self) -> None:
        for _ in range(MOST_AT_ONCE):
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return  # none waits, or one went away; were descriptors short, the owner says so
            connection.setblocking(False)
            opening = self._loop.create_task(self._open(connection))
            self._opening.add(opening)
            opening.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket) -> None:
        await self._loop.connect_accepted_socket(self._protocol, connection)
