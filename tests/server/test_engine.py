"""The engine's laws, driven step by step: a fake clock, runner and client loop; no torch."""

import functools
import logging
import math
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import strategies as st

from model.policy import Reason, Rule
from server.costs import CostTable
from server.engine import BEAT_SECONDS, STUCK_BEATS, Engine
from server.errors import DeadlineExceeded, Draining, OfframpError, Overloaded
from server.metrics import EngineMetrics, Metrics
from server.overload import Level, OverloadController
from server.rows import Row
from server.runner import StageOutput
from server.scheduler import LEFT_SECONDS, MAX_AUDITS, QUIET_SECONDS, Scheduler
from tests.conftest import until
from tests.examples import examples

STAGES = 3
RULE = Rule((0.8, 0.8, 0.0), 1, STAGES)
SECONDS = 1e-3
CLASSES = 4


class FakeLoop:
    """A client's event loop that runs what it is told at once, and counts."""

    def __init__(self):
        self.wakes = 0

    def call_soon_threadsafe(self, callback, *args):
        self.wakes += 1
        callback(*args)


class FakePromise:
    """Holds every result it is given, so that a second one would show."""

    def __init__(self, loop):
        self.results = []

    def done(self):
        return False

    def set_result(self, result):
        self.results.append(result)

    set_exception = set_result


BUSY_SHARE = 0.75
"""Of a batch, how long its thread has a processor."""


class FakeRunner:
    """Takes a millisecond a batch; images are the confidences that their exits will say."""

    def __init__(self, clock):
        self.clock = clock
        self.ran = []
        self.alone = []
        self.guilty = lambda images: False
        self.forgets_rows = False
        self.missing = 0
        self.meanwhile = lambda: None
        self.probes, self.device_works = 0, True

    def run(self, stage, inputs, alone=False):
        self.alone.append(alone)
        self.missing += sum(image is None for image in inputs)
        self.ran.append((stage, len(inputs), self.clock.now))
        self.meanwhile()
        self.clock.now += SECONDS
        images = [i.features if isinstance(i, Row) else i for i in inputs]
        if self.guilty(images):
            raise RuntimeError("a broken row")
        said = [float(image[stage - 1]) for image in images]
        classes = np.eye(CLASSES, dtype=np.float32)[[0] * len(said)]
        return StageOutput(said, classes, images)

    def keep(self, output, places):
        rows = [Row(output.features[place], None, 0) for place in places]
        return [] if self.forgets_rows else rows

    def probe(self):
        self.probes += 1
        if not self.device_works:
            raise RuntimeError("an illegal memory access was encountered")


class World:
    """One engine with everything around it.

    Of several workers, each further one takes a turn while the one before runs its batch.
    """

    def __init__(self, audit_rate=0.0, workers=1, http_seconds=0.0):
        self.now = 100.0
        self.loop = FakeLoop()
        self.runner = FakeRunner(self)
        rows = {k: {n: SECONDS for n in (1, 2, 4)} for k in range(1, STAGES + 1)}
        controller = OverloadController([Level(0.01, RULE.thresholds[:-1])], 1.0)
        self.metrics = Metrics(4, 1.0)
        self.at_work, self.workers = 0, workers
        self.runner.meanwhile = self.others_work
        self.engine = Engine(
            Scheduler(CostTable(rows), controller, 4, workers, http_seconds),
            self.runner,
            engine_metrics := EngineMetrics(self.metrics, "tiny", [1, 2, 3]),
            audit_rate,
            clock=lambda: self.now,
            cpu_clock=lambda: self.now * BUSY_SHARE,
            chance=lambda: 0.0,
            promise=FakePromise,
        )
        engine_metrics.lead()

    def submit(self, *said, seconds=math.inf, loop=None, rule=RULE, bends=True, **others):
        image = np.array(said or (0.1, 0.2, 0.3))
        deadline = self.now + seconds
        loop = loop or self.loop
        return self.engine.submit(image, rule, self.now, deadline, bends, loop=loop, **others)

    def others_work(self):
        self.at_work += 1
        if self.at_work < self.workers:
            self.engine.step(False)
        self.at_work -= 1

    def finish(self):
        while self.engine.step(False):
            pass

    def waiting(self):
        """How many jobs wait for each stage, as a scrape sees it."""
        stages = range(1, STAGES + 1)
        return [self.value("queue_jobs", model="tiny", stage=str(k)) for k in stages]

    def value(self, name, **labels):
        return self.metrics.registry.get_sample_value(f"offramp_{name}", labels)


