"""The scheduler's laws, with a fake clock and no torch."""

import contextlib
import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)

from deploy.simulator import Arrival, simulate
from model.policy import Reason, Rule
from server.costs import CostTable
from server.jobs import Job, JobState, Refused, TooLate
from server.overload import Level, OverloadController
from server.scheduler import (
    LEFT_SECONDS,
    MAX_AUDITS,
    PATIENT_SECONDS,
    PROBE_SECONDS,
    QUIET_SECONDS,
    Scheduler,
)
from tests.examples import examples

STAGES = 4
RULE = Rule((0.8, 0.8, 0.8, 0.0), 1, STAGES)


def make_scheduler(max_batch=8, base=1e-3, each=0.25e-3, deadline=1.0, workers=1):
    rows = {k: {n: base + each * n for n in (1, 2, 4, 8)} for k in range(1, STAGES + 1)}
    ladder = [Level(0.01, RULE.thresholds[:-1]), Level(0.05, (0.5,) * 3), Level(1.0, (0.0,) * 3)]
    return Scheduler(CostTable(rows), OverloadController(ladder, deadline), max_batch, workers)


def job(arrived=0.0, deadline=math.inf, rule=RULE):
    return Job(rule, arrived, deadline)


def run(scheduler, batch, confidences, now):
    return scheduler.settle(batch, confidences, batch.seconds, now)


def test_a_confident_job_is_answered_and_the_others_go_on():
    scheduler = make_scheduler()
    sure, unsure = job(), job()
    scheduler.admit(sure, 0.0)
    scheduler.admit(unsure, 0.0)
    batch = scheduler.next_step(0.0).batch
    assert batch.jobs == (sure, unsure)
    assert run(scheduler, batch, [0.9, 0.1], 0.01) == [(sure, Reason.CONFIDENT)]
    assert scheduler.next_step(0.01).batch.jobs == (unsure,)
    assert unsure.stage == 2


def test_survivors_join_other_jobs_at_their_stage():
    scheduler = make_scheduler()
    first, second = job(), job(deadline=0.0024)  # the second cannot wait for the first
    for one in (first, second):
        scheduler.admit(one, 0.0)
        run(scheduler, scheduler.next_step(0.0).batch, [0.1], 0.0)
        assert one.stage == 2
    batch = scheduler.next_step(0.0).batch
    assert (batch.stage, set(batch.jobs)) == (2, {first, second})


def with_teams(scheduler, share=0.5):
    for stage in range(1, STAGES + 1):
        scheduler.costs.use_team(stage, share)
    return scheduler


def test_a_job_has_every_core_where_nothing_else_waits_or_runs():
    scheduler = with_teams(make_scheduler(workers=2))
    scheduler.admit(job(), 0.0)
    first = scheduler.next_step(0.0).batch
    assert first.alone
    assert first.seconds == pytest.approx(0.5 * 1.25e-3)
    scheduler.admit(job(), 0.0)
    second = scheduler.next_step(0.0).batch
    assert not second.alone, "the first still runs"
    assert second.seconds == pytest.approx(1.25e-3)
    run(scheduler, first, [0.1], 0.01)
    run(scheduler, second, [0.1], 0.01)
    both = scheduler.next_step(0.01).batch
    assert len(both.jobs) == 2
    assert not both.alone
    run(scheduler, both, [0.9, 0.1], 0.02)
    assert scheduler.next_step(0.02).batch.alone, "the other was answered"


def test_a_job_that_a_team_brings_in_time_is_neither_too_late_nor_refused():
    scheduler = with_teams(make_scheduler())
    one = job(deadline=1e-3)  # one thread takes 1.25 ms
    scheduler.admit(one, 0.0)
    step = scheduler.next_step(0.0)
    assert step.batch.jobs == (one,)
    assert step.overdue == ()
    with pytest.raises(Refused):
        scheduler.admit(job(deadline=1e-3), 0.0)


def test_an_audited_job_leaves_the_other_cores_to_live_ones():
    scheduler = with_teams(make_scheduler(workers=2))
    one = job()
    scheduler.admit(one, 0.0)
    run(scheduler, scheduler.next_step(0.0).batch, [0.9], 0.0)
    scheduler.audit(one)
    batch = scheduler.next_step(QUIET_SECONDS).batch
    assert batch.audit
    assert not batch.alone


