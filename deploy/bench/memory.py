"""Whether a server's memory stays flat over an hour's worth of requests."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from deploy.exposition import scrape
from deploy.loadtest.client import Client
from deploy.loadtest.samples import Sample

KINDS = {"plain": 80, "explain": 8, "stream": 6, "broken": 3, "leaving": 3}
"""How often each kind of request is sent, in hundredths."""
PATIENCE_SECONDS = 0.002
"""After which a client that leaves has left."""
EXPECTED = {"200", "400", "429", "504", "left"}
"""What may come of a request: some are of broken images, and a machine may be busy."""
MOST_LOOKS = 400
LEAST_REQUESTS = 20
"""From one look at the memory to the next."""
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Look:
    """The memory at one moment."""

    requests: int
    """Sent by then."""
    mib: float
    """Resident."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What a run showed."""

    looks: tuple[Look, ...]
    seconds: float
    statuses: dict[str, int]
    """Requests by what came of them; `left` where the client went away."""

    @property
    def growth_mib(self) -> float:
        """From the start of the last half to its end, each the median of a tenth of all looks.

        The first half does not count: it fills pools, caches and arenas.
        """
        tenth = max(1, len(self.looks) // 10)
        half = self.looks[len(self.looks) // 2 :]
        return _median(half[-tenth:]) - _median(half[:tenth])

    @property
    def bytes_per_request(self) -> float:
        """The same growth for each request of the last half."""
        sent = self.looks[-1].requests - self.looks[len(self.looks) // 2].requests
        return self.growth_mib * MIB / max(1, sent)

    def as_dict(self) -> dict[str, Any]:
        """Every figure."""
        return {
            "requests": self.looks[-1].requests,
            "seconds": self.seconds,
            "growth_mib": self.growth_mib,
            "bytes_per_request": self.bytes_per_request,
            "statuses": self.statuses,
            "looks": [[look.requests, look.mib] for look in self.looks],
        }


def _median(looks: Sequence[Look]) -> float:
    return statistics.median(look.mib for look in looks)


class Crowd:
    """Clients that send requests of all kinds, each its next when the last is done with.

    Args:
        url: `http://host:port` of the server.
        samples: what they send.
        requests: how many in all.
    """

    def __init__(self, url: str, samples: Sequence[Sample], requests: int) -> None:
        self._url = url
        self._samples = samples
        self._requests = requests
        self._pause = max(LEAST_REQUESTS, requests // MOST_LOOKS)
        classify = f"{url}/classify"
        plain = Client(classify)
        self._clients = {
            "plain": plain,
            "explain": Client(f"{classify}?explain=true"),
            "stream": Client(classify, {"Accept": "text/event-stream"}),
            "broken": plain,
            "leaving": Client(classify),
        }
        self._sent = 0
        self._statuses: Counter[str] = Counter()
        self._looks: list[Look] = []

    async def run(self, clients: int) -> Memory:
        """Send everything, and look at the server's memory all along.

        Raises:
            ConnectionError: the server is gone.
            ValueError: it does not export its memory.
        """
        began = time.perf_counter()
        await self._look()
        with tqdm(total=self._requests, unit=" requests", leave=False, disable=None) as bar:
            await asyncio.gather(*(self._client(i, bar) for i in range(clients)))
        await self._look()
        for client in {id(c): c for c in self._clients.values()}.values():
            await client.close()
        seconds = time.perf_counter() - began
        return Memory(tuple(self._looks), seconds, dict(sorted(self._statuses.items())))

    async def _client(self, number: int, bar: Any) -> None:
        chance = random.Random(number)
        while self._sent < self._requests:
            self._sent += 1
            look = self._sent % self._pause == 0
            self._statuses[await self._send(chance)] += 1
            bar.update()
            if look:
                await self._look()

    async def _send(self, chance: random.Random) -> str:
        kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
        data = chance.choice(self._samples).data
        post = self._clients[kind].post(data[: len(data) // 2] if kind == "broken" else data)
        if kind != "leaving":
            return str((await post)[0])
        with contextlib.suppress(TimeoutError):
            return str((await asyncio.wait_for(post, PATIENCE_SECONDS))[0])
        return "left"

    async def _look(self) -> None:
        mib = await asyncio.to_thread(resident_mib, self._url)
        self._looks.append(Look(self._sent, mib))


def resident_mib(url: str) -> float:
    """The server's resident memory, as it says itself.

    Raises:
        ConnectionError: it is gone.
        ValueError: it does not say.
    """
    return scrape(url, timeout=60).total("process_resident_memory_bytes") / MIB


def plot(memory: Memory, file: Path) -> None:
    """Resident memory over requests."""
    import matplotlib  # wanted by this option alone

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    axis.plot([look.requests for look in memory.looks], [look.mib for look in memory.looks])
    half = memory.looks[len(memory.looks) // 2].requests
    axis.axvspan(half, memory.looks[-1].requests, alpha=0.1, label="the half that counts")
    axis.set(xlabel="requests", ylabel="resident memory, MiB", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.savefig(file, dpi=120)
    plt.close(figure)
