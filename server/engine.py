"""The workers between scheduler and runner: each schedules, runs, settles.

Workers share one scheduler under one lock. A worker that is free takes what messages there are,
then the batch that the scheduler says is best, and runs it without the lock; one that finds nothing
to run waits for a message. One that the scheduler does not want, for HTTP's sake, only sleeps.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass

import numpy as np

from model.policy import Reason, Rule
from server.errors import DeadlineExceeded, Draining, OfframpError, Overloaded
from server.inbox import Inbox
from server.jobs import Batch, Job, JobState, Refused, TooLate
from server.metrics import EngineMetrics
from server.overload import OverloadController
from server.promise import Loop, Promise
from server.runner import StageOutput, StageRunner
from server.scheduler import LEFT_SECONDS, Scheduler
from server.threads import name_thread
from server.tickets import Answer, Outbox, Seen, Ticket

log = logging.getLogger("offramp.engine")

BEAT_SECONDS = 1.0
"""A worker turns at least this often, so that /livez can tell a stuck one from an idle one."""
STUCK_BEATS = 10
"""After so many beats without a turn a worker counts as stuck, beyond what its batch was expected
to take."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a batch gave, and what it took."""

    output: StageOutput
    seconds: float
    cpu_seconds: float
    """Of the worker's thread; less where it waited for a core or for the device."""
    ended: float


