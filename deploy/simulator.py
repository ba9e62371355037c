"""The server's own scheduler and overload controller, driven through imagined time.

Costs, loads and confidences may be measured, recorded or made up, so it answers questions about
machines that are not at hand, always the same way.

What surrounds the scheduler is threads. The load sends at its times. The clients' thread
works on each request and on each answer. The server's event loop goes round in turns: it reads all
requests that have come, begins what its gate lets through, and sends answers. What comes
during a turn is seen at the next, and what is begun too late is refused, which costs less. The
engine's workers run the scheduler's batches. They share cores and Python's lock as `deploy.machine`
says.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from copy import deepcopy
from dataclasses import dataclass

from deploy.machine import Machine, Needs, Thread, Work
from model.policy import Reason, Rule
from server.arrival import is_hopeless, is_late
from server.gate import EACH_TURN
from server.jobs import Batch, Job, Refused, TooLate
from server.scheduler import LEFT_SECONDS, Scheduler


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
    """What is spent outside stages, each with the machine to itself."""

    begin_seconds: float = 0.0
    """Of the event loop, to read a request and take it as far as the engine."""
    answer_seconds: float = 0.0
    """Of the event loop, to send an answer."""
    refuse_seconds: float = 0.0
    """Of the event loop, to read a request and refuse it because it is begun too late."""
    batch_seconds: float = 0.0
    """Of the engine, between two batches."""
    client_seconds: float = 0.0
    """Of the clients' thread for each request, where it runs on the same cores."""
    reserve_seconds: float = 0.0
    """Kept back from each deadline to send the answer in."""
    cores: float = math.inf
    """That all of these and the stages share."""


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
    overhead: Overhead | None = None,
    pace: Callable[[float], float] = lambda _: 1.0,
) -> list[Outcome]:
    """Run a load to its end.

    Args:
        scheduler: fresh, with its cost table and controller.
        load: in order of time.
        rule: of every job.
        overhead: by default none.
        pace: what batches really take at a time, as a multiple of what the scheduler expects at
            the start, and then learns.

    Returns:
        One outcome for each arrival, in the order they were settled.
    """
    return _Simulation(scheduler, rule, overhead or Overhead(), pace).run(load)


@dataclass(frozen=True, slots=True)
class _Response:
    """What a request gets."""

    arrival: Arrival
    exit: int = 0
    reason: Reason | None = None
    refused: bool = False


