"""What a running server spends outside stages, each part by a measurement of its own."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from tqdm import tqdm

from deploy.exposition import scrape
from deploy.loadtest.client import Client
from deploy.loadtest.load import Result, closed_loop
from deploy.loadtest.samples import Sample
from deploy.sweep.engine import engine
from server.protocol import AnswerBody, SeenBody, Timing

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

    Raises:
        ValueError: it answers something else, or not everybody.
        OSError: it is gone.
    """
    share = await _begin_share(url, samples)
    full_depth = full_depth_query(url, admin_token)
    some = await _answered_flood(url, samples, f"threshold=0&{UNHURRIED}", seconds)
    deep = await _answered_flood(url, samples, full_depth, seconds)
    some += await _answered_flood(url, samples, f"threshold=0&{UNHURRIED}", seconds)
    deep += await _answered_flood(url, samples, full_depth, seconds)
    refused, _ = await _flood(url, samples, "deadline_ms=1", IMPATIENT, seconds)
    request = (some + deep).request_seconds
    return Costs(
        share * request,
        (1 - share) * request,
        refused.request_seconds,
        deep.batch_seconds,
        deep.per_second,
    )


async def _answered_flood(url: str, samples: Sequence[Sample], query: str, seconds: float) -> Flood:
    """Of clients who are all answered, since what is refused is no capacity."""
    flood, results = await _flood(url, samples, query, CLIENTS, seconds)
    status = Counter(r.status for r in results)
    if set(status) != {200}:
        said = ", ".join(f"{n} x {code}" for code, n in sorted(status.items()))
        raise ValueError(
            f"{url} did not answer all of {CLIENTS} clients at once ({said}; 0: no answer), so its "
            f"capacity cannot be told; against 429 raise OFFRAMP_MAX_QUEUE to {CLIENTS} or more"
        )
    return flood


async def _flood(
    url: str, samples: Sequence[Sample], query: str, clients: int, seconds: float
) -> tuple[Flood, list[Result]]:
    async with Client(f"{url}/classify?{query}") as client:
        before = Spent.by_now(url)
        results = await closed_loop(client, samples, clients, seconds)
        spent = Spent.by_now(url) - before
    return Flood(spent, len(results)), results


async def _begin_share(url: str, samples: Sequence[Sample]) -> float:
    """Of a request's time outside queue and stages, the part before it is queued."""
    shares = []
    async with Client(f"{url}/classify?threshold=0&explain=true&{UNHURRIED}") as client:
        for sample in samples:
            seen, timing = await _explained(client, url, sample)
            done = seen[-1].elapsed_ms
            begin = done - timing.queue - timing.compute
            shares.append(begin / (begin + timing.total - done))
    return statistics.median(shares)


def full_depth_query(url: str, admin_token: str) -> str:
    """What has every image pass all exits; a threshold of 1 is reached by what rounds to it."""
    exits = 1 + len(engine(url, admin_token)["ladder"][0]["thresholds"])
    return f"min_exit={exits}&{UNHURRIED}"


async def record_exits(
    url: str, admin_token: str, samples: Sequence[Sample]
) -> tuple[list[Confidences], list[tuple[bool, ...]] | None]:
    """How sure every exit is of each image, and whether it is right; None without labels."""
    query = f"explain=true&{full_depth_query(url, admin_token)}"
    recorded, right = [], []
    async with Client(f"{url}/classify?{query}") as client:
        for sample in tqdm(samples, "recording confidences", leave=False, disable=None):
            exits, _ = await _explained(client, url, sample)
            recorded.append(tuple(seen.confidence for seen in exits))
            right.append(tuple(seen.label == sample.label for seen in exits))
    return recorded, right if all(sample.label for sample in samples) else None


async def _explained(client: Client, url: str, sample: Sample) -> tuple[list[SeenBody], Timing]:
    """What every exit said of an image, and where the time went.

    Raises:
        ValueError: there is no answer, or none that an Offramp gives.
    """
    status, body = await client.post(sample.data)
    if not status:
        raise ValueError(f"{url} gives no answer")
    if status != 200:
        raise ValueError(f"{url} answers {status}: {body.decode(errors='replace')}")
    try:
        answer = AnswerBody.model_validate_json(body)
    except ValueError:
        answer = None
    if answer is None or not answer.seen:
        raise ValueError(f"{url}/classify answers what no Offramp does")
    return answer.seen, answer.timing_ms
