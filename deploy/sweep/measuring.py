"""What a running server spends outside stages, each part by a measurement of its own."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from deploy.exposition import scrape
from deploy.loadtest.client import Client
from deploy.loadtest.load import closed_loop
from deploy.loadtest.samples import Sample
from deploy.sweep.engine import cost_table, engine
from server.costs import CostTable

CLIENTS = 64
"""Enough that the engine finds a full batch whenever it is done with one."""
IMPATIENT = 256
"""Enough that the event loop is always behind, so that whoever allows 1 ms is refused at once."""
UNHURRIED = "deadline_ms=60000"
Confidences = tuple[float, ...]
"""Of every exit, shallow to deep."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of one thing each, as if nothing else ran; and the server's capacity."""

    begin: float
    answer: float
    refuse: float
    batch: float
    full_depth_per_second: float


@dataclass(frozen=True, slots=True)
class Spent:
    """What a server had spent by a moment, or between two."""

    seconds: float
    processor: float
    stages: float
    batches: float

    @classmethod
    def by_now(cls, url: str) -> Spent:
        """Since it started."""
        said, family = scrape(url), "offramp_stage_duration_seconds"
        return cls(
            time.perf_counter(),
            said.total("process_cpu_seconds_total"),
            said.total(f"{family}_sum"),
            said.total(f"{family}_count"),
        )

    def __sub__(self, before: Spent) -> Spent:
        return Spent(
            self.seconds - before.seconds,
            self.processor - before.processor,
            self.stages - before.stages,
            self.batches - before.batches,
        )

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.seconds + other.seconds,
            self.processor + other.processor,
            self.stages + other.stages,
            self.batches + other.batches,
        )


@dataclass(frozen=True, slots=True)
class Flood:
    """What was spent on many requests at once."""

    spent: Spent
    requests: int
    exits: int = 0
    """Stages that each of them ran."""

    def __add__(self, other: Flood) -> Flood:
        return Flood(self.spent + other.spent, self.requests + other.requests, self.exits)

    @property
    def processor(self) -> float:
        """Processor seconds a request."""
        return self.spent.processor / self.requests

    def expected(self, costs: CostTable) -> float:
        """Seconds of stages a request, by what the server expects of batches of the mean size."""
        size = self.exits * self.requests / self.spent.batches
        return sum(costs.seconds(k, size) / size for k in range(1, self.exits + 1))


async def measure(url: str, admin_token: str, samples: Sequence[Sample], seconds: float) -> Costs:
    """Load a server in three ways, one after the other, and ask it one by one.

    What a request costs outside stages is what is left of the processor's time if stages are
    thought away: from floods that leave at the first exit and floods that leave at the last. How
    it divides into beginning and answering is seen in the timings of requests sent one by one.
    """
    table = cost_table(engine(url, admin_token))
    share = await _begin_share(url, samples)
    first = await _flood(url, samples, f"threshold=0&{UNHURRIED}", CLIENTS, seconds, 1)
    last = await _flood(url, samples, f"threshold=1&{UNHURRIED}", CLIENTS, seconds, table.stages)
    first += await _flood(url, samples, f"threshold=0&{UNHURRIED}", CLIENTS, seconds, 1)
    last += await _flood(url, samples, f"threshold=1&{UNHURRIED}", CLIENTS, seconds, table.stages)
    refused = await _flood(url, samples, "deadline_ms=1", IMPATIENT, seconds)
    # An answer takes no less than a refusal, whatever other programs did to the clocks.
    request = max(refused.processor, without_stages(first, last, table))
    capacity = last.requests / last.spent.seconds
    # While the engine was between two batches it shared Python's lock with the event loop.
    slowed = 1 + min(1.0, capacity * request)
    between = max(0.0, last.spent.seconds - last.spent.stages) / last.spent.batches / slowed
    return Costs(share * request, (1 - share) * request, refused.processor, between, capacity)


def without_stages(first: Flood, last: Flood, costs: CostTable) -> float:
    """Processor seconds of a request that would run no stage.

    Args:
        first: leaves at the first exit.
        last: leaves at the last.
        costs: what stages take, by a clock that may be wrong by any factor.
    """
    shallow, deep = first.expected(costs), last.expected(costs)
    factor = (last.processor - first.processor) / (deep - shallow)
    return first.processor - factor * shallow


async def _flood(
    url: str, samples: Sequence[Sample], query: str, clients: int, seconds: float, exits: int = 0
) -> Flood:
    client = Client(f"{url}/classify?{query}")
    before = Spent.by_now(url)
    results = await closed_loop(client, samples, clients, seconds)
    spent = Spent.by_now(url) - before
    await client.close()
    return Flood(spent, len(results), exits)


async def _begin_share(url: str, samples: Sequence[Sample]) -> float:
    """Of a request's time outside queue and stages, the part before it is queued."""
    client = Client(f"{url}/classify?threshold=0&explain=true&{UNHURRIED}")
    shares = []
    for sample in samples:
        answer = await _asked(client, url, sample)
        timing, done = answer["timing_ms"], answer["seen"][-1]["elapsed_ms"]
        begin = done - timing["queue"] - timing["compute"]
        shares.append(begin / (begin + timing["total"] - done))
    await client.close()
    return statistics.median(shares)


async def record_exits(
    url: str, samples: Sequence[Sample]
) -> tuple[list[Confidences], list[tuple[bool, ...]] | None]:
    """How sure every exit is of each image, and whether it is right; None without labels."""
    client = Client(f"{url}/classify?threshold=1&explain=true&{UNHURRIED}")
    recorded, right = [], []
    for sample in tqdm(samples, "recording confidences", leave=False, disable=None):
        answer = await _asked(client, url, sample)
        recorded.append(tuple(seen["confidence"] for seen in answer["seen"]))
        right.append(tuple(seen["label"] == sample.label for seen in answer["seen"]))
    await client.close()
    return recorded, right if all(sample.label for sample in samples) else None


async def _asked(client: Client, url: str, sample: Sample) -> Any:
    status, body = await client.post(sample.data)
    if not status:
        raise ValueError(f"{url} gives no answer")
    if status != 200:
        raise ValueError(f"{url} answers {status}: {body.decode(errors='replace')}")
    return json.loads(body)
