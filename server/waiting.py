"""Clients that wait for an answer, and an end to that where none will come."""

from __future__ import annotations

import asyncio

from server.engine import BEAT_SECONDS, Engine
from server.errors import NotReady
from server.tickets import Answer, Ticket

STUCK = "a worker of the engine is stuck, or the device computes nothing"


class Waiting:
    """Every ticket whose client waits, with the engine that it waits for."""

    def __init__(self) -> None:
        self._engines: dict[Ticket, Engine] = {}
        self._still: set[Engine] = set()
        """Those that did not turn when they were last looked at…"""
        self._stuck: set[Engine] = set()
        """…and those that did not when looked at before, either: where the whole process stood
        still no worker had a chance to."""

    def check(self, engine: Engine) -> None:
        """Let nobody wait for an engine that is stuck.

        Raises:
            NotReady: it is.
        """
        if engine in self._stuck and not engine.turning:
            raise NotReady(STUCK)

    async def answer(self, ticket: Ticket, engine: Engine) -> Answer:
        """Wait for an answer; who gives up frees the job's place.

        Raises:
            NotReady: the engine is stuck.
            OfframpError: as `Engine.submit` says.
        """
        self._engines[ticket] = engine
        try:
            return await ticket.promise
        except (asyncio.CancelledError, NotReady):
            engine.cancel(ticket)
            raise
        finally:
            del self._engines[ticket]

    async def watch(self) -> None:
        """Look at the engines once a beat, until this is cancelled."""
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            self.look()

    def look(self) -> None:
        """Find the engines that are stuck, and have those give up who wait for one."""
        looked_at = self._still.union(self._engines.values())
        still = {engine for engine in looked_at if not engine.turning}
        self._stuck, self._still = still & self._still, still
        loop = asyncio.get_running_loop()
        for ticket, engine in self._engines.items():
            if engine in self._stuck:  # a promise is kept by the loop, never by a task
                loop.call_soon(ticket.settle, NotReady(STUCK))
