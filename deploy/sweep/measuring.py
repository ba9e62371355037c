"""What a running server spends outside stages, each part by a measurement of its own."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from tqdm import tqdm

from deploy.exposition import scrape
from deploy.loadtest.client import Client
from deploy.loadtest.load import closed_loop
from deploy.loadtest.samples import Sample
from deploy.sweep.engine import engine

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
    """What a server had spent by a moment, or between two.

    Seconds of processor time, but the first and the last.
    """

    seconds: float
    event_loop: float
    """Of its thread."""
    engine: float
    """Of its workers' threads."""
    stages: float
    """Of those in stage batches."""
    batches: float

    @classmethod
    def by_now(cls, url: str) -> Spent:
        """Since it started."""
        said = scrape(url)
        return cls(
            time.perf_counter(),
            said.value("offramp_cpu_seconds_total", part="event_loop"),
            said.value("offramp_cpu_seconds_total", part="engine"),
            said.total("offramp_stage_cpu_seconds_total"),
            said.total("offramp_stage_duration_seconds_count"),
        )

    def __sub__(self, before: Spent) -> Spent:
        return Spent(
            *(now - then for now, then in zip(astuple(self), astuple(before), strict=True))
        )

    def __add__(self, other: Spent) -> Spent:
        return Spent(*map(sum, zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True, slots=True)
class Flood:
    """What was spent on many requests at once."""

    spent: Spent
    requests: int

    def __add__(self, other: Flood) -> Flood:
        return Flood(self.spent + other.spent, self.requests + other.requests)

    @property
    def request_seconds(self) -> float:
        """Of the event loop, for each."""
        return self.spent.event_loop / self.requests

    @property
    def batch_seconds(self) -> float:
        """Of the engine outside stages, for each batch."""
        return max(0.0, self.spent.engine - self.spent.stages) / self.spent.batches

    @property
    def per_second(self) -> float:
        """How many were answered in a second."""
        return self.requests / self.spent.seconds


async def measure(url: str, admin_token: str, samples: Sequence[Sample], seconds: float) -> Costs:
    """Load a server in three ways, in turns, and ask it one by one.

    What a request costs the event loop, and a batch the engine, is processor time of their threads:
    what they wait for cores and locks is the simulation's to find. How a request's divides into
    beginning and answering is seen in the timings of requests sent one by one.
    """
    share = await _begin_share(url, samples)
    full_depth = full_depth_query(url, admin_token)
    some = await _flood(url, samples, f"threshold=0&{UNHURRIED}", CLIENTS, seconds)
    deep = await _flood(url, samples, full_depth, CLIENTS, seconds)
    some += await _flood(url, samples, f"threshold=0&{UNHURRIED}", CLIENTS, seconds)
    deep += await _flood(url, samples, full_depth, CLIENTS, seconds)
    refused = await _flood(url, samples, "deadline_ms=1", IMPATIENT, seconds)
    request = (some + deep).request_seconds
    return Costs(
        share * request,
        (1 - share) * request,
        refused.request_seconds,
        deep.batch_seconds,
        deep.per_second,
    )


async def _flood(
    url: str, samples: Sequence[Sample], query: str, clients: int, seconds: float
) -> Flood:
    client = Client(f"{url}/classify?{query}")
    before = Spent.by_now(url)
    results = await closed_loop(client, samples, clients, seconds)
    spent = Spent.by_now(url) - before
    await client.close()
    return Flood(spent, len(results))


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


def full_depth_query(url: str, admin_token: str) -> str:
    """What has every image pass all exits; a threshold of 1 is reached by what rounds to it."""
    exits = 1 + len(engine(url, admin_token)["ladder"][0]["thresholds"])
    return f"min_exit={exits}&{UNHURRIED}"


async def record_exits(
    url: str, admin_token: str, samples: Sequence[Sample]
) -> tuple[list[Confidences], list[tuple[bool, ...]] | None]:
    """How sure every exit is of each image, and whether it is right; None without labels."""
    client = Client(f"{url}/classify?explain=true&{full_depth_query(url, admin_token)}")
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