@pytest.fixture
def world():
    return World()


@pytest.fixture
def engine_with_audits():
    return World(audit_rate=1.0)


def answer(ticket):
    (result,) = ticket.promise.results
    return result


def test_a_job_goes_as_deep_as_its_confidence_asks(world):
    tickets = [world.submit(0.9, 0.9, 0.9), world.submit(0.1, 0.9, 0.9), world.submit()]
    world.finish()
    said = [(answer(t).exit, answer(t).reason) for t in tickets]
    assert said == [(1, Reason.CONFIDENT), (2, Reason.CONFIDENT), (3, Reason.FINAL)]
    assert [len(answer(t).seen) for t in tickets] == [1, 2, 3]


def test_the_runner_is_told_which_job_is_alone(world):
    world.submit(0.1, 0.9, 0.9)
    world.submit(0.9, 0.9, 0.9)
    world.finish()
    assert world.runner.alone == [False, True]


def test_settled_tickets_hold_no_features(world):
    tickets = [world.submit(0.9, 0.9, 0.9), world.submit()]
    assert all(t.inputs is not None for t in tickets)
    world.finish()
    assert all(t.inputs is None and t.job is None for t in tickets)


def test_a_failing_batch_fails_only_its_guilty_job(world):
    world.runner.guilty = lambda images: any(image[0] == 0.13 for image in images)
    good, bad, fine = world.submit(), world.submit(0.13, 0.1, 0.1), world.submit(0.9, 0.1, 0.1)
    world.finish()
    assert type(answer(bad)) is OfframpError
    assert bad.inputs is None
    assert answer(good).exit == 3
    assert answer(fine).exit == 1


def test_a_confidence_that_is_no_number_is_an_internal_error_for_that_job_alone(world):
    good, bad = world.submit(), world.submit(0.1, math.nan, 0.1)
    world.finish()
    assert type(answer(bad)) is OfframpError
    assert answer(good).exit == 3


def test_a_device_that_runs_nothing_any_more_is_told_from_an_image_that_fails(world, caplog):
    world.runner.guilty = fails(1)
    world.submit()
    world.finish()
    assert (world.runner.probes, world.engine.broken) == (1, False)
    world.runner.guilty, world.runner.device_works = lambda images: True, False
    tickets = [world.submit() for _ in range(3)]
    world.finish()
    assert {type(answer(ticket)) for ticket in tickets} == {OfframpError}
    assert (world.runner.probes, world.engine.broken) == (2, True)
    said = [r for r in caplog.records if r.levelno == logging.CRITICAL]
    assert [str(r.exc_info[1]) for r in said] == ["an illegal memory access was encountered"]


def failures(caplog):
    """(message, request ids, cause) of every failure in the log."""
    return [
        (r.getMessage(), r.fields["request_ids"], str(r.exc_info[1]))
        for r in caplog.records
        if r.exc_info
    ]


def test_the_cause_of_a_failure_is_in_the_log_under_its_request(world, caplog):
    world.runner.guilty = lambda images: any(image[0] == 0.13 for image in images)
    world.submit(request_id="good")
    world.submit(0.13, 0.1, 0.1, request_id="bad")
    world.finish()
    together, alone = failures(caplog)
    assert together == ("stage 1 failed", ["good", "bad"], "a broken row")
    assert alone == ("stage 1 failed", ["bad"], "a broken row")


def test_so_is_that_of_a_batch_that_cannot_be_settled(world, caplog):
    for name in "ab":
        world.submit(request_id=name)
    world.runner.forgets_rows = True
    world.engine.step(False)
    ((said, ids, _),) = failures(caplog)
    assert (said, ids) == ("stage 1 could not be settled", ["a", "b"])