def test_the_device_never_idles_while_a_job_waits():
    scheduler = make_scheduler()
    scheduler.admit(job(), 0.0)
    assert scheduler.next_step(0.0).batch is not None


def test_the_most_urgent_jobs_of_a_stage_go_first():
    scheduler = make_scheduler(max_batch=2)
    late, soon, middle = (job(deadline=d) for d in (3.0, 1.0, 2.0))
    for one in (late, soon, middle):
        scheduler.admit(one, 0.0)
    assert scheduler.next_step(0.0).batch.jobs == (soon, middle)


@pytest.mark.parametrize("before", [math.inf, 0.1])
def test_a_job_that_cannot_be_in_time_is_refused_until_one_like_it_can(before):
    """Whatever waits behind it does not count."""
    scheduler, allowed = make_scheduler(), 0.01
    for _ in range(80):
        scheduler.admit(job(deadline=before), 0.0)
    scheduler.admit(job(deadline=0.003), 0.0)
    running = scheduler.next_step(0.0).batch
    for _ in range(40):
        with contextlib.suppress(Refused):
            scheduler.admit(job(deadline=allowed), 0.0)
    with pytest.raises(Refused) as refused:
        scheduler.admit(job(deadline=allowed), 0.0)
    after = refused.value.retry_after_seconds
    assert 0 < after < 80 / 8 * 3e-3
    now = 0.0
    while running and now + running.seconds <= after:
        now += running.seconds
        run(scheduler, running, [0.9] * len(running.jobs), now)
        running = scheduler.next_step(now).batch
    scheduler.admit(job(after, after + allowed), after)


@examples(
    100,
    300,
    waiting=st.lists(st.sampled_from([0.01, 0.02, 0.03, math.inf]), max_size=60),
    deadlines=st.lists(st.floats(0.001, 0.05), min_size=2, max_size=2),
)
def test_what_would_be_refused_is_refused_if_it_is_brought(waiting, deadlines):
    scheduler = make_scheduler()
    for deadline in waiting:
        with contextlib.suppress(Refused):
            scheduler.admit(job(deadline=deadline), 0.0)
    first, second = sorted(deadlines)
    with contextlib.suppress(Refused, TooLate):
        scheduler.admit(job(deadline=first), 0.0)
    if scheduler.short_seconds(second):
        with pytest.raises(Refused):
            scheduler.admit(job(deadline=second), 0.0)


def test_only_jobs_behind_one_that_was_refused_are_known_to_be_refused_too():
    scheduler = make_scheduler()
    assert scheduler.short_seconds(0.02) == 0
    with pytest.raises(Refused):
        for _ in range(60):
            scheduler.admit(job(deadline=0.02), 0.0)
    assert 0 < scheduler.short_seconds(0.02) < 0.0003
    assert scheduler.short_seconds(0.0199) == 0, "it would come first"
    assert scheduler.short_seconds(0.0203) == 0, "it has time to wait for all"


def test_a_job_that_would_be_late_even_alone_is_too_late_rather_than_refused():
    scheduler = make_scheduler()
    one = job(deadline=1e-4)
    with pytest.raises(TooLate):
        scheduler.admit(one, 0.0)
    assert one.done
    assert scheduler.queued() == [0] * STAGES


def slowed(scheduler):
    """After a spell in which the machine was slow; the first job to expect is far too late."""
    now = 0.0
    while scheduler.costs.seconds(1, 1) < 0.02:
        scheduler.admit(job(arrived=now), now)
        batch = scheduler.next_step(now).batch
        now += 0.1
        scheduler.settle(batch, [0.9], 0.1, now)
    return now


def test_after_a_slow_spell_jobs_are_in_time_again_though_all_of_them_seemed_too_late():
    scheduler = make_scheduler()
    now, fine = slowed(scheduler), 0
    for _ in range(5000):
        now += 0.02
        one = job(now, now + 0.01)
        with contextlib.suppress(TooLate):
            scheduler.admit(one, now)
            if (batch := scheduler.next_step(now).batch) is not None:
                scheduler.settle(batch, [0.9], 0.001, now + 0.001)
                fine += one.done
    assert fine > 2500
    assert scheduler.costs.seconds(1, 1) < 0.01


