"""Which batch of which stage runs next, who is answered now, who is refused.

The rule: every stage offers its most urgent jobs (earliest deadline first), as many as are worth
most a second and still end in time; one that a batch so large would make late is not passed over
where a smaller one costs nobody anything. Of these batches runs the one whose jobs are expected to
leave fastest for each second of device time, counting the stages they may still need; a batch
counts for more the longer its jobs have waited, so no stage starves, and the last place in one is
for a job without a deadline that has waited long. A batch yields to another whose jobs would be
late if they waited for it, and above all to the first stage, if any image there would: before the
first exit being late is an error. A job that can no longer be in time is never started: it is
answered at once with what it has; but now and then, when there is nothing else to do, one is
started all the same, to see whether that is so. A job beside which there is no other has the
workers' cores all to itself; an event loop that is late to begin requests has the last one's. When
nothing is left to do, an audited job takes a step.

The scheduler is pure: it owns no clock, no thread and no tensor, and never looks into a payload.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

from model.policy import Reason, Rule
from server.costs import CostTable, batch_sizes
from server.jobs import Batch, Job, JobState, Refused, Step, TooLate
from server.overload import OverloadController

PATIENCE_SECONDS = 0.05
"""Having waited this long doubles a batch's weight."""
PATIENT_SECONDS = 0.25
"""Having waited this long a job without a deadline has the last place in a batch of its stage…"""
LEAST_SHARED = 4
"""…of so many jobs, however many are more urgent."""
MAX_AUDITS = 64
"""Audited jobs kept; more are forgotten, oldest first."""
QUIET_SECONDS = 0.01
"""An audited job takes a step only after so long without a live one, since the next live one would
have to wait for it."""
PROBE_SECONDS = 1.0
"""After so long without a batch, one job runs although it is expected to be late even alone. Costs
are learned only from batches that run: one slow spell could have every job refused for ever."""
NO_DEADLINES = math.inf, -math.inf
"""An interval that holds none."""
LEFT_SECONDS = 0.1
"""So long the last core is left to the event loop after it took long to begin a job's request."""
LEAVING_RATE = 0.02
"""Weight of one job in the running share of jobs that leave at an exit."""