def test_a_scrape_sees_who_waits_whatever_becomes_of_them(world):
    assert world.waiting() == [0, 0, 0]
    tickets = [world.submit(seconds=20 * SECONDS) for _ in range(3)]
    world.engine._take_messages(0)
    assert world.waiting() == [3, 0, 0]
    world.engine.step(False)
    assert world.waiting() == [0, 3, 0]
    world.engine.cancel(tickets[0])
    world.engine._take_messages(0)
    assert world.waiting() == [0, 2, 0]
    world.runner.guilty = lambda images: True
    world.engine.step(False)
    assert world.waiting() == [0, 0, 0]
    world.submit(seconds=5 * SECONDS)
    world.engine._take_messages(0)
    world.now += 5 * SECONDS
    world.engine.step(False)
    assert world.waiting() == [0, 0, 0]


def test_a_scrape_sees_how_many_workers_there_are():
    world = World(workers=3, http_seconds=1.0)
    assert world.value("workers") == 3
    world.submit()
    world.finish()
    assert world.value("workers") == 2, "one leaves its core to HTTP"


@pytest.mark.slow
def test_a_cancelled_job_frees_its_place_and_its_features(world):
    ticket = world.submit()
    world.engine.step(False)
    assert world.engine.scheduler.queued() == [0, 1, 0]
    world.engine.cancel(ticket)
    assert not world.engine.step(False)
    assert world.engine.scheduler.queued() == [0, 0, 0]
    assert ticket.inputs is None
    assert ticket.promise.results == []


def test_a_job_cancelled_before_it_ran_never_runs(world):
    world.engine.cancel(world.submit())
    world.finish()
    assert world.runner.ran == []


def test_a_job_cancelled_as_its_batch_begins_takes_nothing_from_its_neighbours(world):
    tickets = [world.submit(0.9, 0.9, 0.9), world.submit(), world.submit(0.1, 0.9, 0.9)]
    world.engine._take_messages(0)
    batch = world.engine._next_batch(0)
    world.engine.cancel(tickets[1])
    world.engine._take_messages(1)  # by another worker, before this one has gathered its inputs
    world.engine._run_batch(batch)
    world.finish()
    assert world.runner.ran[0][:2] == (1, 3)
    assert [answer(t).exit for t in (tickets[0], tickets[2])] == [1, 2]
    assert tickets[1].promise.results == []
    assert tickets[1].inputs is None


def test_a_batch_that_cannot_be_settled_fails_and_the_engine_goes_on(world):
    tickets = [world.submit(0.9, 0.9, 0.9), world.submit()]
    world.runner.forgets_rows = True
    world.engine.step(False)
    answered, _ = tickets[0].promise.results  # of which a promise takes the first
    assert answered.exit == 1
    assert type(answer(tickets[1])) is OfframpError
    assert all(t.inputs is None for t in tickets)
    world.runner.forgets_rows = False
    ticket = world.submit()
    world.finish()
    assert answer(ticket).exit == 3
    assert world.engine.scheduler.predicted_wait(world.now) == 0


def test_observations_wait_for_a_scrape_or_until_they_are_many(world, monkeypatch):
    counter = world.metrics.answers.labels("tiny", "1", "confident")
    world.submit(0.9, 0.9, 0.9)
    world.finish()
    assert counter._value.get() == 0
    assert world.value("answers_total", model="tiny", exit="1", reason="confident") == 1
    monkeypatch.setattr("server.metrics.MANY", 5)
    world.submit(0.9, 0.9, 0.9)
    world.finish()
    assert counter._value.get() == 2


def test_cancelling_an_answered_job_changes_nothing(world):
    ticket = world.submit(0.9, 0.9, 0.9)
    world.finish()
    world.engine.cancel(ticket)
    world.finish()
    assert answer(ticket).exit == 1


def test_a_deadline_answers_with_the_deepest_exit_passed(world):
    ticket = world.submit(seconds=2.5 * SECONDS)
    world.finish()
    assert (answer(ticket).exit, answer(ticket).reason) == (2, Reason.DEADLINE)
    assert answer(ticket).degraded
    assert ticket.inputs is None


def test_a_deadline_before_the_first_exit_is_an_error(world):
    ticket = world.submit(seconds=0.5 * SECONDS)
    world.finish()
    assert type(answer(ticket)) is DeadlineExceeded
    assert world.value("deadlines_total", outcome="missed") == 1


