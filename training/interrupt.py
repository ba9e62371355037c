"""Leaving a run when a signal asks for it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch

from training.distributed import Processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)

ASK_SECONDS = 2.0
"""How often processes ask each other; torchrun gives them 30 s to leave."""


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


class Leaving:
    """When the processes of a run leave it, each of which knows its own signals alone.

    One process asks itself after each step. Several ask each other, which makes all wait for the
    slowest, so they do that every two seconds or so. After which step is next follows from how long
    the last ones took; they tell each other that too, so that all of them ask after the same.

    Args:
        request: what this process was told.
        processes: of the run.
        step: of the whole run, to begin with.
        clock: seconds.
    """

    def __init__(
        self,
        request: Request,
        processes: Processes,
        step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.request = request
        self.processes = processes
        self.clock = clock
        self.asked_after, self.asked_at = step, clock()
        self.next = step

    def now(self, step: int, waited: bool = False) -> bool:
        """Whether to leave; the same in every process.

        Args:
            step: so many steps of the whole run are done.
            waited: whether all processes have just waited for each other, so that asking costs
                nothing.
        """
        signalled = self.request.signal is not None
        if self.processes.count == 1:
            return signalled
        if step < self.next and not waited:
            return False
        now = self.clock()
        told = torch.tensor([float(signalled), now - self.asked_at], dtype=torch.float64)
        signals, seconds = self.processes.sum(told).tolist()
        each = seconds / self.processes.count / max(1, step - self.asked_after)
        self.asked_after, self.asked_at = step, now
        self.next = step + max(1, int(ASK_SECONDS / max(each, 1e-6)))
        return signals > 0
