"""The server's own scheduler and overload controller, driven through imagined time.

Costs, loads and confidences may be measured, recorded or made up, so it answers questions about
machines that are not at hand, in milliseconds and always the same way.
"""

from __future__ import annotations

import math
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
) -> list[Outcome]:
    """Run a load to its end.

    Args:
        scheduler: fresh, with its cost table and controller.
        load: in order of time.
        rule: of every job.
        seconds: what a batch of a stage really takes, by stage and size; by default what the
            scheduler expects.

    Returns:
        One outcome for each arrival, in the order they were settled.
    """
    return _Simulation(scheduler, rule, seconds or scheduler.costs.seconds).run(load)


class _Simulation:
    def __init__(
        self, scheduler: Scheduler, rule: Rule, seconds: Callable[[int, int], float]
    ) -> None:
        self._scheduler = scheduler
        self._rule = rule
        self._seconds = seconds
        self._now = 0.0
        self._outcomes: list[Outcome] = []

    def run(self, load: Sequence[Arrival]) -> list[Outcome]:
        waiting = list(reversed(load))
        while True:
            while waiting and waiting[-1].time <= self._now:
                self._admit(waiting.pop())
            step = self._scheduler.next_step(self._now)
            for job in step.overdue:
                exit = job.stage - 1
                self._finish(job.payload, exit, Reason.DEADLINE if exit else None)
            if step.batch is not None:
                self._run_batch(step.batch)
            elif waiting:
                self._now = waiting[-1].time
            else:
                return self._outcomes

    def _admit(self, arrival: Arrival) -> None:
        job = Job(
            self._rule, arrival.time, arrival.time + arrival.deadline_seconds, payload=arrival
        )
        try:
            self._scheduler.admit(job, self._now)
        except Refused:
            self._outcomes.append(Outcome(arrival, self._now, 0, None, refused=True))
        except TooLate:
            self._finish(arrival, 0, None)

    def _run_batch(self, batch: Batch) -> None:
        taken = self._seconds(batch.stage, len(batch.jobs))
        self._now += taken
        said = [job.payload.confidences[batch.stage - 1] for job in batch.jobs]
        for job, reason in self._scheduler.settle(batch, said, taken, self._now):
            self._finish(job.payload, batch.stage, reason)

    def _finish(self, arrival: Arrival, exit: int, reason: Reason | None) -> None:
        self._outcomes.append(Outcome(arrival, self._now, exit, reason))