def probing(scheduler):
    """With a job that runs, though it seems too late, if nothing else does."""
    now = slowed(scheduler) + PROBE_SECONDS
    one = job(now, now + 0.01)
    scheduler.admit(one, now)
    with pytest.raises(TooLate):
        scheduler.admit(job(now, now + 0.01), now)
    assert scheduler.queued() == [1] + [0] * (STAGES - 1)
    return one, now


def test_a_job_that_seems_too_late_runs_only_if_nothing_else_has_for_long():
    scheduler = make_scheduler()
    now = slowed(scheduler)
    with pytest.raises(TooLate):
        scheduler.admit(job(now, now + 0.01), now)
    one, now = probing(make_scheduler())
    assert not one.done


def test_a_job_that_seems_too_late_makes_way_for_any_other():
    scheduler = make_scheduler()
    probe, now = probing(scheduler)
    other = job(now)
    scheduler.admit(other, now)
    step = scheduler.next_step(now)
    assert (step.batch.jobs, step.overdue) == ((other,), (probe,))
    assert probe.done


def test_a_job_that_seems_too_late_may_go_away():
    scheduler = make_scheduler()
    probe, now = probing(scheduler)
    assert scheduler.cancel(probe)
    assert scheduler.next_step(now).batch is None


def test_what_was_refused_behind_others_is_not_refused_without_them():
    scheduler = make_scheduler()
    waiting = [job(deadline=0.02) for _ in range(100)]
    for one in waiting:
        with contextlib.suppress(Refused):
            scheduler.admit(one, 0.0)
    assert scheduler.short_seconds(0.02) > 0
    for one in waiting:
        scheduler.cancel(one)
    scheduler.next_step(0.0)
    assert scheduler.short_seconds(0.02) == 0


def test_a_deadline_past_the_first_exit_answers_now_with_what_there_is():
    scheduler = make_scheduler()
    one = job(deadline=0.002)
    scheduler.admit(one, 0.0)
    run(scheduler, scheduler.next_step(0.0).batch, [0.1], 0.0015)
    step = scheduler.next_step(0.0015)
    assert (step.batch, step.overdue) == (None, (one,))
    assert one.stage == 2


def test_a_job_overdue_before_the_first_exit_is_never_started():
    scheduler = make_scheduler()
    one = job(deadline=0.01)
    scheduler.admit(one, 0.0)
    step = scheduler.next_step(0.0095)
    assert (step.batch, step.overdue) == (None, (one,))


def test_a_job_that_a_long_batch_would_make_late_is_answered_before_it():
    scheduler = make_scheduler(base=1e-3, each=1e-3)
    deep = job(deadline=0.0125)
    scheduler.admit(deep, 0.0)
    run(scheduler, scheduler.next_step(0.0).batch, [0.1], 0.002)
    for _ in range(8):
        scheduler.admit(job(deadline=0.012), 0.002)
    step = scheduler.next_step(0.002)
    assert step.batch.stage == 1
    assert step.overdue == (deep,)


def test_a_first_stage_job_at_risk_goes_before_a_better_batch():
    scheduler = make_scheduler(base=1e-3, each=1e-3)
    for _ in range(8):
        scheduler.admit(job(), 0.0)
    run(scheduler, scheduler.next_step(0.0).batch, [0.1] * 8, 0.009)
    scheduler._leaving[2] = 1.0  # the deep batch is worth most a second
    urgent = job(arrived=0.009, deadline=0.015)
    scheduler.admit(urgent, 0.009)
    assert scheduler.next_step(0.009).batch.jobs == (urgent,)


def unbent(deadline=1.0, **options):
    scheduler = make_scheduler(**options)
    scheduler.controller = OverloadController([Level(0.01, RULE.thresholds[:-1])], deadline)
    return scheduler


def test_jobs_that_could_never_be_in_time_are_no_load():
    """Or answers would stay shallow for as long as such jobs come."""
    scheduler = make_scheduler(deadline=0.05)
    controller = scheduler.controller
    controller.saw_answers(1, 0.01)  # in peace an answer takes so long
    controller.update(1.0, 0.0)
    for i in range(900):
        with pytest.raises(TooLate):
            scheduler.admit(job(i / 1000, i / 1000 + 1e-4), i / 1000)
        controller.update(0.0, i / 1000)
    assert not controller.bent


