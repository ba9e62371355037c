"""The server's own scheduler and overload controller, driven through imagined time.

Costs, loads and confidences may be measured, recorded or made up, so it answers questions about
machines that are not at hand, in milliseconds and always the same way.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from model.policy import Reason, Rule
from server.scheduler import Batch, Job, Refused, Scheduler, TooLate


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a load."""

    time: float
    """Seconds from the start."""
    confidences: tuple[float, ...]
    """What each exit will say, shallow to deep."""
    deadline_seconds: float = math.inf
    """How long it allows."""


@dataclass(frozen=True, slots=True)
class Overhead:
    """What a server spends outside stages."""

    request_seconds: float = 0.0
    """Of its event loop, which does one thing at a time: half until a request is admitted, half to
    send its answer. A request counts as arrived when the loop comes to it."""
    batch_seconds: float = 0.0
    """Of its engine, between two batches."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request."""

    arrival: Arrival
    finished: float
    exit: int
    """The exit that answered; 0 where none did."""
    reason: Reason | None
    """None where it was refused or its deadline passed before the first exit."""
    refused: bool = False

    @property
    def seconds(self) -> float:
        """From arrival to answer."""
        return self.finished - self.arrival.time

    @property
    def in_time(self) -> bool:
        """Whether there was an answer, and by the deadline."""
        return self.exit > 0 and self.seconds <= self.arrival.deadline_seconds


def simulate(
    scheduler: Scheduler,
    load: Sequence[Arrival],
    rule: Rule,
    seconds: Callable[[int, int], float] | None = None,
    overhead: Overhead | None = None,
) -> list[Outcome]:
    """Run a load to its end.

    Args:
        scheduler: fresh, with its cost table and controller.
        load: in order of time.
        rule: of every job.
        seconds: what a batch of a stage really takes, by stage and size; by default what the
            scheduler expects.
        overhead: by default none.

    Returns:
        One outcome for each arrival, in the order they were settled.
    """
    takes = seconds or scheduler.costs.seconds
    return _Simulation(scheduler, rule, takes, overhead or Overhead()).run(load)


class _Simulation:
    def __init__(
        self,
        scheduler: Scheduler,
        rule: Rule,
        seconds: Callable[[int, int], float],
        overhead: Overhead,
    ) -> None:
        self._scheduler = scheduler
        self._rule = rule
        self._seconds = seconds
        self._overhead = overhead
        self._now = 0.0
        self._loop_free = 0.0
        self._inbox: deque[tuple[float, Job]] = deque()
        """Decoded requests, and when each is ready to be admitted."""
        self._outcomes: list[Outcome] = []

    def run(self, load: Sequence[Arrival]) -> list[Outcome]:
        waiting = deque(load)
        while True:
            self._receive(waiting, self._now)
            while self._inbox and self._inbox[0][0] <= self._now:
                self._admit(self._inbox.popleft()[1])
            step = self._scheduler.next_step(self._now)
            for job in step.overdue:
                exit = job.stage - 1
                self._finish(job.payload, exit, Reason.DEADLINE if exit else None)
            if step.batch is not None:
                self._run_batch(step.batch, waiting)
            elif self._inbox:
                self._now = self._inbox[0][0]
            elif waiting:
                self._now = waiting[0].time
            else:
                return self._outcomes

    def _receive(self, waiting: deque[Arrival], end: float) -> None:
        """Have the event loop take the requests that come until then."""
        while waiting and waiting[0].time <= end:
            arrival = waiting.popleft()
            seen = max(self._loop_free, arrival.time)
            deadline = seen + arrival.deadline_seconds
            job = Job(self._rule, seen, deadline, payload=arrival)
            self._inbox.append((self._loop(arrival.time), job))

    def _loop(self, start: float) -> float:
        """When the event loop is done with half a request that it may begin at `start`."""
        self._loop_free = max(self._loop_free, start) + self._overhead.request_seconds / 2
        return self._loop_free

    def _admit(self, job: Job) -> None:
        try:
            self._scheduler.admit(job, self._now)
        except Refused:
            self._finish(job.payload, 0, None, refused=True)
        except TooLate:
            self._finish(job.payload, 0, None)

    def _run_batch(self, batch: Batch, waiting: deque[Arrival]) -> None:
        taken = self._seconds(batch.stage, len(batch.jobs))
        self._now += taken
        self._receive(waiting, self._now)  # before the answers, since they came before
        said = [job.payload.confidences[batch.stage - 1] for job in batch.jobs]
        for job, reason in self._scheduler.settle(batch, said, taken, self._now):
            self._finish(job.payload, batch.stage, reason)
        self._now += self._overhead.batch_seconds

    def _finish(
        self, arrival: Arrival, exit: int, reason: Reason | None, refused: bool = False
    ) -> None:
        sent = self._loop(self._now)
        self._outcomes.append(Outcome(arrival, sent, exit, reason, refused))
