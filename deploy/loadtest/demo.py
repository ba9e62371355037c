"""A load without end that makes every panel of the dashboards move.

    python -m deploy.loadtest.demo http://localhost:8000/classify --images DIR

Clients come and go in waves, most with a deadline now and then one in a hurry; a few send what is
no image.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from deploy.loadtest.client import Client
from deploy.loadtest.samples import Sample, read_samples
from deploy.options import count, positive

DEADLINES_MS = (None, None, 250, 100, 25)
"""What a client may ask for, the server's own default among them."""
BROKEN_SHARE = 0.01
REST_SECONDS = 0.02
"""Between two requests of one client, so that a calm server is not a busy one."""
BACK_OFF_SECONDS = 0.5
REPORT_SECONDS = 10.0


def wanted_clients(seconds: float, most: int, period: float) -> int:
    """How many clients there are at this time: a wave from 1 to half of `most`, with a peak.

    For the tenth of each period after its middle, all of them come.
    """
    phase = seconds % period / period
    if 0.5 <= phase < 0.6:
        return most
    return 1 + round(max(0, most / 2 - 1) * (1 - math.cos(2 * math.pi * phase)) / 2)


class Crowd:
    """Clients of one server, as many at a time as the wave asks for.

    Args:
        url: where images are posted.
        samples: what they send.
        most: how many there are at the peak.
        period: seconds from one peak to the next.
    """

    def __init__(self, url: str, samples: Sequence[Sample], most: int, period: float) -> None:
        self._clients = {
            ms: Client(url if ms is None else _asking(url, f"deadline_ms={ms}"))
            for ms in dict.fromkeys(DEADLINES_MS)
        }
        self._samples = samples
        self._most = most
        self._period = period
        self._began = time.perf_counter()
        self.statuses: Counter[int] = Counter()

    async def run(self, seconds: float) -> None:
        """Load the server for so long."""
        members = [self._member(i, seconds) for i in range(self._most)]
        await asyncio.gather(*members)
        for client in self._clients.values():
            await client.close()

    async def _member(self, number: int, seconds: float) -> None:
        chance = random.Random(number)
        while (now := time.perf_counter() - self._began) < seconds:
            if number >= wanted_clients(now, self._most, self._period):
                await asyncio.sleep(BACK_OFF_SECONDS)
                continue
            status = await self._send(chance)
            self.statuses[status] += 1
            busy = status in (0, 429, 503)
            await asyncio.sleep(BACK_OFF_SECONDS if busy else REST_SECONDS)

    async def _send(self, chance: random.Random) -> int:
        data = chance.choice(self._samples).data
        if chance.random() < BROKEN_SHARE:
            data = data[: len(data) // 2]
        client = self._clients[chance.choice(DEADLINES_MS)]
        status, _ = await client.post(data)
        return status


def _asking(url: str, parameter: str) -> str:
    return f"{url}{'&' if urlsplit(url).query else '?'}{parameter}"


def main(argv: list[str] | None = None) -> int:
    """Load one server until interrupted, or for as long as was asked."""
    arguments = _parser().parse_args(argv)
    try:
        samples = read_samples(arguments.images)
        crowd = Crowd(arguments.url, samples, arguments.clients, arguments.period)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_run(crowd, arguments.seconds))
    return 0


async def _run(crowd: Crowd, seconds: float) -> None:
    reporter = asyncio.create_task(_report(crowd))
    await crowd.run(seconds)
    reporter.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reporter


async def _report(crowd: Crowd) -> None:
    """Say what came of the requests, again and again, and of the last at the end."""
    while True:
        began = time.perf_counter()
        try:
            await asyncio.sleep(REPORT_SECONDS)
        finally:
            said = ", ".join(f"{n} x {status}" for status, n in sorted(crowd.statuses.items()))
            seconds = time.perf_counter() - began
            print(f"in {seconds:.1f} s: {said or 'nothing'} (0: no response)", flush=True)
            crowd.statuses.clear()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.loadtest.demo",
        description="Load a server in waves, with deadlines and broken images among the rest.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("url", metavar="URL", help="where images are posted")
    parser.add_argument("--images", type=Path, required=True, help="folder or tar archive")
    parser.add_argument("--clients", type=count, default=32, help="at the peak of a wave")
    parser.add_argument("--period", type=positive, default=120.0, help="seconds from peak to peak")
    parser.add_argument("--seconds", type=positive, default=math.inf, help="how long to go on")
    return parser


if __name__ == "__main__":
    sys.exit(main())
