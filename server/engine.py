"""The loop between scheduler and runner: schedule, run, settle."""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from model.policy import Reason, Rule
from server.errors import DeadlineExceeded, OfframpError, Overloaded
from server.metrics import EngineMetrics
from server.overload import OverloadController
from server.runner import Row, StageRunner
from server.scheduler import Batch, Job, Refused, Scheduler

log = logging.getLogger("offramp.engine")

DEGRADED = (Reason.DEADLINE, Reason.OVERLOAD)
BEAT_SECONDS = 1.0
"""The loop turns at least this often, so that /livez can tell a stuck loop from an idle one."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What one exit said of an image."""

    exit: int
    class_id: int
    confidence: float
    milliseconds: float
    """From the image's arrival."""
    compute_milliseconds: float = 0.0
    """Of those, computing."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A job's result."""

    exit: int
    reason: Reason
    confidence: float
    probabilities: np.ndarray
    """Calibrated, float32 `[classes]`."""
    seen: tuple[Seen, ...]
    queue_seconds: float
    compute_seconds: float

    @property
    def degraded(self) -> bool:
        """Whether load or a deadline made it shallower than its rule asked for."""
        return self.reason in DEGRADED


@dataclass(slots=True, eq=False)
class Ticket:
    """A client's hold on a job: where its exits and its answer go."""

    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Answer]
    on_exit: Callable[[Seen], None] | None
    accepted: float
    inputs: np.ndarray | Row
    job: Job | None = None
    seen: list[Seen] = field(default_factory=list)
    confidence: float = 0.0
    probabilities: np.ndarray | None = None
    compute_seconds: float = 0.0

    def settle(self, result: Answer | OfframpError) -> None:
        """Hand over the result; settling a ticket that is done is a no-op."""

        def deliver() -> None:
            if self.future.done():
                return
            if isinstance(result, Answer):
                self.future.set_result(result)
            else:
                self.future.set_exception(result)

        self._call(deliver)

    def show(self, seen: Seen) -> None:
        """Tell the client of an exit on the way."""
        self.seen.append(seen)
        if self.on_exit:
            on_exit = self.on_exit
            self._call(lambda: on_exit(seen))

    def _call(self, function: Callable[[], None]) -> None:
        try:
            self.loop.call_soon_threadsafe(function)
        except RuntimeError:  # the client's event loop is closed
            log.debug("a client's event loop closed before its answer came")


