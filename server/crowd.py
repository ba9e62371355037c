"""Images that come together, of which only so many are in flight at once."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left, insort
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count

from server.scheduler import PATIENT_SECONDS


@dataclass(frozen=True, slots=True, order=True)
class Queued:
    """An image without a place; the least comes first."""

    urgency: float
    number: int
    deadline: float = field(compare=False)
    turn: asyncio.Future[None] = field(compare=False)


class Crowd:
    """All images of requests that bring several.

    They have time for one another: what finds no place waits for one, the most urgent first, where
    a single image would be refused. One that has waited a quarter of a second is urgent, too. What
    is more urgent than some that have places waits for none of them, as long as there are others.

    Args:
        most: of them in flight; half as many again of the more urgent ones. Fewer than the server
            has places for, so that they leave some.
        clock: seconds; the clock that deadlines are on.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._most, self._urgent_most = most, most + most // 2
        self._clock = clock
        self._inside: list[float] = []
        """Deadlines of those that have places, in order."""
        self._waiting: list[Queued] = []
        self._numbers = count()

    @asynccontextmanager
    async def place(self, deadline: float) -> AsyncIterator[None]:
        """Hold one, as soon as there is one for it."""
        if self._has_place(deadline):
            insort(self._inside, deadline)
        else:
            await self._turn(deadline)
        try:
            yield
        finally:
            self._leave(deadline)

    def _has_place(self, deadline: float) -> bool:
        taken = len(self._inside)
        urgent = taken > 0 and deadline < self._inside[-1]
        return taken < (self._urgent_most if urgent else self._most)

    async def _turn(self, deadline: float) -> None:
        """Wait for a place, which is held from the moment it is given."""
        turn = asyncio.get_running_loop().create_future()
        urgency = min(deadline, self._clock() + PATIENT_SECONDS)
        one = Queued(urgency, next(self._numbers), deadline, turn)
        insort(self._waiting, one)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was given one in the same moment
                self._leave(deadline)
            else:
                self._forget(one)
            raise

    def _forget(self, one: Queued) -> None:
        """It was cancelled, and may have been passed over since."""
        place = bisect_left(self._waiting, one)
        if self._waiting[place : place + 1] == [one]:
            del self._waiting[place]

    def _leave(self, deadline: float) -> None:
        del self._inside[bisect_left(self._inside, deadline)]
        while self._waiting and self._has_place(self._waiting[0].deadline):
            first = self._waiting.pop(0)
            if not first.turn.done():  # its request was not cancelled
                insort(self._inside, first.deadline)
                first.turn.set_result(None)
