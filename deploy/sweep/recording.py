"""A load as it was sent to a server, with what came of every request."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import ValidationError

from deploy.loadtest.client import Client
from deploy.loadtest.load import Result, open_loop
from deploy.loadtest.samples import Sample
from deploy.loadtest.summary import summarise
from deploy.sweep.engine import Row, engine
from deploy.sweep.measuring import Spent
from deploy.sweep.pace import watching
from deploy.sweep.shape import Recording


async def record(
    url: str,
    admin_token: str,
    samples: Sequence[Sample],
    times: Sequence[float],
    seconds: float,
    deadline: float,
) -> Row:
    """Send a load and note what the server and its clients spent on it.

    Args:
        times: when to send, in seconds.
        seconds: length of the load.
        deadline: of every request, in seconds.
    """
    async with Client(f"{url}/classify?deadline_ms={1e3 * deadline:g}") as client:
        before, working = Spent.by_now(url), time.process_time()
        async with watching(url, admin_token) as moments:
            results = await open_loop(client, samples, times)
        working = time.process_time() - working
        spent = Spent.by_now(url) - before
    return {
        "seconds": seconds,
        "measured": summarise(results, deadline, seconds),
        "client_ms": 1e3 * working / len(results),
        "spent": asdict(spent),
        "engine": engine(url, admin_token),
        "moments": moments,
        "requests": columns(results),
    }


def read_recording(file: Path) -> Row:
    """What a sweep wrote.

    Raises:
        ValueError: something else wrote the file; the message says what is wrong where.
        OSError: it cannot be read.
    """
    try:
        said: Row = json.loads(file.read_text())
        Recording.model_validate(said)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise ValueError(f"{file} is no recording of a sweep: {where}: {first['msg']}") from None
    except ValueError as error:
        raise ValueError(f"{file} is no recording of a sweep: {error}") from None
    return said


def columns(results: Sequence[Result]) -> Row:
    """One list for each figure, which is a third as long as one object for each request."""
    return {
        "intended_ms": [round(1e3 * r.intended, 2) for r in results],
        "sent_ms": [round(1e3 * r.sent, 2) for r in results],
        "finished_ms": [round(1e3 * r.finished, 2) for r in results],
        "status": [r.status for r in results],
        "exit": [r.exit for r in results],
        "reason": [r.reason for r in results],
    }


def sent(row: Row) -> list[tuple[float, float]]:
    """When each request of a recorded load should have been sent, and when it was, in seconds."""
    columns = zip(row["requests"]["intended_ms"], row["requests"]["sent_ms"], strict=True)
    return [(intended / 1e3, at / 1e3) for intended, at in columns]


def load_seconds(row: Row) -> float:
    """Length of a recorded load; until its last request where an older recording does not say."""
    seconds: float = row.get("seconds") or max(row["requests"]["intended_ms"]) / 1e3
    return seconds
