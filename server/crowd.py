"""Images that come together, of which only so many are in flight at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from heapq import heappop, heappush
from itertools import count


class Crowd:
    """All images of requests that bring several.

    They have time for one another: what finds no place waits for one, the most urgent first, where
    a single image would be refused.

    Args:
        most: of them in flight; fewer than the server has places for, so that they leave some.
    """

    def __init__(self, most: int) -> None:
        self._free = most
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = count()

    @asynccontextmanager
    async def place(self, deadline: float) -> AsyncIterator[None]:
        """Hold one, as soon as none with an earlier deadline waits for it."""
        if self._free:
            self._free -= 1
        else:
            await self._turn(deadline)
        try:
            yield
        finally:
            self._pass_on()

    async def _turn(self, deadline: float) -> None:
        turn = asyncio.get_running_loop().create_future()
        heappush(self._waiting, (deadline, next(self._numbers), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was given the place in the same moment
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        while self._waiting:
            *_, turn = heappop(self._waiting)
            if not turn.done():  # its request was not cancelled
                turn.set_result(None)
                return
        self._free += 1