@pytest.mark.parametrize("others", [1, 3, 7, 20])
def test_the_most_urgent_of_a_stage_is_not_passed_over_for_a_better_batch(others):
    scheduler = unbent(base=0.3e-3, each=0.5e-3)
    load = [Arrival(0.0, (0.95,) * STAGES)] * others + [Arrival(0.0, (0.95,) * STAGES, 2.2e-3)]
    *_, urgent = sorted(simulate(scheduler, load, RULE), key=lambda o: -o.arrival.deadline_seconds)
    assert urgent.exit == 1


def test_images_without_a_deadline_make_way_for_a_deeper_one_that_has_little_time():
    scheduler, deep = unbent(base=1e-3, each=1e-3), job(deadline=0.02)
    scheduler.admit(deep, 0.0)
    run(scheduler, scheduler.next_step(0.0).batch, [0.1], 0.002)
    for _ in range(200):
        scheduler.admit(job(0.002), 0.002)
    now, answered = 0.002, []
    while not deep.done:
        step = scheduler.next_step(now)
        now += step.batch.seconds
        said = [0.1 if one is deep else 0.9 for one in step.batch.jobs]
        answered += run(scheduler, step.batch, said, now)
    assert (deep, Reason.FINAL) in answered


def test_no_deeper_batch_makes_way_for_another_at_the_cost_of_a_first_exit():
    costs = {1: 1e-3, 2: 4e-3, 3: 1e-3, 4: 1e-3}
    ladder = [Level(0.01, RULE.thresholds[:-1])]
    scheduler = Scheduler(
        CostTable({k: {1: seconds} for k, seconds in costs.items()}),
        OverloadController(ladder, 1.0),
        max_batch=1,
    )
    second, third, urgent = job(deadline=4.5e-3), job(), job(deadline=3.5e-3)
    second.stage, third.stage = 2, 3
    scheduler._queue(second, 0.0)
    scheduler._queue(third, -1.0)  # having waited long it is the best to run
    scheduler.admit(urgent, 0.0)
    now, overdue = 0.0, []
    while (step := scheduler.next_step(now)).batch:
        overdue += step.overdue
        now += step.batch.seconds
        run(scheduler, step.batch, [0.9], now)
    assert urgent not in overdue


def test_an_image_without_a_deadline_waits_no_longer_than_it_must_beyond_capacity():
    scheduler, patient = unbent(base=1e-3, each=1e-3), job()
    scheduler.admit(patient, 0.0)
    now = 0.0
    while not patient.done:
        for _ in range(16):
            with contextlib.suppress(Refused):
                scheduler.admit(job(now, now + 0.03), now)
        batch = scheduler.next_step(now).batch
        assert len(set(batch.jobs)) == len(batch.jobs)
        now += batch.seconds
        run(scheduler, batch, [0.9] * len(batch.jobs), now)
    assert PATIENT_SECONDS < now < PATIENT_SECONDS + 0.02


def test_a_stage_that_looks_too_dear_is_known_by_audits():
    scheduler = make_scheduler()
    scheduler.costs.replace(2, {1: 1.0})
    for _ in range(300):
        one = job()
        scheduler.audit(one)
        batch = scheduler.next_step(1.0).batch
        assert batch.stage == 2
        scheduler.settle_audit(batch, 2e-3)
        while (deeper := scheduler.next_step(1.0).batch) is not None:
            scheduler.settle_audit(deeper, deeper.seconds)
    assert scheduler.costs.seconds(2, 1) < 0.1


def test_a_lone_image_that_computes_for_long_is_no_overload():
    scheduler = make_scheduler(base=2e-3, deadline=0.025)  # 9 ms to full depth
    for i in range(50):
        now = 0.1 * i
        scheduler.admit(job(now, now + 0.025), now)
        while (batch := scheduler.next_step(now).batch) is not None:
            now += batch.seconds
            run(scheduler, batch, [0.1], now)
        assert not scheduler.controller.bent


def test_of_several_that_would_be_late_one_is_saved_by_every_core():
    scheduler = with_teams(make_scheduler(workers=2))
    for _ in range(2):
        one = job(deadline=0.5)
        scheduler.admit(one, 0.0)
        one.deadline = 1e-3  # one thread takes 1.25 ms
    step = scheduler.next_step(0.0)
    assert step.batch.alone and len(step.overdue) == 1


