"""What a request costs the event loop, with no network and an engine that settles at once."""

from __future__ import annotations

import asyncio
import logging
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import uvloop
from uvicorn import Config
from uvicorn.server import ServerState

from deploy.loadtest.samples import Sample
from model.policy import Reason
from model.table import markdown_table
from server.app import create_app
from server.connection import Protocol
from server.engine import Engine
from server.errors import OfframpError, Overloaded
from server.logs import configure
from server.promise import Promise
from server.served import Served
from server.settings import Settings
from server.tickets import Answer, Seen, Ticket

CONNECTIONS = 4
"""That send at the same time, as they do under load."""
ROUNDS = 25
"""Of requests from all connections, for one measurement."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One sort of requests."""

    sort: str
    requests: int
    median_us: float
    """Processor time of a request; the median of its measurements."""
    least_us: float
    """Of the measurement that other programs disturbed least."""

    def as_dict(self) -> dict[str, Any]:
        """The figures."""
        return asdict(self)


class Settling:
    """Stands in for an engine: settles each job in the loop's next turn.

    Args:
        result: of every job.
        full: whether it refuses images before they are decoded.
    """

    def __init__(self, result: Answer | OfframpError, full: bool = False) -> None:
        self._result = result
        self._full = full

    def check(self, _: float) -> None:
        """As an engine that is full or is not.

        Raises:
            Overloaded: it is.
        """
        if self._full:
            raise Overloaded(1.0)

    def submit(self, pixels: np.ndarray, *_: object, **__: object) -> Ticket:
        """As an engine takes an image."""
        loop = asyncio.get_running_loop()
        ticket = Ticket(loop, Promise(loop), None, time.perf_counter(), pixels)
        loop.call_soon(ticket.settle, self._result)
        return ticket


class Wire(asyncio.Transport):
    """The server's end of a connection whose client takes everything."""

    def __init__(self) -> None:
        super().__init__({"sockname": ("127.0.0.1", 8000), "peername": ("127.0.0.1", 50000)})

    def write(self, data: Any) -> None:
        """To nowhere."""

    def is_closing(self) -> bool:
        """Never."""
        return False

    def get_write_buffer_size(self) -> int:
        """Nothing is left to send."""
        return 0

    def pause_reading(self) -> None:
        """Nothing is read here."""

    def resume_reading(self) -> None:
        """Nothing is read here."""


def measure(settings: Settings, samples: Sequence[Sample], seconds: float) -> list[Measured]:
    """Send images that are answered, then images that are refused.

    Args:
        settings: of the server; its bundle's engine is not used.
        samples: images to send in turn.
        seconds: length of each measurement.
    """
    served = Served(settings)
    sorts = {
        "answered at exit 1": Settling(_answer(served)),
        "refused by the engine": Settling(Overloaded(1.0)),
        "refused before it is decoded": Settling(Overloaded(1.0), full=True),
    }
    with _logging_to_nowhere(settings):
        return [
            Measured(sort, len(taken) * ROUNDS * CONNECTIONS, statistics.median(taken), min(taken))
            for sort, engine in sorts.items()
            for taken in [uvloop.run(_measured(served, engine, samples, seconds))]
        ]


def table(rows: Sequence[Measured]) -> str:
    """Markdown."""
    return markdown_table(
        ["request", "processor time, µs", "least"],
        [(r.sort, f"{r.median_us:.0f}", f"{r.least_us:.0f}") for r in rows],
        right={1, 2},
    )


async def _measured(
    served: Served, engine: Settling, samples: Sequence[Sample], seconds: float
) -> list[float]:
    served.loaded._engine, served.loaded.warm = cast(Engine, engine), True
    app = create_app(served)
    config = Config(app, http=Protocol, log_config=None, access_log=False, proxy_headers=False)
    config.load()
    connections = [Protocol(config, ServerState(), {}) for _ in range(CONNECTIONS)]
    for connection in connections:
        connection.connection_made(Wire())
    requests = [_request(sample.data) for sample in samples]
    taken: list[float] = []
    await _send(connections, requests)  # what is looked up once
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        began = time.process_time()
        await _send(connections, requests)
        taken.append(1e6 * (time.process_time() - began) / (ROUNDS * CONNECTIONS))
    return taken


async def _send(connections: Sequence[Protocol], requests: Sequence[bytes]) -> None:
    for turn in range(ROUNDS):
        for i, connection in enumerate(connections):
            connection.data_received(requests[(turn * CONNECTIONS + i) % len(requests)])
        while not all(connection.cycle.response_complete for connection in connections):
            await asyncio.sleep(0)


def _request(image: bytes) -> bytes:
    head = f"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(image)}\r\n\r\n"
    return head.encode() + image


def _answer(served: Served) -> Answer:
    classes = len(served.loaded.bundle.description.classes)
    even = np.full(classes, 1 / classes, np.float32)
    return Answer(1, Reason.CONFIDENT, 0.9, even, (Seen(1, 0, 0.9, 1.0, 0.5),), 0.001, 0.001)


@contextmanager
def _logging_to_nowhere(settings: Settings) -> Iterator[None]:
    """Lines are made as a server makes them, but nobody wants to read them."""
    root = logging.getLogger()
    before: tuple[Any, int] = root.handlers, root.level
    with Path(os.devnull).open("w") as nowhere:
        configure(settings.log_format, settings.log_level)
        cast(logging.StreamHandler[Any], root.handlers[0]).setStream(nowhere)
        try:
            yield
        finally:
            root.handlers, root.level = before