def test_a_job_whose_deadline_passes_in_the_queue_is_an_error(world):
    ticket = world.submit(seconds=5 * SECONDS)
    world.engine._take_messages(0.0)
    world.now += 5 * SECONDS  # another process had the cores
    world.finish()
    assert type(answer(ticket)) is DeadlineExceeded
    assert ticket.inputs is None


def test_a_job_behind_too_many_others_is_refused(world):
    ahead = [world.submit(seconds=2.5 * SECONDS) for _ in range(8)]
    behind = world.submit(seconds=2.6 * SECONDS)
    world.finish()
    assert type(answer(behind)) is Overloaded and behind.inputs is None
    assert all(answer(t).exit >= 1 for t in ahead)
    assert world.value("refused_total", reason="not_in_time") == 1


def test_an_image_is_refused_before_it_is_decoded_where_one_before_it_was_refused(world):
    for _ in range(8):
        world.submit(seconds=2.5 * SECONDS)
    world.engine.check(world.now + 2.7 * SECONDS)  # nothing was refused yet
    behind = world.submit(seconds=2.6 * SECONDS)
    world.engine._take_messages(0.0)
    assert type(answer(behind)) is Overloaded
    with pytest.raises(Overloaded):
        world.engine.check(world.now + 2.7 * SECONDS)
    world.engine.check(world.now + 100 * SECONDS)
    world.engine._take_messages(0.0)
    assert world.value("refused_total", reason="not_in_time") == 2


def test_a_worker_that_comes_back_after_the_end_holds_up_nobody():
    world = World(workers=2)
    for _ in range(6):
        world.submit()
    world.engine._take_messages()
    world.engine._ended.set()  # it was stuck, and nobody waited for it
    done = threading.Thread(target=world.engine.step, args=(False,), daemon=True)
    done.start()
    done.join(5)
    assert not done.is_alive()


def test_draining_answers_everything_accepted_and_tells_late_ones(world):
    early = [world.submit() for _ in range(6)]
    world.engine._inbox.put(None)
    late = world.submit()
    world.engine._run()
    assert all(answer(t).exit == 3 for t in early)
    assert type(answer(late)) is Draining


def test_each_clients_loop_is_woken_once_a_turn(world):
    other = FakeLoop()
    seen = []
    for loop in (world.loop, other):
        for _ in range(2):
            world.submit(0.9, 0.9, 0.9, loop=loop, on_exit=seen.append)
    world.engine.step(False)
    assert len(seen) == 4
    assert (world.loop.wakes, other.wakes) == (1, 1)


def test_a_client_whose_loop_is_closed_disturbs_no_other(world):
    class Closed(FakeLoop):
        def call_soon_threadsafe(self, callback, *args):
            raise RuntimeError("Event loop is closed")

    world.submit(loop=Closed())
    ticket = world.submit()
    world.finish()
    assert answer(ticket).exit == 3


def test_exits_on_the_way_are_told_in_order(world):
    seen = []
    world.submit(on_exit=lambda s: seen.append(s.exit))
    world.finish()
    assert seen == [1, 2, 3]


def test_an_audit_waits_for_quiet_then_runs_to_the_last_exit():
    world = World(audit_rate=1.0)
    world.submit(0.9, 0.9, 0.9)
    world.finish()
    quiet = world.now + QUIET_SECONDS
    assert [stage for stage, _, _ in world.runner.ran] == [1]
    world.now = quiet
    world.finish()
    assert [stage for stage, _, _ in world.runner.ran] == [1, 2, 3]
    assert world.value("audited_total", model="tiny", exit="1", agreed="true") == 1


@pytest.mark.parametrize("away", [False, True])
def test_an_audit_runs_whether_or_not_the_client_is_still_there(away, caplog):
    world = World(audit_rate=1.0)
    ticket = world.submit(0.9, 0.9, 0.9)
    world.finish()
    if away:
        world.engine.cancel(ticket)
    world.now += 2 * QUIET_SECONDS
    world.finish()
    assert world.value("audited_total", model="tiny", exit="1", agreed="true") == 1
    assert not caplog.records


