"""Sends a load and notes what came of every request."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.loadtest.client import Client
from deploy.loadtest.samples import Sample

PATIENCE_SECONDS = 60.0
"""After which a request is given up unless told otherwise, so that every measurement ends."""


CLASSIFY = "/classify"
"""Where Offramp is asked, whose answers all have a label; of other servers no form is known."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one request."""

    intended: float
    """When it should have been sent, in seconds from the start."""
    sent: float
    finished: float
    status: int
    """0 where no response came in time, or none that says something of an image."""
    right: bool | None
    """Whether the label was right; None where none is known."""
    exit: int = 0
    reason: str = ""

    @property
    def seconds(self) -> float:
        """From when it should have been sent, so that a stalled sender hides nothing."""
        return self.finished - self.intended


async def open_loop(
    client: Client,
    samples: Sequence[Sample],
    times: Sequence[float],
    seed: int = 0,
    patience: float = PATIENCE_SECONDS,
) -> list[Result]:
    """Send at these times, whatever has been answered by then.

    Args:
        patience: seconds after which a request is given up, as status 0.
    """
    with _steady():
        chance, began = random.Random(seed), time.perf_counter()
        tasks = []
        for at in times:
            delay = at - (time.perf_counter() - began)
            if delay > 0:
                await asyncio.sleep(delay)
            sample = chance.choice(samples)
            tasks.append(asyncio.create_task(_send(client, sample, began, at, patience)))
        return list(await asyncio.gather(*tasks))


@contextlib.contextmanager
def _steady() -> Iterator[None]:
    """Look through nothing for garbage that was there before: with torch in the same process that
    takes 0.1 s, in which nothing would be sent.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


async def closed_loop(
    client: Client,
    samples: Sequence[Sample],
    clients: int,
    seconds: float,
    seed: int = 0,
    patience: float = PATIENCE_SECONDS,
) -> list[Result]:
    """So many clients, each sending its next request when the last was answered or given up.

    Args:
        seconds: after which none begins another.
        patience: seconds after which a request is given up, as status 0.
    """
    began = time.perf_counter()

    async def one(number: int) -> list[Result]:
        chance, results = random.Random(seed + number), []
        while (now := time.perf_counter() - began) < seconds:
            results.append(await _send(client, chance.choice(samples), began, now, patience))
        return results

    return [r for rs in await asyncio.gather(*map(one, range(clients))) for r in rs]


async def once(
    client: Client, samples: Sequence[Sample], clients: int, patience: float = PATIENCE_SECONDS
) -> list[Result]:
    """Send every sample once, from so many clients.

    A client that gave a request up sends no more, so that a server that has fallen silent is not
    waited for once a sample.

    Args:
        patience: seconds after which a request is given up, as status 0.
    """
    began, left = time.perf_counter(), iter(samples)

    async def one() -> list[Result]:
        results: list[Result] = []
        for sample in left:
            now = time.perf_counter() - began
            results.append(await _send(client, sample, began, now, patience))
            if results[-1].seconds >= patience:
                break
        return results

    return [r for rs in await asyncio.gather(*(one() for _ in range(clients))) for r in rs]


async def _send(
    client: Client,
    sample: Sample,
    began: float,
    intended: float,
    patience: float,
) -> Result:
    sent = time.perf_counter() - began
    status, body = 0, b""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(patience):
            status, body = await client.post(sample.data)
    finished = time.perf_counter() - began
    answer = _answer(body, client.path) if status == 200 else None
    if answer is None:
        failed = 0 if status == 200 else status
        return Result(intended, sent, finished, failed, None if sample.label is None else False)
    right = None if sample.label is None else answer.get("label") == sample.label
    exit, reason = answer.get("exit"), answer.get("reason")
    return Result(
        intended,
        sent,
        finished,
        200,
        right,
        exit if isinstance(exit, int) else 0,
        reason if isinstance(reason, str) else "",
    )


def _answer(body: bytes, path: str) -> dict[str, Any] | None:
    """What a server says of an image; None where that is no JSON object, or lacks a label that an
    answer has at this path.
    """
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict):
        return None
    labelled = path.endswith(CLASSIFY)
    return None if labelled and not isinstance(said.get("label"), str) else said