class Engine:
    """Owns the scheduler and the runner in a thread of its own; others send it messages.

    Args:
        scheduler: decides.
        runner: computes.
        metrics: records.
        audit_rate: share of early answers that are run to the last exit in idle time.
        clock: seconds; the same clock that arrivals and deadlines are on.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StageRunner,
        metrics: EngineMetrics,
        audit_rate: float,
        clock: Callable[[], float] = time.perf_counter,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._metrics = metrics
        self._audit_rate = audit_rate
        self._clock = clock
        self._chance = chance
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._beat = clock()
        self._stopping = False
        metrics.in_force(scheduler.controller.level)

    # --- called from other threads -----------------------------------------------------------

    def start(self) -> None:
        """Start the loop."""
        self._thread.start()

    def stop(self) -> None:
        """End the loop after the messages sent so far, and wait for it."""
        self._inbox.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the loop still turns."""
        return self._thread.is_alive() and self._clock() - self._beat < 10 * BEAT_SECONDS

    def submit(
        self,
        pixels: np.ndarray,
        rule: Rule,
        arrived: float,
        deadline: float = math.inf,
        bends: bool = True,
        on_exit: Callable[[Seen], None] | None = None,
    ) -> Ticket:
        """Send one image in from a coroutine; its ticket's future gives the answer.

        Args:
            pixels: uint8 `[H, W, 3]`, as the bundle's preprocess gives them.
            rule: what decides the job.
            arrived: when the request's first byte came, on the engine's clock.
            deadline: when the answer must be ready, on the engine's clock.
            bends: whether overload may make the answer shallower than the rule asks.
            on_exit: called in the coroutine's loop for every exit passed.

        The future raises:
            Overloaded: refused, since even the first exit would be late.
            DeadlineExceeded: the deadline passed before the first exit.
            OfframpError: the run failed.
        """
        loop = asyncio.get_running_loop()
        ticket = Ticket(loop, loop.create_future(), on_exit, self._clock(), pixels)
        job = Job(rule, arrived, deadline, bends, payload=ticket)
        ticket.job = job
        self._inbox.put(lambda: self._admit(job, ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Free the place of a client that went away."""
        job = ticket.job
        if job is not None:
            self._inbox.put(lambda: self.scheduler.cancel(job))

    def use(self, controller: OverloadController) -> None:
        """Replace the ladder that overload moves along, and with it the level in force."""

        def replace() -> None:
            self.scheduler.controller = controller

        self._inbox.put(replace)

    # --- the loop ----------------------------------------------------------------------------

    def _run(self) -> None:
        busy = False
        while not (self._stopping and not busy):
            self._take_messages(wait=not busy)
            busy = self._turn()

    def _turn(self) -> bool:
        """One step; returns whether there was anything to run."""
        self._beat = now = self._clock()
        step = self.scheduler.next_step(now)
        self._metrics.in_force(self.scheduler.controller.level)
        for job in step.overdue:
            self._answer_overdue(job)
        if step.batch is None or (self._stopping and step.batch.audit):
            return False
        try:
            self._run_batch(step.batch)
        except Exception:
            log.exception(
                "stage %d failed for a batch of %d", step.batch.stage, len(step.batch.jobs)
            )
            self._isolate(step.batch)
        return True

    def _run_batch(self, batch: Batch) -> None:
        tickets: list[Ticket] = [job.payload for job in batch.jobs]
        began = self._clock()
        output = self._runner.run(batch.stage, [t.inputs for t in tickets])
        ended = self._clock()
        for i, ticket in enumerate(tickets):
            ticket.inputs = output.rows[i]
            ticket.probabilities = output.probabilities[i]
            ticket.confidence = output.confidences[i]
            ticket.compute_seconds += ended - began
        if batch.audit:
            self._settle_audit(batch)
            return
        self._metrics.ran(batch.stage, len(tickets), ended - began)
        for job, ticket in zip(batch.jobs, tickets, strict=True):
            self._show(batch.stage, job, ticket, ended)
        for job, reason in self.scheduler.settle(batch, output.confidences, ended - began, ended):
            self._answer(job, reason)
        self._metrics.queued(self.scheduler.queued())

    def _take_messages(self, wait: bool) -> None:
        try:
            message = self._inbox.get(block=wait, timeout=BEAT_SECONDS if wait else None)
            while True:
                if message is None:
                    self._stopping = True
                else:
                    message()
                message = self._inbox.get_nowait()
        except queue.Empty:
            return

    # --- what happens to a job ---------------------------------------------------------------

    def _admit(self, job: Job, ticket: Ticket) -> None:
        now = self._clock()
        if job.deadline <= now:
            self._answer_overdue(job)
            return
        try:
            self.scheduler.admit(job, now)
        except Refused as refused:
            self._metrics.refused("not_in_time")
            ticket.settle(Overloaded(refused.retry_after_seconds))

    def _show(self, exit: int, job: Job, ticket: Ticket, now: float) -> None:
        assert ticket.probabilities is not None
        self._metrics.saw(exit, ticket.confidence)
        class_id = int(ticket.probabilities.argmax())
        computing = 1e3 * ticket.compute_seconds
        ticket.show(Seen(exit, class_id, ticket.confidence, 1e3 * (now - job.arrived), computing))

    def _answer(self, job: Job, reason: Reason) -> None:
        ticket: Ticket = job.payload
        self._finish(ticket, job, ticket.seen[-1].exit, reason)
        early = ticket.seen[-1].exit < self._runner.exits
        if early and self._audit_rate and self._chance() < self._audit_rate:
            self.scheduler.audit(job)

    def _answer_overdue(self, job: Job) -> None:
        ticket: Ticket = job.payload
        if ticket.seen:
            self._finish(ticket, job, ticket.seen[-1].exit, Reason.DEADLINE)
        else:
            self._metrics.deadline(met=False)
            ticket.settle(DeadlineExceeded())

    def _finish(self, ticket: Ticket, job: Job, exit: int, reason: Reason) -> None:
        assert ticket.probabilities is not None
        now = self._clock()
        waited = max(0.0, now - ticket.accepted - ticket.compute_seconds)
        answer = Answer(
            exit,
            reason,
            ticket.confidence,
            ticket.probabilities,
            tuple(ticket.seen),
            waited,
            ticket.compute_seconds,
        )
        self._metrics.answered(exit, reason, now - job.arrived, waited)
        if math.isfinite(job.deadline):
            self._metrics.deadline(met=now <= job.deadline)
        ticket.settle(answer)

    def _settle_audit(self, batch: Batch) -> None:
        for job in self.scheduler.settle_audit(batch):
            ticket: Ticket = job.payload
            assert ticket.probabilities is not None
            said = ticket.seen[-1]
            self._metrics.audited(said.exit, said.class_id == int(ticket.probabilities.argmax()))

    def _isolate(self, batch: Batch) -> None:
        """After a failed batch, run its jobs one by one, so that only the guilty ones fail."""
        for job in batch.jobs:
            alone = Batch(batch.stage, (job,), batch.seconds, batch.audit)
            try:
                self._run_batch(alone)
            except Exception:
                log.exception("job %d failed at stage %d", job.number, batch.stage)
                self.scheduler.abandon(alone)
                job.payload.settle(OfframpError())
