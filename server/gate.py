"""Lets one request begin in each turn of the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

EACH_TURN = 1
"""So a turn takes about half a millisecond. With 4, fewer answers were in time on two overloaded
cores."""


class Gate:
    """Requests pass it in the order they came, so many a turn.

    In each turn an event loop reads whatever has come and then begins all of it, while answers that
    are ready wait for the turn to end. Behind a gate a turn is short however much comes at once,
    and what waits, waits where it is seen.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._passed = 0
        """In this turn."""

    async def __call__(self) -> None:
        """Pass, in this turn or a later one."""
        if not self._passed:
            asyncio.get_running_loop().call_soon(self._turn)
        if self._passed < EACH_TURN:
            self._passed += 1
            return
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        await place

    def _turn(self) -> None:
        self._passed = 0
        while self._waiting and self._passed < EACH_TURN:
            place = self._waiting.popleft()
            if not place.done():  # its request was not cancelled
                place.set_result(None)
                self._passed += 1
        if self._passed:
            asyncio.get_running_loop().call_soon(self._turn)


async def each_in_turn(
    work: Callable[[Item], Awaitable[Result]],
    items: Collection[Item],
    place: Callable[[], AbstractAsyncContextManager[None]],
) -> list[Result]:
    """What some work gives for each of the items, of which one begins in a turn: else decoding many
    images of a request would hold others up for longer than one image does.

    Args:
        place: what each of several is done in, once it gets there.

    Raises:
        Exception: what the first that failed raised; the others are cancelled.
    """
    if len(items) == 1:
        return [await work(item) for item in items]
    gate = Gate()

    async def begin(item: Item) -> Result:
        async with place():
            await gate()
            return await work(item)

    working = [asyncio.ensure_future(begin(item)) for item in items]
    try:
        return await asyncio.gather(*working)
    finally:
        for one in working:
            one.cancel()
