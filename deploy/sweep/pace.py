"""How long a server's stage batches take in the course of a load."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

from deploy.sweep.engine import Row, engine

WATCH_SECONDS = 0.2
"""Between two looks, each of which costs the server about a request."""

Moments = Sequence[tuple[float, float]]
"""Seconds from the start of a load, and what all batches of the cost table together took then."""


@asynccontextmanager
async def watching(url: str, admin_token: str) -> AsyncIterator[list[tuple[float, float]]]:
    """Look at a server's cost table again and again; the list that is given fills meanwhile."""
    moments: list[tuple[float, float]] = []
    watcher = asyncio.ensure_future(_watch(url, admin_token, moments))
    try:
        yield moments
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher


async def _watch(url: str, admin_token: str, moments: list[tuple[float, float]]) -> None:
    began = time.perf_counter()
    while True:
        with suppress(OSError):  # under load, one look less
            said = await asyncio.to_thread(engine, url, admin_token)
            moments.append((round(time.perf_counter() - began, 3), together(said)))
        await asyncio.sleep(WATCH_SECONDS)


def together(said: Row) -> float:
    """Seconds that one batch of every stage and size is expected to take."""
    return sum(s for sizes in said["seconds"].values() for s in sizes.values())


def pace_of(moments: Moments) -> Callable[[float], float]:
    """What batches take at a time, as a multiple of what they took at the first moment.

    Args:
        moments: of a load; with none they take as long as ever.
    """
    if not moments:
        return lambda _: 1.0
    times, taken = zip(*moments, strict=True)

    def pace(now: float) -> float:
        multiple: float = taken[max(0, bisect_right(times, now) - 1)] / taken[0]
        return multiple

    return pace