def test_the_audited_job_that_another_takes_the_place_of_is_told():
    scheduler = make_scheduler()
    jobs = [job() for _ in range(MAX_AUDITS + 1)]
    assert [scheduler.audit(one) for one in jobs] == [None] * MAX_AUDITS + [jobs[0]]
    assert jobs[0].done and not jobs[1].done


@examples(
    100,
    1000,
    images=st.integers(1, 300),
    deadline=st.floats(0.002, 0.3),
    workers=st.sampled_from([1, 2]),
    said=st.sampled_from([0.1, 0.7, 0.95]),
)
def test_of_images_that_come_at_once_nobody_goes_deeper_at_the_cost_of_anothers_first_exit(
    images, deadline, workers, said
):
    scheduler = unbent(base=0.6e-3, each=0.4e-3, workers=workers)
    load = [Arrival(0.0, (said,) * STAGES, deadline)] * images
    outcomes = simulate(scheduler, load, RULE)
    assert all(outcome.exit or outcome.refused for outcome in outcomes)


def test_a_cancelled_job_leaves_its_queue_and_is_never_answered():
    scheduler = make_scheduler()
    waiting, running = job(), job()
    scheduler.admit(waiting, 0.0)
    scheduler.cancel(waiting)
    assert scheduler.next_step(0.0).batch is None
    scheduler.admit(running, 0.0)
    batch = scheduler.next_step(0.0).batch
    scheduler.cancel(running)
    assert run(scheduler, batch, [0.99], 0.01) == []
    assert scheduler.next_step(0.01).batch is None


def test_cancelling_a_done_job_is_a_no_op():
    scheduler = make_scheduler()
    one = job()
    scheduler.admit(one, 0.0)
    run(scheduler, scheduler.next_step(0.0).batch, [0.99], 0.01)
    scheduler.cancel(one)
    assert one.state is JobState.DONE


def overloaded_scheduler():
    scheduler = make_scheduler()
    scheduler.controller.update(100.0, now=0.0)
    return scheduler


def test_overload_answers_earlier_and_says_so():
    scheduler = overloaded_scheduler()
    one = job()
    scheduler.admit(one, 0.0)
    batch = scheduler.next_step(0.0).batch
    assert run(scheduler, batch, [0.3], 0.001) == [(one, Reason.OVERLOAD)]


def test_an_answer_that_needs_no_bending_is_not_called_overload():
    scheduler = overloaded_scheduler()
    one = job()
    scheduler.admit(one, 0.0)
    batch = scheduler.next_step(0.0).batch
    assert run(scheduler, batch, [0.9], 0.001) == [(one, Reason.CONFIDENT)]


def test_overload_respects_min_exit_and_requests_that_do_not_bend():
    scheduler = overloaded_scheduler()
    deep = job(rule=Rule(RULE.thresholds, 2, STAGES))
    stiff = Job(RULE, 0.0, bends=False)
    scheduler.admit(deep, 0.0)
    scheduler.admit(stiff, 0.0)
    assert run(scheduler, scheduler.next_step(0.0).batch, [0.3, 0.3], 0.001) == []


def test_audits_run_only_when_nothing_else_is_to_do():
    scheduler = make_scheduler()
    audited, live = job(), job()
    scheduler.admit(audited, 0.0)
    run(scheduler, scheduler.next_step(0.0).batch, [0.99], 0.001)
    scheduler.audit(audited)
    scheduler.admit(live, 0.001)
    batch = scheduler.next_step(0.001).batch
    assert (batch.jobs, batch.audit) == ((live,), False)
    run(scheduler, batch, [0.99], 0.002)
    assert scheduler.next_step(0.002).batch is None, "the next live job may come at once"
    quiet = 0.002 + scheduler.next_audit(0.002)
    assert quiet == pytest.approx(0.002 + QUIET_SECONDS)
    for stage in (2, 3, 4):
        batch = scheduler.next_step(quiet).batch
        assert (batch.jobs, batch.stage, batch.audit) == ((audited,), stage, True)
        assert scheduler.settle_audit(batch, batch.seconds) is None
        assert audited.done == (stage == STAGES)
    assert scheduler.next_step(quiet).batch is None
    assert scheduler.next_audit(quiet) == math.inf