@pytest.mark.parametrize(
    ("rule", "bends"),
    [(Rule((0.0, 0.0, 0.0), 1, STAGES), False), (Rule(RULE.thresholds, 1, 1), True)],
)
def test_only_answers_that_the_policy_in_force_gave_are_audited(rule, bends):
    world = World(audit_rate=1.0)
    ticket = world.submit(rule=rule, bends=bends)
    world.finish()
    assert answer(ticket).exit == 1
    world.now += 2 * QUIET_SECONDS
    world.finish()
    assert [stage for stage, _, _ in world.runner.ran] == [1]


def test_no_audit_runs_once_draining_began():
    world = World(audit_rate=1.0)
    world.submit(0.9, 0.9, 0.9)
    world.finish()
    world.now += 2 * QUIET_SECONDS
    world.engine._inbox.put(None)
    world.engine._run()
    assert [stage for stage, _, _ in world.runner.ran] == [1]


@examples(20, 200, events=st.lists(st.tuples(st.floats(0, 0.03), st.booleans()), max_size=20))
def test_audits_keep_their_distance_from_live_jobs_and_delay_none(events):
    world = World(audit_rate=1.0)
    live = -math.inf
    for pause, arrives in events:
        world.now += pause
        ticket = world.submit(0.9, 0.9, 0.9) if arrives else None
        before, began = len(world.runner.ran), world.now
        world.engine.step(False)
        ran = world.runner.ran[before:]
        if ticket:
            assert ran == [(1, 1, began)]
            assert answer(ticket).exit == 1
            live = world.now
        elif ran:
            assert began >= live + QUIET_SECONDS


ARRIVALS = st.tuples(
    st.just("arrive"),
    st.tuples(*[st.sampled_from([0.1, 0.5, 0.9, math.nan])] * STAGES),
    st.sampled_from([math.inf, 0.5 * SECONDS, 3 * SECONDS, 20 * SECONDS]),
)
EVENTS = st.one_of(
    ARRIVALS,
    ARRIVALS,
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("turn")),
    st.tuples(st.just("pause"), st.floats(0, 0.02)),
    st.tuples(st.just("break"), st.integers(0, 3)),
)


def happen(world, event, tickets, cancelled):
    match event:
        case ("arrive", said, seconds):
            tickets.append(world.submit(*said, seconds=seconds))
        case ("cancel", i) if i < len(tickets):
            cancelled.add(i)
            world.engine.cancel(tickets[i])
        case ("turn",):
            world.engine.step(False)
        case ("pause", seconds):
            world.now += seconds
        case ("break", failures):
            world.runner.guilty = fails(failures)


def fails(times):
    """Fails so many runs, whatever is in them."""
    left = iter(range(times))
    return lambda images: next(left, None) is not None


@examples(
    100,
    1000,
    events=st.lists(EVENTS, max_size=30),
    audit_rate=st.sampled_from([0.0, 1.0]),
    workers=st.integers(1, 3),
)
def test_no_job_is_lost_or_answered_twice(events, audit_rate, workers):
    world, tickets, cancelled = World(audit_rate, workers), [], set()
    for event in events:
        happen(world, event, tickets, cancelled)
    world.finish()
    assert sum(world.engine.scheduler.queued()) == 0
    assert not world.runner.missing
    for i, ticket in enumerate(tickets):
        assert len(ticket.promise.results) <= 1
        assert ticket.promise.results or i in cancelled
        if i in cancelled:
            continue
        (said,) = ticket.promise.results
        assert isinstance(said, OfframpError) or math.isfinite(said.confidence)


def test_workers_run_different_jobs_at_the_same_time():
    world = World(workers=2)
    tickets = [world.submit(0.9, 0.9, 0.9) for _ in range(8)]
    assert world.engine.step(False)
    assert [(stage, jobs) for stage, jobs, _ in world.runner.ran] == [(1, 4), (1, 4)]
    assert world.runner.ran[0][2] == world.runner.ran[1][2], (
        "the second began before the first ended"
    )
    assert all(answer(ticket).exit == 1 for ticket in tickets)


def test_no_audit_runs_beside_a_live_job():
    world = World(audit_rate=1.0, workers=2)
    world.submit(0.9, 0.9, 0.9)
    world.finish()
    world.now += 2 * QUIET_SECONDS
    world.submit(0.9, 0.9, 0.9)
    world.engine.step(False)
    assert [stage for stage, _, _ in world.runner.ran] == [1, 1]