class Scheduler:
    """One queue a stage and the choice between them.

    Args:
        costs: expected seconds of every stage and batch size.
        controller: moves the thresholds under load.
        max_batch: the largest batch.
        workers: how many batches may run at the same time.
        http_seconds: what a request takes beside its stages, if the last worker would have the core
            that this is done on; 0 if there is a core for it.
        places: how many jobs there may be; who finds none is refused before he comes here.
    """

    def __init__(
        self,
        costs: CostTable,
        controller: OverloadController,
        max_batch: int,
        workers: int = 1,
        http_seconds: float = 0.0,
        places: float = math.inf,
    ) -> None:
        self.costs = costs
        self.controller = controller
        self.max_batch = max_batch
        self.most_workers = self.workers = workers
        self.http_seconds = http_seconds
        self._places = places
        self.exits = costs.stages
        self._queues: dict[int, list[Job]] = {k: [] for k in range(1, self.exits + 1)}
        self._audits: deque[Job] = deque()
        # Until answers have been seen, a job is as likely to leave at one exit as at another.
        self._leaving = {k: 1 / (self.exits + 1 - k) for k in self._queues}
        self._ends: dict[int, float] = {}
        """When each running batch is expected to end, by the number of its first job."""
        self._live_until = -math.inf
        self._left_until = -math.inf
        """Until when the last core is left to the event loop, which was late."""
        self._refusing = NO_DEADLINES
        """Deadlines sure to be refused: from that of the last job refused to when it would have had
        its first exit's answer."""
        self._probe: Job | None = None
        """A job that runs if nothing else does."""
        self._probe_at = math.inf
        """From when on expected costs are stale, nothing having run for `PROBE_SECONDS`."""
        self.backlog_seconds = 0.0
        """The predicted wait when the last step was chosen."""

    # --- what comes in -----------------------------------------------------------------------

    def admit(self, job: Job, now: float) -> None:
        """Queue a job for the first stage.

        Raises:
            TooLate: its first-exit answer would be late even if it were alone.
            Refused: even its first-exit answer is expected to be late.
        """
        job.state = JobState.DONE
        self._live_until = now
        self._probe_at = min(self._probe_at, now + PROBE_SECONDS)
        self._left_until = max(self._left_until, job.late_at + LEFT_SECONDS)
        if now + self.costs.seconds(1, 1, alone=True) > job.deadline:
            if not self._may_probe(job, now):
                raise TooLate  # which is no load: it takes nothing
            self._probe, job.state = job, JobState.WAITING
            return
        self.controller.saw_arrival(now)
        if math.isfinite(job.deadline):
            self.controller.saw_deadline(job.deadline - job.arrived)
        first_exit = now + self._first_exit_seconds(job, now)
        if first_exit > job.deadline:
            self._refusing = job.deadline, first_exit
            raise Refused(first_exit - job.deadline)
        self._queue(job, now)

    def short_seconds(self, deadline: float) -> float:
        """How much too late the first exit of a job would be that is not here yet; 0 where it is
        worth bringing. Any thread may ask.

        The last one refused is expected to have come to its first exit too late. One with a later
        deadline would come after it, so it is refused if its deadline is before that moment.
        """
        since, until = self._refusing
        return until - deadline if since <= deadline < until else 0.0

    def turn_away(self, now: float) -> None:
        """Count a job that was not brought because it would have been refused."""
        self._live_until = now
        self.controller.saw_arrival(now)

    def cancel(self, job: Job) -> bool:
        """Forget a job whose client went away; a no-op if it is answered.

        Returns:
            Whether it waited; one that runs is only forgotten when it has run.
        """
        waited = job.state is JobState.WAITING
        if job is self._probe:
            self._probe = None
        elif waited:
            self._queues[job.stage].remove(job)
        if job.state is not JobState.AUDITED:
            job.state = JobState.DONE
        return waited

    def audit(self, job: Job) -> Job | None:
        """Run an answered job to the last exit whenever nothing else is to do.

        Returns:
            The oldest such job, where it is forgotten for this one.
        """
        job.state = JobState.DONE
        if job.stage == self.exits:
            return None
        job.stage += 1
        job.state = JobState.AUDITED
        forgotten = self._audits.popleft() if len(self._audits) == MAX_AUDITS else None
        if forgotten:
            forgotten.state = JobState.DONE
        self._audits.append(job)
        return forgotten

    # --- what to do --------------------------------------------------------------------------

    def next_step(self, now: float) -> Step:
        """Choose what a free worker does now, and take those jobs off their queues."""
        if not self._queues[1]:
            self._refusing = NO_DEADLINES  # it held only while images waited ahead
        self.count_workers(now)
        self.backlog_seconds = self.predicted_wait(now)
        lone = self._only(1)
        # An image beside which there is no other waits for nobody, however long it computes.
        wait, taken = (0.0, 0) if lone else (self.backlog_seconds, sum(self.queued()))
        self.controller.update(wait, now, taken / self._places)
        overdue = self._take_overdue(now, lone)
        if overdue and self._only(0) and (saved := self._saved_by_a_team(overdue, now)):
            overdue.remove(saved)
            self._queue(saved, saved.queued)
        alone = self._only(1)
        probe, self._probe = self._probe, None
        batch = self._choose(now)
        if batch is None:
            rest = self._run_probe(probe, now) if probe else self._take_audit(now)
            return Step(rest, tuple(overdue))
        if probe:
            probe.state = JobState.DONE
            overdue.append(probe)
        if alone:
            seconds = self.costs.seconds(batch.stage, 1, alone)
            batch = Batch(batch.stage, batch.jobs, seconds, alone=True)
        batch = self._with_a_place_for_who_waits(batch, now)
        self._began(batch, now)
        self._take(batch)
        overdue += self._take_overdue(self._free_at(now))
        return Step(batch, tuple(overdue))

    def settle(
        self, batch: Batch, confidences: Sequence[float], seconds: float, now: float
    ) -> list[tuple[Job, Reason]]:
        """Take back a batch that has run.

        Args:
            batch: as `next_step` gave it.
            confidences: calibrated, one a job.
            seconds: how long it took.
            now: the time.

        Returns:
            The jobs to answer from this exit, each with its reason. The others wait for the next
            stage; cancelled jobs are gone.
        """
        if batch.probe:
            self.costs.believe(batch.stage, seconds)
        self.costs.observe(batch.stage, len(batch.jobs), seconds, batch.alone)
        self._ended(batch.jobs[0])
        self._live_until, self._probe_at = now, now + PROBE_SECONDS
        thresholds = self.controller.level.thresholds
        answered = []
        for job, confidence in zip(batch.jobs, confidences, strict=True):
            if job.state is JobState.DONE:
                continue
            reason = self._verdict(job, batch.stage, confidence, thresholds)
            self._learn(batch.stage, reason is not None)
            if reason is None:
                job.stage += 1
                self._queue(job, now)
            else:
                job.state = JobState.DONE
                answered.append((job, reason))
        if answered:
            self.controller.saw_answers(len(answered), self._work(batch.stage))
        return answered

    def settle_audit(self, batch: Batch, seconds: float) -> Job | None:
        """Take back an audit batch, whose job waits for its next stage if there is one.

        Args:
            batch: as `next_step` gave it.
            seconds: how long it took. A stage that looks too dear for any live job is known by
                these alone.

        Returns:
            As `audit`.
        """
        (job,) = batch.jobs
        self._ended(job)
        self.costs.observe(batch.stage, 1, seconds)
        return self.audit(job)

    def abandon(self, job: Job) -> None:
        """Forget a job whose run failed, wherever it has got to."""
        self._ended(job)
        self.cancel(job)
        if job in self._audits:
            self._audits.remove(job)
        job.state = JobState.DONE

    def next_audit(self, now: float) -> float:
        """Seconds until an audited job may take a step; infinite while anything runs, or where none
        waits for it.
        """
        if self._ends or not self._audits:
            return math.inf
        return max(0.0, self._live_until + QUIET_SECONDS - now)

    # --- what is known -----------------------------------------------------------------------

    def queued(self) -> list[int]:
        """How many jobs wait for each stage, shallow to deep."""
        first, *others = map(len, self._queues.values())
        return [first + (self._probe is not None), *others]

    @property
    def calls_for_another_worker(self) -> bool:
        """Whether jobs wait while a worker has nothing to do."""
        return len(self._ends) < self.workers and any(self._queues.values())

    def count_workers(self, now: float) -> None:
        """See how many workers there should be now."""
        self.workers = self._workers_worth_their_core(now)

    def predicted_wait(self, now: float) -> float:
        """Seconds until everything in the queues is expected to have been answered."""
        work = sum(max(0.0, end - now) for end in self._ends.values())
        survivors = 0.0
        for stage, queue in self._queues.items():
            survivors += len(queue)
            if survivors > 0:
                full, rest = divmod(survivors, self.max_batch)
                work += full * self.costs.seconds(stage, self.max_batch)
                work += self.costs.seconds(stage, rest) if rest else 0.0
            survivors *= 1 - self._leaving[stage]
        return work / self.workers

    # --- inside ------------------------------------------------------------------------------

    def _queue(self, job: Job, now: float) -> None:
        job.state = JobState.WAITING
        job.queued = now
        insort(self._queues[job.stage], job, key=lambda j: j.urgency)

    def _began(self, batch: Batch, now: float) -> Batch:
        self._ends[batch.jobs[0].number] = now + batch.seconds
        return batch

    def _ended(self, job: Job) -> None:
        """No batch that this job was the first of runs any more."""
        self._ends.pop(job.number, None)

    def _workers_worth_their_core(self, now: float) -> int:
        """All of them where images take long and HTTP is in time; else one less, which leaves its
        core to HTTP.

        On `c` cores, with images that take `s` seconds of computing and `h` of HTTP, `c` workers
        answer `c / (s + h)` a second, one less at most `(c - 1) / s`.
        """
        others = self.most_workers - 1
        http_seconds = others * self.http_seconds
        if http_seconds and (now < self._left_until or self._image_seconds() < http_seconds):
            return others
        return self.most_workers

    def _image_seconds(self) -> float:
        """Expected seconds of computing for one image, among as many as fill a batch."""
        return sum(seconds for seconds, _ in self._course(1, self.max_batch)) / self.max_batch

    def _course(self, stage: int, jobs: int) -> Iterator[tuple[float, float]]:
        """Of jobs that start a stage together, stage by stage: seconds, and how many leave then."""
        survivors = float(jobs)
        for k in range(stage, self.exits + 1):
            leaving = survivors * self._leaving[k]
            yield self.costs.seconds(k, survivors), leaving
            survivors -= leaving

    def _take(self, batch: Batch) -> None:
        """Off its queue, where its jobs follow each other, but for the last."""
        queue = self._queues[batch.stage]
        first, together = queue.index(batch.jobs[0]), len(batch.jobs) - 1
        del queue[first : first + together]
        queue.remove(batch.jobs[-1])
        for job in batch.jobs:
            job.state = JobState.RUNNING

    def _with_a_place_for_who_waits(self, batch: Batch, now: float) -> Batch:
        """The same, with the last place for the oldest job without a deadline if it waits long."""
        queue = self._queues[batch.stage]
        patient = bisect_left(queue, (math.inf, -1), key=lambda j: j.urgency)
        if len(batch.jobs) < LEAST_SHARED or patient == len(queue):
            return batch
        oldest = queue[patient]
        if oldest in batch.jobs or now - oldest.queued < PATIENT_SECONDS:
            return batch
        return replace(batch, jobs=(*batch.jobs[:-1], oldest))

    def _free_at(self, now: float) -> float:
        """When a worker is expected to be free."""
        if len(self._ends) < self.workers:
            return now
        return max(now, sorted(self._ends.values())[len(self._ends) - self.workers])

    def _may_probe(self, job: Job, now: float) -> bool:
        return self._only(0) and not self._probe and self._probe_at <= now < job.deadline

    def _run_probe(self, job: Job, now: float) -> Batch:
        job.state = JobState.RUNNING
        seconds = self.costs.seconds(1, 1, alone=True)
        return self._began(Batch(1, (job,), seconds, alone=True, probe=True), now)

    def _only(self, jobs: int) -> bool:
        """Whether so many jobs wait and nothing runs."""
        return not self._ends and sum(map(len, self._queues.values())) == jobs

    def _first_exit_seconds(self, job: Job, now: float) -> float:
        if self._only(0):
            return self.costs.seconds(1, 1, alone=True)
        ahead = bisect_left(self._queues[1], job.urgency, key=lambda j: j.urgency)
        before, places = divmod(ahead, self.max_batch)
        wait = before * self.costs.seconds(1, self.max_batch) / self.workers
        return self._free_at(now) - now + wait + self.costs.seconds(1, places + 1)

    def _work(self, stage: int) -> float:
        """Seconds of an answer's share in calm batches, up to a stage.

        Those are the largest that pass all stages within the wait that bends nothing. The batches
        that ran would mislead: a light load makes them small, and so its answers dear. Of several
        workers, all share the work.
        """
        size = self.max_batch
        while size > 1 and self._pass(self.exits, size) > self.controller.calm_seconds:
            size -= (size + 3) // 4
        return self._pass(stage, size) / size / self.workers

    def _pass(self, stage: int, size: int) -> float:
        return sum(self.costs.seconds(k, size) for k in range(1, stage + 1))

    def _take_overdue(self, start: float, alone: bool = False) -> list[Job]:
        """Take off the jobs that would be late if they started no sooner than `start`."""
        overdue = []
        for stage, queue in self._queues.items():
            if not queue:
                continue
            latest = start + self.costs.seconds(stage, 1, alone)
            late = bisect_left(queue, (latest, -1), key=lambda j: j.urgency)
            overdue += queue[:late]
            del queue[:late]
        for job in overdue:
            job.state = JobState.DONE
        return overdue

    def _saved_by_a_team(self, overdue: list[Job], now: float) -> Job | None:
        """One that would be in time with every core, now that no other will run."""
        for job in overdue:
            if now + self.costs.seconds(job.stage, 1, alone=True) <= job.deadline:
                return job
        return None

    def _choose(self, now: float) -> Batch | None:
        batches = [self._best_batch(k, q, now) for k, q in self._queues.items() if q]
        if not batches:
            return None
        best = max(batches, key=lambda b: self._index(b, now))
        others = [b for b in batches if b is not best and self._holds_up(best, b, now)]
        if not others:
            return best
        rival = min(others, key=lambda b: (b.stage > 1, b.deadline))
        if rival.stage == 1:
            return rival
        late = now + rival.seconds + best.seconds > best.deadline
        return best if late or self._holds_up_first_exits(rival, now) else rival

    def _holds_up(self, batch: Batch, other: Batch, now: float) -> bool:
        """Whether another batch, or one behind it in the first stage, would be late after this."""
        if now + batch.seconds + other.seconds > other.deadline:
            return True
        return other.stage == 1 and self._holds_up_first_exits(batch, now)

    def _holds_up_first_exits(self, batch: Batch, now: float) -> bool:
        """Whether an image that can have its first exit in time could not if this batch ran first.

        Of all that wait, the most urgent of each batch that they will be in counts.
        """
        queue, most = self._queues[1], self.max_batch
        each = self.costs.seconds(1, most) / self.workers
        for first in range(0, len(queue), most):
            before = first // most * each
            done = now + before + self.costs.seconds(1, min(most, len(queue) - first))
            if done <= queue[first].deadline < done + batch.seconds:
                return True
        return False

    def _best_batch(self, stage: int, queue: list[Job], now: float) -> Batch:
        """The most jobs a second, among the batches of all sizes that end in time; but the most
        urgent job is not passed over where none of that batch would be late for it.
        """
        most = min(len(queue), self.max_batch)
        offers = [self._offer(stage, queue, size, now) for size in batch_sizes(most)]
        best = max(offers, key=_jobs_a_second)
        if best.jobs[0] is queue[0]:
            return best
        first = max((b for b in offers if b.jobs[0] is queue[0]), key=_jobs_a_second, default=best)
        return first if now + first.seconds + best.seconds <= best.deadline else best

    def _offer(self, stage: int, queue: list[Job], size: int, now: float) -> Batch:
        end = now + self.costs.seconds(stage, size)
        first = bisect_left(queue, (end, -1), key=lambda j: j.urgency)
        jobs = tuple(queue[first : first + size]) or (queue[0],)
        return Batch(stage, jobs, self.costs.seconds(stage, len(jobs)))

    def _index(self, batch: Batch, now: float) -> float:
        """Jobs that leave for each second of device time, at the best place to stop.

        This is Gittins' index of a job that may need several stages (Gittins 1979), with batch
        costs and the running share of jobs that leave at each exit.
        """
        left, seconds, best = 0.0, 0.0, 0.0
        for stage_seconds, leaving in self._course(batch.stage, len(batch.jobs)):
            left, seconds = left + leaving, seconds + stage_seconds
            best = max(best, left / seconds)
        waited = now - min(job.queued for job in batch.jobs)
        return best * (1 + waited / PATIENCE_SECONDS)

    def _verdict(
        self, job: Job, exit: int, confidence: float, thresholds: Sequence[float]
    ) -> Reason | None:
        reason = job.rule.verdict(exit, confidence)
        if reason or not (job.bends and self.controller.bent):
            return reason
        bent = Rule((*thresholds, 0.0), job.rule.min_exit, job.rule.max_exit)
        return Reason.OVERLOAD if bent.verdict(exit, confidence) else None

    def _learn(self, stage: int, left: bool) -> None:
        self._leaving[stage] += LEAVING_RATE * (left - self._leaving[stage])
        if stage == self.exits:
            self._leaving[stage] = 1.0

    def _take_audit(self, now: float) -> Batch | None:
        if self.next_audit(now) > 0:
            return None
        job = self._audits.popleft()
        seconds = self.costs.seconds(job.stage, 1)
        return self._began(Batch(job.stage, (job,), seconds, audit=True), now)


def _jobs_a_second(batch: Batch) -> float:
    return len(batch.jobs) / batch.seconds
