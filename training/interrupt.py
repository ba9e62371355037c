"""Leaving a run when a signal asks for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """The run was saved and left; the message says how to go on."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class Request:
    """Whether, by which signal, the run was asked to leave."""

    signal: signal.Signals | None = None

    @property
    def status(self) -> int:
        """The exit status that shells expect."""
        return 128 + (self.signal or signal.SIGTERM)


@contextmanager
def requests() -> Iterator[Request]:
    """Note the first SIGINT or SIGTERM; a second one acts as it would without this."""
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