def test_an_audited_job_that_waits_again_is_kept_in_place_of_the_oldest():
    scheduler, jobs = make_scheduler(), [job() for _ in range(MAX_AUDITS + 1)]
    scheduler.audit(jobs[0])
    batch = scheduler.next_step(1.0).batch
    assert batch.jobs == (jobs[0],)
    for one in jobs[1:]:
        assert scheduler.audit(one) is None
    assert scheduler.settle_audit(batch, batch.seconds) is jobs[1]
    assert jobs[1].done and not jobs[0].done


def test_a_job_without_a_deadline_does_not_starve_under_a_flood_of_better_batches():
    scheduler = make_scheduler(base=1e-4, each=1e-3)
    deep = job()
    scheduler.admit(deep, 0.0)
    run(scheduler, scheduler.next_step(0.0).batch, [0.1], 0.001)
    scheduler._leaving[1] = 0.9
    now = 0.001
    for _ in range(2000):
        while scheduler.queued()[0] < 8:
            scheduler.admit(job(arrived=now), now)
        batch = scheduler.next_step(now).batch
        now += batch.seconds
        if deep in batch.jobs:
            return
        run(scheduler, batch, [0.9] * len(batch.jobs), now)
    pytest.fail("the deep job was never run")


confidences = st.tuples(*[st.sampled_from([0.1, 0.6, 0.95])] * STAGES)
loads = st.lists(
    st.builds(
        Arrival,
        st.floats(0, 0.1),
        confidences,
        st.sampled_from([0.001, 0.004, 0.01, 0.05, math.inf]),
    ),
    max_size=60,
).map(lambda load: sorted(load, key=lambda a: a.time))


@examples(200, 1000, load=loads, max_batch=st.sampled_from([1, 3, 8]))
def test_every_job_is_settled_exactly_once_and_none_is_late(load, max_batch):
    outcomes = simulate(make_scheduler(max_batch=max_batch), load, RULE)
    assert sorted(id(o.arrival) for o in outcomes) == sorted(id(a) for a in load)
    for outcome in outcomes:
        if outcome.exit:
            assert outcome.seconds <= outcome.arrival.deadline_seconds + 1e-9
        if outcome.reason is Reason.CONFIDENT:
            assert outcome.arrival.confidences[outcome.exit - 1] >= 0.8
        if outcome.reason is Reason.FINAL:
            assert outcome.exit == STAGES


def test_with_a_free_worker_a_job_waits_for_no_running_batch():
    for workers, refused in ((1, True), (2, False)):
        scheduler = make_scheduler(workers=workers)
        scheduler.admit(job(), 0.0)
        batch = scheduler.next_step(0.0).batch
        tight = job(deadline=1.5 * batch.seconds)
        with pytest.raises(Refused) if refused else contextlib.nullcontext():
            scheduler.admit(tight, 0.0)


def test_workers_share_what_waits():
    one, two = make_scheduler(workers=1), make_scheduler(workers=2)
    for scheduler in (one, two):
        for _ in range(20):
            scheduler.admit(job(), 0.0)
    assert two.predicted_wait(0.0) == pytest.approx(one.predicted_wait(0.0) / 2)


@pytest.mark.parametrize(("http_seconds", "at_work"), [(0.0, 3), (1e-4, 3), (1e-2, 2)])
def test_the_last_worker_leaves_its_core_to_http_where_images_are_quick(http_seconds, at_work):
    template = make_scheduler(workers=3)
    scheduler = Scheduler(template.costs, template.controller, 8, 3, http_seconds)
    scheduler.next_step(0.0)
    assert (scheduler.workers, scheduler.most_workers) == (at_work, 3)


@pytest.mark.parametrize(
    ("http_seconds", "late_at", "at_work"),
    [(1e-4, 0.02, 1), (1e-4, -math.inf, 2), (0.0, 0.02, 2)],
)
def test_the_last_worker_leaves_its_core_to_an_event_loop_that_is_late(
    http_seconds, late_at, at_work
):
    template = make_scheduler()
    scheduler = Scheduler(template.costs, template.controller, 8, 2, http_seconds)
    scheduler.admit(Job(RULE, 0.0, late_at=late_at), 0.02)
    scheduler.next_step(0.02)
    assert scheduler.workers == at_work
    scheduler.count_workers(0.03 + LEFT_SECONDS)
    assert scheduler.workers == 2
    scheduler.admit(Job(RULE, 0.0, late_at=late_at), 2.0)  # it waited for a place since
    scheduler.next_step(2.0)
    assert scheduler.workers == 2