def test_a_worker_that_leaves_jobs_waiting_wakes_another():
    world = World(workers=2)
    world.runner.meanwhile = lambda: None  # the other one sleeps
    for _ in range(5):
        world.submit(0.9, 0.9, 0.9)
    world.engine.step(False)
    assert len(world.engine._inbox)
    world.finish()
    world.submit(0.9, 0.9, 0.9)
    world.engine.step(False)
    assert not len(world.engine._inbox), "nobody is woken for nothing"


@pytest.mark.parametrize("leaving_jobs", [True, False])
def test_a_worker_that_goes_to_sleep_wakes_another_only_for_the_jobs_it_leaves(leaving_jobs):
    world = World(workers=2)
    world.engine._stopping.set()  # so that sleep is short
    world.engine._sleep(0, leaving_jobs)
    assert len(world.engine._inbox) == leaving_jobs


@pytest.fixture
def rude_threads():
    """Threads that interrupt each other wherever they can."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("rude_threads")
def test_real_workers_call_messages_in_the_order_sent():
    world, called = World(workers=3), []
    world.engine.start()
    for number in range(30_000):
        world.engine.call(functools.partial(called.append, number))
    world.engine.stop()
    assert called == list(range(30_000))


def test_a_worker_is_prepared_in_its_thread_before_its_jobs():
    world, names = World(), []
    world.engine.start()
    world.engine.prepare(lambda: names.append(threading.current_thread().name))
    assert names == ["engine-0"]
    ticket = world.submit(0.9)
    world.engine.stop()
    assert answer(ticket).exit == 1


def test_what_a_worker_cannot_prepare_is_raised_where_it_was_asked_for():
    world = World()
    world.engine.start()
    with pytest.raises(ZeroDivisionError):
        world.engine.prepare(lambda: 1 / 0)
    assert world.engine.alive
    world.engine.stop()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_has_ended_is_not_waited_for():
    world = World()
    world.engine.start()
    world.engine.call(lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="ended"):
        world.engine.prepare(lambda: None)


def test_a_worker_that_is_stuck_is_seen_though_another_turns():
    """Ten seconds after its batch should have ended."""
    world, hangs, goes_on = World(workers=2), threading.Event(), threading.Event()

    def hang_once():
        if not hangs.is_set():
            hangs.set()
            assert goes_on.wait(20)

    world.runner.meanwhile = hang_once
    world.engine.start()
    first = world.submit(0.9)
    assert hangs.wait(10)
    world.now += STUCK_BEATS * BEAT_SECONDS + SECONDS
    second = world.submit(0.9)
    until(lambda: second.promise.results)
    assert not first.promise.results
    assert not world.engine.alive
    goes_on.set()
    until(lambda: first.promise.results)
    until(lambda: world.engine.alive)
    world.engine.stop()


@pytest.mark.parametrize("http_seconds", [0.0, 1.0])
def test_the_end_does_not_wait_for_a_worker_that_is_stuck(http_seconds):
    """Though the other one may only sleep, and take no message."""
    world = World(workers=2, http_seconds=http_seconds)
    hangs, goes_on = threading.Event(), threading.Event()
    world.runner.meanwhile = lambda: (hangs.set(), goes_on.wait(20))
    world.engine.step(False)  # so that it is known from the start who is wanted
    world.engine.start()
    world.submit(0.9)
    assert hangs.wait(10)
    beats = world.engine._beats
    beats[beats.index(max(beats))] -= STUCK_BEATS * BEAT_SECONDS + SECONDS  # of the one that hangs
    end = threading.Thread(target=world.engine.stop, daemon=True)
    end.start()
    end.join(5)
    assert not end.is_alive()
    assert not goes_on.is_set()
    goes_on.set()


def test_a_worker_with_a_long_batch_is_not_stuck():
    world, hangs, goes_on = World(), threading.Event(), threading.Event()
    world.engine.scheduler.costs.replace(1, {1: 60.0})
    world.runner.meanwhile = lambda: (hangs.set(), goes_on.wait(20))
    world.engine.start()
    world.submit(0.9)
    assert hangs.wait(10)
    world.now += 60.0
    assert world.engine.alive
    world.now += STUCK_BEATS * BEAT_SECONDS
    assert not world.engine.alive
    goes_on.set()
    world.engine.stop()


@pytest.mark.parametrize("http_seconds", [0.0, 1.0])
def test_real_workers_answer_every_job_once(http_seconds):
    world = World(workers=3, http_seconds=http_seconds)
    world.runner.meanwhile = lambda: time.sleep(1e-4)
    world.engine.start()
    with ThreadPoolExecutor(4) as clients:
        said = [(0.9, 0.9, 0.9), (0.1, 0.9, 0.9), (0.1, 0.1, 0.1)] * 100
        tickets = list(clients.map(lambda confidences: world.submit(*confidences), said))
    world.engine.stop()
    assert not world.engine.alive
    assert [answer(ticket).exit for ticket in tickets] == [1, 2, 3] * 100


def test_the_wait_for_a_processor_amid_a_stage_can_be_seen(world):
    world.submit(0.1, 0.95)
    while world.engine.step(wait=False):
        pass
    stage = {"model": "tiny", "stage": "2"}
    assert world.value("stage_duration_seconds_sum", **stage) == pytest.approx(SECONDS)
    assert world.value("stage_cpu_seconds_total", **stage) == pytest.approx(BUSY_SHARE * SECONDS)


def test_audited_images_are_let_go_of_once_there_are_too_many(engine_with_audits):
    world = engine_with_audits
    tickets = [world.submit(0.95, 0.1, 0.1) for _ in range(MAX_AUDITS + 5)]
    while world.engine.step(wait=False):
        pass
    held = [ticket for ticket in tickets if ticket.inputs is not None]
    assert len(held) == MAX_AUDITS
    assert held == tickets[-MAX_AUDITS:]


def test_a_client_may_leave_that_was_told_of_the_drain(world):
    world.engine._stopping.set()
    ticket = world.submit(0.1)
    world.engine.cancel(ticket)
    other = world.submit(0.1)
    world.engine.step(wait=False)
    assert all(isinstance(t.promise.results[0], Draining) for t in (ticket, other))


def test_a_worker_sleeps_only_until_all_are_wanted():
    world = World(workers=2, http_seconds=1.0)  # images are quick beside HTTP
    world.submit(0.95)
    world.engine.step(wait=False)
    assert world.engine.scheduler.workers == 1
    assert not world.engine._all_wanted.is_set()
    world.engine.scheduler.http_seconds = 0.0
    world.submit(0.95)
    world.engine.step(wait=False)
    assert world.engine._all_wanted.is_set()


def test_a_worker_that_rests_sees_for_itself_when_that_is_over():
    """The other one may be in a long batch."""
    world = World(workers=2, http_seconds=1e-9)
    world.submit(0.95, late_at=world.now)
    world.engine.step(wait=False)
    assert world.engine.scheduler.workers == 1
    world.engine._sleep(1, leaving_jobs=False)
    assert world.engine.scheduler.workers == 1
    world.now += LEFT_SECONDS
    world.engine._sleep(1, leaving_jobs=False)
    assert world.engine.scheduler.workers == 2


def test_a_worker_that_rested_runs_what_others_left():
    world, hangs, goes_on = World(workers=2, http_seconds=1e-9), *(threading.Event() for _ in "ab")

    def hang_once():
        if not hangs.is_set():
            hangs.set()
            assert goes_on.wait(20)

    world.submit(0.9, late_at=world.now)
    world.engine.step(wait=False)  # so that the second one sleeps from the start
    world.runner.meanwhile = hang_once
    tickets = [world.submit(0.9, late_at=world.now) for _ in range(5)]
    world.engine.start()
    assert hangs.wait(10)
    assert world.engine.scheduler.workers == 1
    world.now += LEFT_SECONDS
    until(lambda: tickets[4].promise.results)  # the first four hang
    assert not tickets[0].promise.results
    goes_on.set()
    world.engine.stop()


def test_workers_that_ended_in_order_are_not_stuck():
    """While the engine ends, another one may still compute, whom clients wait for."""
    world = World(workers=2)
    world.engine.start()
    world.engine.stop()
    world.now += 2 * STUCK_BEATS * BEAT_SECONDS
    assert world.engine.turning