class Engine:
    """Owns the scheduler and the runner in threads of its own; others send it messages.

    Args:
        scheduler: decides; knows how many workers there are.
        runner: computes.
        metrics: records.
        audit_rate: share of the policy's early answers that are run to the last exit in idle time.
        clock: seconds; the same clock that arrivals and deadlines are on.
        cpu_clock: seconds that the calling thread has had a processor.
        chance: 0..1; decides which answers are audited.
        promise: makes what a client of a loop waits for.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StageRunner,
        metrics: EngineMetrics,
        audit_rate: float,
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.thread_time,
        chance: Callable[[], float] = random.random,
        promise: Callable[[Loop], Promise[Answer]] = Promise,
    ) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._metrics = metrics
        self._audit_rate = audit_rate
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._chance = chance
        self._promise = promise
        self._inbox = Inbox()
        self._outbox = Outbox()
        self._lock = threading.Lock()
        """Held by whoever touches scheduler, outbox, tickets or jobs."""
        self._workers = [
            threading.Thread(target=self._run, args=(number,), name=f"engine-{number}", daemon=True)
            for number in range(scheduler.most_workers)
        ]
        self._beats = [clock()] * len(self._workers)
        """When each worker turned last, or when the batch that it runs is expected to end."""
        self.broken = False
        """Whether the device computes nothing any more: some errors of a card outlast whatever
        caused them, until the process ends."""
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._all_wanted = threading.Event()
        """Set while the scheduler wants every worker, and when they are to end."""
        metrics.in_force(scheduler.controller.level)
        metrics.watch(scheduler.queued, lambda: scheduler.workers)

    # --- called from other threads -----------------------------------------------------------

    def start(self) -> None:
        """Start the workers."""
        for worker in self._workers:
            worker.start()

    def prepare(self, work: Callable[[], object]) -> None:
        """Have a worker do what belongs to its thread before jobs are sent, and wait for it.

        Raises:
            Exception: what the work raised, so that a start fails by it and not a worker.
            RuntimeError: a worker has ended.
        """
        done: Future[object] = Future()

        def do() -> None:
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)
            self._beats = [self._clock() for _ in self._beats]  # it may have taken many of them

        self.call(do)
        while not wait_for([done], BEAT_SECONDS).done:
            if not all(worker.is_alive() for worker in self._workers):
                raise RuntimeError("a worker ended before it was prepared")
        done.result()

    def stop(self) -> None:
        """End the workers once every job sent so far is settled; one that is stuck is left so."""
        self._inbox.put(None)
        for number, worker in enumerate(self._workers):
            while worker.is_alive() and self._turns(number):
                worker.join(BEAT_SECONDS)
            if worker.is_alive():  # stuck; it may be the only one to take what ends the others
                self._take_messages()
        self._ended.set()
        self._take_messages()

    @property
    def alive(self) -> bool:
        """Whether every worker still turns and the device still computes."""
        return self.turning and all(worker.is_alive() for worker in self._workers)

    @property
    def turning(self) -> bool:
        """Whether every worker turns that did not end in order, and the device still computes.

        One that died is seen by its beat alone, as late as one that is stuck.
        """
        return not self.broken and all(map(self._turns, range(len(self._workers))))

    def _turns(self, worker: int) -> bool:
        return self._clock() - self._beats[worker] < STUCK_BEATS * BEAT_SECONDS

    def check(self, deadline: float) -> None:
        """Refuse an image before it is decoded, if it is sure to be refused when it is sent in.

        Args:
            deadline: when the answer must be ready, on the engine's clock.

        Raises:
            Overloaded: even the first exit would be late.
        """
        if short_seconds := self.scheduler.short_seconds(deadline):
            self.call(self._turn_away)
            raise Overloaded(short_seconds)

    def submit(
        self,
        pixels: np.ndarray,
        rule: Rule,
        arrived: float,
        deadline: float = math.inf,
        bends: bool = True,
        late_at: float = -math.inf,
        on_exit: Callable[[Seen], None] | None = None,
        loop: Loop | None = None,
        request_id: str = "",
    ) -> Ticket:
        """Send one image in; its ticket's promise gives the answer.

        Args:
            pixels: uint8 `[H, W, 3]`, as the bundle's preprocess gives them.
            rule: what decides the job.
            arrived: when the request's first byte came, on the engine's clock.
            deadline: when the answer must be ready, on the engine's clock.
            bends: whether overload may make the answer shallower than the rule asks.
            late_at: when the client's loop began its request, if that took long.
            on_exit: called in the client's loop for every exit passed.
            loop: the client's; by default the running one.
            request_id: what the log says if the run fails.

        The promise raises:
            Overloaded: refused, since even the first exit would be late.
            DeadlineExceeded: the deadline passed before the first exit.
            Draining: the engine has ended.
            OfframpError: the run failed.
        """
        loop = loop or asyncio.get_running_loop()
        ticket = Ticket(loop, self._promise(loop), on_exit, self._clock(), pixels, request_id)
        job = Job(rule, arrived, deadline, bends, late_at, payload=ticket)
        ticket.job = job
        self.call(lambda: self._admit(job))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Free the place of a client that went away."""
        self.call(lambda: self._cancel(ticket))

    def use(self, controller: OverloadController) -> None:
        """Replace the ladder that overload moves along, and with it the level in force."""

        def replace() -> None:
            self.scheduler.controller = controller

        self.call(replace)

    def call(self, message: Callable[[], None]) -> None:
        """Have a worker call this between two batches; where none is left, it is called here."""
        self._inbox.put(message)
        if self._ended.is_set():
            self._take_messages()

    # --- a worker ----------------------------------------------------------------------------

    def _run(self, number: int = 0) -> None:
        name_thread(f"engine-{number}")
        self._metrics.works_here()
        busy = False
        while busy or not self._stopping.is_set():
            if number < self.scheduler.workers or self._stopping.is_set():
                busy = self.step(wait=not busy, worker=number)
            else:
                self._sleep(number, leaving_jobs=busy)
                busy = number < self.scheduler.workers  # for what others left while it slept
        self._take_messages(number)  # jobs sent too late are told so
        self._inbox.put(None)  # for the next worker
        self._beats[number] = math.inf
        self._metrics.ends_here()

    def _sleep(self, worker: int, leaving_jobs: bool) -> None:
        """Wait for the end, or to be wanted again; no message wakes it, since each would.

        A rest may be over while every other worker is in a batch, so it looks itself.
        """
        self._beats[worker] = self._clock()
        if leaving_jobs:
            self.call(_wake)  # another worker, which may wait for a message
        if not self._all_wanted.wait(LEFT_SECONDS):
            with self._lock:
                self.scheduler.count_workers(self._clock())

    def step(self, wait: bool, worker: int = 0) -> bool:
        """Take the messages that are there, then run at most one batch.

        Args:
            wait: for a message, if there is none; until the next beat or audit at most.
            worker: which one this is.

        Returns:
            Whether there was anything to run.
        """
        self._take_messages(worker, self._patience(worker) if wait else 0.0)
        batch = self._next_batch(worker)
        if batch is None or (self._stopping.is_set() and batch.audit):
            return False
        self._run_batch(batch)
        return True

    def _patience(self, worker: int) -> float:
        with self._lock:
            now = self._beats[worker] = self._clock()
            return min(BEAT_SECONDS, self.scheduler.next_audit(now))

    def _take_messages(self, worker: int = 0, seconds: float = 0.0) -> None:
        self._inbox.wait(worker, seconds)
        # Taken and called under one lock: a worker that took later messages could otherwise call
        # them first. A job sent before the end would be told that it has ended, or be cancelled
        # before it was admitted.
        with self._lock:
            for message in self._inbox.take():
                if message is None:
                    self._stopping.set()
                    self._all_wanted.set()
                else:
                    message()
            self._outbox.send()

    def _next_batch(self, worker: int) -> Batch | None:
        with self._lock:
            now = self._beats[worker] = self._clock()
            step = self.scheduler.next_step(now)
            self._wake_or_leave_asleep()
            if step.batch:
                self._beats[worker] += step.batch.seconds
            self._metrics.in_force(self.scheduler.controller.level)
            for job in step.overdue:
                self._answer_overdue(job)
            self._outbox.send()
            if self.scheduler.calls_for_another_worker:
                self._inbox.put(_wake)
            return step.batch

    def _wake_or_leave_asleep(self) -> None:
        if self.scheduler.workers == self.scheduler.most_workers or self._stopping.is_set():
            self._all_wanted.set()
        else:
            self._all_wanted.clear()

    def _run_batch(self, batch: Batch) -> None:
        """Run and settle; if that fails run the jobs one by one, so that only the guilty fail."""
        try:
            run = self._compute(batch)
        except Exception:
            _say_why("failed", batch)
            if len(batch.jobs) == 1:
                self._fail(batch)
                self._look_at_device()
            else:
                for job in batch.jobs:
                    self._run_batch(Batch(batch.stage, (job,), batch.seconds, batch.audit))
            return
        try:
            with self._lock:
                self._settle(batch, run)
                self._outbox.send()
            self._metrics.settle()
        except Exception:
            _say_why("could not be settled", batch)
            self._fail(batch)

    def _compute(self, batch: Batch) -> Run:
        inputs = [job.payload.inputs for job in batch.jobs]
        began, cpu_began = self._clock(), self._cpu_clock()
        output = self._runner.run(batch.stage, inputs, batch.alone)
        cpu_seconds, ended = self._cpu_clock() - cpu_began, self._clock()
        if not output.is_finite:
            raise FloatingPointError(f"stage {batch.stage} gave a confidence that is no number")
        return Run(output, ended - began, cpu_seconds, ended)

    def _settle(self, batch: Batch, run: Run) -> None:
        output = run.output
        tickets: list[Ticket] = [job.payload for job in batch.jobs]
        for i, ticket in enumerate(tickets):
            ticket.probabilities = output.probabilities[i]
            ticket.confidence = output.confidences[i]
            ticket.compute_seconds += run.seconds
        if batch.audit:
            self._settle_audit(batch, run.seconds)
        else:
            self._metrics.ran(batch.stage, len(tickets), run.seconds, run.cpu_seconds)
            class_ids = output.probabilities.argmax(axis=1).tolist()
            for job, class_id in zip(batch.jobs, class_ids, strict=True):
                self._show(batch.stage, job, class_id, run.ended)
            said = output.confidences
            for job, reason in self.scheduler.settle(batch, said, run.seconds, run.ended):
                self._answer(job, reason)
        self._let_go(batch, output)

    def _let_go(self, batch: Batch, output: StageOutput) -> None:
        """Free the features of the jobs that have left; those that go on keep only their own."""
        waiting = [i for i, job in enumerate(batch.jobs) if job.state is JobState.WAITING]
        audited = [i for i, job in enumerate(batch.jobs) if job.state is JobState.AUDITED]
        # An audited job may wait long, and would hold the rows of all that go on with it.
        for staying in (waiting, *([place] for place in audited)):
            kept = self._runner.keep(output, staying)
            for place, row in zip(staying, kept, strict=True):
                batch.jobs[place].payload.inputs = row
        for job in batch.jobs:
            if job.done:
                job.payload.release()

    def _look_at_device(self) -> None:
        """Tell an image that fails from a device that fails whatever it is given."""
        if self.broken:
            return
        try:
            self._runner.probe()
        except Exception:
            log.critical("the device computes nothing any more", exc_info=True)
            self.broken = True

    def _fail(self, batch: Batch) -> None:
        with self._lock:
            for job in batch.jobs:
                if not batch.audit:  # an audited job has its answer
                    self._outbox.settle(job.payload, OfframpError())
                self.scheduler.abandon(job)
                job.payload.release()
            self._outbox.send()

    # --- what happens to a job ---------------------------------------------------------------

    def _admit(self, job: Job) -> None:
        ticket: Ticket = job.payload
        if self._stopping.is_set():
            job.state = JobState.DONE  # so that its client may still go away
            self._outbox.settle(ticket, Draining())
            return
        try:
            self.scheduler.admit(job, self._clock())
        except Refused as refused:
            self._metrics.refused("not_in_time")
            self._outbox.settle(ticket, Overloaded(refused.retry_after_seconds))
            ticket.release()
        except TooLate:
            self._metrics.missed_deadline()
            self._outbox.settle(ticket, DeadlineExceeded())
            ticket.release()

    def _turn_away(self) -> None:
        self.scheduler.turn_away(self._clock())
        self._metrics.refused("not_in_time")

    def _cancel(self, ticket: Ticket) -> None:
        # What runs stays whole until it has run: another worker may just be gathering its inputs.
        if ticket.job is not None and self.scheduler.cancel(ticket.job):
            ticket.release()

    def _show(self, exit: int, job: Job, class_id: int, now: float) -> None:
        ticket: Ticket = job.payload
        self._metrics.saw(exit, ticket.confidence)
        milliseconds = 1e3 * (now - job.arrived)
        computing = 1e3 * ticket.compute_seconds
        seen = Seen(exit, class_id, ticket.confidence, milliseconds, computing)
        ticket.seen.append(seen)
        self._outbox.show(ticket, seen)

    def _answer(self, job: Job, reason: Reason) -> None:
        self._finish(job, reason)
        if self._tells_of_the_policy(job, reason) and self._chance() < self._audit_rate:
            self._audit(job)

    def _audit(self, job: Job) -> None:
        _release(self.scheduler.audit(job))

    def _tells_of_the_policy(self, job: Job, reason: Reason) -> bool:
        """Whether the policy in force gave an early answer, and not its request or the load."""
        return reason is Reason.CONFIDENT and job.bends

    def _answer_overdue(self, job: Job) -> None:
        ticket: Ticket = job.payload
        if ticket.seen:
            self._finish(job, Reason.DEADLINE)
        else:
            self._metrics.missed_deadline()
            self._outbox.settle(ticket, DeadlineExceeded())
        ticket.release()

    def _finish(self, job: Job, reason: Reason) -> None:
        ticket: Ticket = job.payload
        assert ticket.probabilities is not None
        exit, now = ticket.seen[-1].exit, self._clock()
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
        self._outbox.settle(ticket, answer)

    def _settle_audit(self, batch: Batch, seconds: float) -> None:
        (job,) = batch.jobs
        _release(self.scheduler.settle_audit(batch, seconds))
        if batch.stage == self.scheduler.exits:
            ticket: Ticket = job.payload
            assert ticket.probabilities is not None
            said = ticket.seen[-1]
            self._metrics.audited(said.exit, said.class_id == int(ticket.probabilities.argmax()))


def _release(forgotten: Job | None) -> None:
    """Let go of an audited job that was forgotten for another."""
    if forgotten is not None:
        forgotten.payload.release()


def _say_why(what: str, batch: Batch) -> None:
    """Log the exception under the ids of its requests, whose clients are told to ask for it."""
    ids = [job.payload.request_id for job in batch.jobs]
    said = {"audit": batch.audit, "request_ids": ids}
    log.exception("stage %d %s", batch.stage, what, extra={"fields": said})


def _wake() -> None:
    """A message that says nothing: whoever takes it looks what there is to run."""