def test_a_worker_that_is_no_longer_wanted_is_waited_for():
    template = make_scheduler()
    scheduler = Scheduler(template.costs, template.controller, 1, 2, 1e-6)
    for _ in range(2):
        scheduler.admit(job(), 0.0)
        ends = scheduler.next_step(0.0).batch.seconds
    for stage in range(1, STAGES + 1):
        scheduler.costs.replace(stage, {1: 1e-9})
    scheduler.next_step(0.0)
    assert scheduler.workers == 1
    with pytest.raises(Refused):
        scheduler.admit(job(deadline=0.9 * ends), 0.0)


@pytest.mark.parametrize(
    ("waiting", "places", "bent"), [(6, 10, False), (9, 10, True), (1, 1, False)]
)
def test_answers_bend_before_the_last_place_is_taken(waiting, places, bent):
    template = make_scheduler(deadline=60.0)
    scheduler = Scheduler(template.costs, template.controller, 8, places=places)
    for _ in range(waiting):
        scheduler.admit(job(), 0.0)
    scheduler.next_step(0.0)
    assert scheduler.controller.bent == bent


def test_another_worker_is_called_for_while_jobs_wait_and_one_is_free():
    scheduler = make_scheduler(max_batch=4, workers=2)
    for _ in range(12):
        scheduler.admit(job(), 0.0)
    batch = scheduler.next_step(0.0).batch
    assert scheduler.calls_for_another_worker
    scheduler.next_step(0.0)
    assert not scheduler.calls_for_another_worker, "both are busy"
    run(scheduler, batch, [0.9] * 4, 0.01)
    assert scheduler.calls_for_another_worker


class AnyHistory(RuleBasedStateMachine):
    """Admissions, cancellations, runs and failures in any order, some of them while others run."""

    WORKERS = 3

    def __init__(self):
        super().__init__()
        self.scheduler, self.now = make_scheduler(max_batch=4, workers=self.WORKERS), 0.0
        self.live, self.settled, self.running = [], [], []

    @rule(seconds=st.sampled_from([0.0001, 0.002, 0.01, math.inf]))
    def admit(self, seconds):
        one = job(self.now, self.now + seconds)
        with contextlib.suppress(Refused, TooLate):
            self.scheduler.admit(one, self.now)
            self.live.append(one)

    @rule()
    def wait(self):
        self.now += PROBE_SECONDS

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data):
        one = data.draw(st.sampled_from(self.live))
        self.scheduler.cancel(one)
        if one not in self.settled:
            self.live.remove(one)

    def step(self):
        step = self.scheduler.next_step(self.now)
        self.settled += step.overdue
        self.now += step.batch.seconds if step.batch else 0.0
        return step.batch

    @rule(said=st.lists(st.sampled_from([0.1, 0.9]), min_size=4, max_size=4))
    def run(self, said):
        if batch := self.step():
            answered = run(self.scheduler, batch, said[: len(batch.jobs)], self.now)
            self.settled += [one for one, _ in answered]

    @precondition(lambda self: len(self.running) < self.WORKERS - 1)
    @rule()
    def start(self):
        if batch := self.step():
            self.running.append(batch)

    @precondition(lambda self: self.running)
    @rule(said=st.sampled_from([0.1, 0.9]), data=st.data())
    def end(self, said, data):
        batch = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        answered = run(self.scheduler, batch, [said] * len(batch.jobs), self.now)
        self.settled += [one for one, _ in answered]

    @rule()
    def fail(self):
        if batch := self.step():
            for one in batch.jobs:
                self.scheduler.abandon(one)
            self.settled += batch.jobs

    def teardown(self):
        for batch in self.running:
            answered = run(self.scheduler, batch, [1.0] * len(batch.jobs), self.now)
            self.settled += [one for one, _ in answered]
        while any(self.scheduler.queued()):
            self.run([1.0] * 4)
        assert len(self.settled) == len(set(self.settled)), "a job was answered twice"
        assert set(self.live) == set(self.settled), "a job was lost"


@pytest.mark.parametrize("count", [100, pytest.param(300, marks=pytest.mark.slow)])
def test_no_history_loses_a_job(count):
    run_state_machine_as_test(AnyHistory, settings=settings(max_examples=count, deadline=None))
