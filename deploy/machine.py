"""Threads of imagined time that share cores and Python's lock."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Needs(Enum):
    """What a piece of work cannot go on without."""

    LOCK = "a core, and Python's lock"
    CORE = "a core"
    DEVICE = "a core, but its seconds were measured while others wanted it too"
    TIME = "nothing but time"


@dataclass(frozen=True, slots=True)
class Work:
    """A piece of a thread's work."""

    needs: Needs
    seconds: float
    """With everything it needs to itself."""


Thread = Iterator["Work | deque[Any]"]
"""Yields what it does next, or the queue whose next item it waits for."""


class Machine:
    """Runs threads to their end.

    Those that work share the cores evenly, no thread having more than one. Those that need Python's
    lock take turns too short to tell, so together they are as fast as one of them alone.

    Args:
        cores: how many.
    """

    def __init__(self, cores: float = math.inf) -> None:
        self.now = 0.0
        self._cores = cores
        self._waiting: dict[Thread, deque[Any]] = {}
        self._working: dict[Thread, Needs] = {}
        self._left: dict[Thread, float] = {}

    def run(self, *threads: Thread) -> None:
        """Until every thread has ended or waits for what nobody will bring."""
        for thread in threads:
            self._resume(thread)
        while self._left:
            speeds = self._speeds()
            first = min(self._left, key=lambda t: self._left[t] / speeds[t])
            passed = self._left[first] / speeds[first]
            self.now += passed
            for thread in self._left:
                self._left[thread] -= passed * speeds[thread]
            del self._left[first], self._working[first]
            self._resume(first)
            while awake := [t for t, queue in self._waiting.items() if queue]:
                for thread in awake:
                    del self._waiting[thread]
                    self._resume(thread)

    def _resume(self, thread: Thread) -> None:
        """Let a thread go on to its next piece of work or to where it must wait."""
        for said in thread:
            if isinstance(said, Work):
                self._working[thread] = said.needs
                self._left[thread] = said.seconds
                return
            if not said:
                self._waiting[thread] = said
                return

    def _speeds(self) -> dict[Thread, float]:
        needs = list(self._working.values())
        lockers = needs.count(Needs.LOCK)
        wanted = min(1, lockers) + needs.count(Needs.CORE) + needs.count(Needs.DEVICE)
        share = min(1.0, self._cores / wanted) if wanted else 1.0
        speeds = {Needs.LOCK: share / max(1, lockers), Needs.CORE: share}
        return {thread: speeds.get(n, 1.0) for thread, n in self._working.items()}