class _Simulation:
    def __init__(
        self,
        scheduler: Scheduler,
        rule: Rule,
        overhead: Overhead,
        pace: Callable[[float], float],
    ) -> None:
        self._scheduler = scheduler
        self._rule = rule
        self._costs = deepcopy(scheduler.costs)
        self._pace = pace
        self._overhead = overhead
        self._machine = Machine(overhead.cores)
        self._to_clients: deque[Arrival | _Response] = deque()
        self._to_loop: deque[Arrival | _Response] = deque()
        self._to_engine: deque[Job | None] = deque()
        # None wakes a worker that has nothing to do.
        self._all_wanted: deque[None] = deque()
        self._outcomes: list[Outcome] = []

    def run(self, load: Sequence[Arrival]) -> list[Outcome]:
        workers = [self._worker(number) for number in range(self._scheduler.most_workers)]
        self._machine.run(self._load(load), self._clients(), self._loop(), *workers)
        return self._outcomes

    # --- threads -----------------------------------------------------------------------------

    def _load(self, load: Sequence[Arrival]) -> Thread:
        for arrival in load:
            yield Work(Needs.TIME, max(0.0, arrival.time - self._machine.now))
            self._to_clients.append(arrival)

    def _clients(self) -> Thread:
        while True:
            yield self._to_clients
            message = self._to_clients.popleft()
            yield Work(Needs.CORE, self._overhead.client_seconds / 2)
            if isinstance(message, Arrival):
                self._to_loop.append(message)
            else:
                self._note(message)

    def _loop(self) -> Thread:
        waiting: deque[tuple[Arrival, float]] = deque()
        while True:
            if not waiting:
                yield self._to_loop
            read, messages = self._machine.now, list(self._to_loop)
            self._to_loop.clear()
            sent = [m for m in messages if isinstance(m, _Response)]
            for _ in sent:
                yield Work(Needs.LOCK, self._overhead.answer_seconds)
            waiting.extend((m, read) for m in messages if isinstance(m, Arrival))
            for _ in range(min(EACH_TURN, len(waiting))):
                refusal = yield from self._begin(*waiting.popleft())
                if refusal is not None:
                    sent.append(refusal)
            self._to_clients.extend(sent)

    def _worker(self, number: int) -> Thread:
        busy = False
        while True:
            if number >= self._scheduler.workers:
                yield from self._sleep(leaving_jobs=busy)
            elif not busy:
                yield self._to_engine
            while self._to_engine:
                self._admit(self._to_engine.popleft())
            step = self._scheduler.next_step(self._machine.now)
            for job in step.overdue:
                exit = job.stage - 1
                self._tell(job, exit, Reason.DEADLINE if exit else None)
            if self._scheduler.calls_for_another_worker:
                self._to_engine.append(None)
            if self._scheduler.workers == self._scheduler.most_workers and not self._all_wanted:
                self._all_wanted.append(None)
            busy = step.batch is not None
            if step.batch is not None:
                yield from self._run_batch(step.batch)

    def _sleep(self, leaving_jobs: bool) -> Thread:
        """Of the last worker, until all are wanted. It looks itself, as the engine's does, but only
        once, or a simulation would have no end.
        """
        if leaving_jobs:
            self._to_engine.append(None)
        self._all_wanted.clear()
        yield Work(Needs.TIME, LEFT_SECONDS)
        self._scheduler.count_workers(self._machine.now)
        if self._scheduler.workers < self._scheduler.most_workers:
            yield self._all_wanted

    # --- their work --------------------------------------------------------------------------

    def _begin(self, arrival: Arrival, read: float) -> Generator[Work, None, _Response | None]:
        """Take a request to the engine, or refuse it if the loop comes to it too late."""
        behind, allowed = self._machine.now - read, arrival.deadline_seconds
        deadline = read + allowed - max(self._overhead.reserve_seconds, behind)
        refused = is_hopeless(behind, allowed)
        if not refused and (refused := self._scheduler.short_seconds(deadline) > 0):
            self._scheduler.turn_away(self._machine.now)
        if refused:
            yield Work(Needs.LOCK, self._overhead.refuse_seconds)
            return _Response(arrival, refused=True)
        yield Work(Needs.LOCK, self._overhead.begin_seconds)
        late_at = self._machine.now if is_late(behind, allowed) else -math.inf
        self._to_engine.append(Job(self._rule, read, deadline, late_at=late_at, payload=arrival))
        return None

    def _admit(self, job: Job | None) -> None:
        if job is None:
            return
        try:
            self._scheduler.admit(job, self._machine.now)
        except Refused:
            self._tell(job, 0, None, refused=True)
        except TooLate:
            self._tell(job, 0, None)

    def _run_batch(self, batch: Batch) -> Generator[Work, None, None]:
        began = self._machine.now
        expected = self._costs.seconds(batch.stage, len(batch.jobs), batch.alone)
        seconds = self._pace(began) * expected
        yield Work(Needs.DEVICE, seconds)
        now = self._machine.now
        said = [job.payload.confidences[batch.stage - 1] for job in batch.jobs]
        for job, reason in self._scheduler.settle(batch, said, now - began, now):
            self._tell(job, batch.stage, reason)
        yield Work(Needs.LOCK, self._overhead.batch_seconds)

    def _tell(self, job: Job, exit: int, reason: Reason | None, refused: bool = False) -> None:
        self._to_loop.append(_Response(job.payload, exit, reason, refused))

    def _note(self, response: _Response) -> None:
        now = self._machine.now
        self._outcomes.append(
            Outcome(response.arrival, now, response.exit, response.reason, response.refused)
        )
