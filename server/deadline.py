"""What an image waits for no longer than its deadline."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable
from typing import TypeVar

from prometheus_client import Counter

from server.errors import DeadlineExceeded

T = TypeVar("T")


async def in_time(work: Awaitable[T], deadline: float, missed: Counter) -> T:
    """What some work gives, if it is done by the deadline.

    Args:
        work: cancelled then.
        deadline: on `time.perf_counter`.
        missed: counts deadlines that were.

    Raises:
        DeadlineExceeded: it was not done by then.
    """
    seconds = deadline - time.perf_counter()
    try:
        async with asyncio.timeout(seconds if math.isfinite(seconds) else None):
            return await work
    except TimeoutError:
        missed.inc()
        raise DeadlineExceeded from None
