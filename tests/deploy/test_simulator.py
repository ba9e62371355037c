"""The laws of the simulated event loop; the scheduler has its own."""

import itertools
import math
from collections import Counter

import pytest
from hypothesis import strategies as st

from deploy.simulator import Arrival, Overhead, simulate
from model.policy import Reason, Rule
from server.arrival import NOT_BEHIND_SECONDS, TIMES_BEHIND
from server.costs import CostTable
from server.gate import EACH_TURN
from server.overload import Level, OverloadController
from server.scheduler import Scheduler
from tests.examples import examples

STAGE_SECONDS = 0.001
RULE = Rule((0.8, 0.0), 1, 2)
SURE, UNSURE = (0.9, 0.9), (0.1, 0.5)


def make_scheduler(stage_seconds=STAGE_SECONDS, workers=1, deadline=0.05, http_seconds=0.0):
    costs = {k: {1: stage_seconds, 8: 4 * stage_seconds} for k in (1, 2)}
    ladder = [Level(0.01, (0.8,)), Level(1.0, (0.0,))]
    return Scheduler(
        CostTable(costs), OverloadController(ladder, deadline), 8, workers, http_seconds
    )


def outcomes(load, stage_seconds=STAGE_SECONDS, **overhead):
    """Of each arrival, in order of arrival."""
    scheduler = make_scheduler(stage_seconds)
    settled = simulate(scheduler, load, RULE, overhead=Overhead(**overhead))
    by_arrival = {id(o.arrival): o for o in settled}
    assert len(by_arrival) == len(settled) == len(load)
    return [by_arrival[id(arrival)] for arrival in load]


def at_once(count, deadline=math.inf):
    return [Arrival(0.0, SURE, deadline) for _ in range(count)]


def evenly(rate, seconds=1.0, deadline=0.05):
    return [Arrival(i / rate, SURE, deadline) for i in range(int(rate * seconds))]


def goodput(load, stage_seconds=STAGE_SECONDS, **overhead):
    return sum(o.in_time for o in outcomes(load, stage_seconds, **overhead))


def test_a_lone_request_takes_its_stages_and_what_its_way_costs():
    for confidences, stages in ((SURE, 1), (UNSURE, 2)):
        load = [Arrival(0.0, confidences)]
        (only,) = outcomes(load)
        assert only.seconds == pytest.approx(stages * STAGE_SECONDS)
        (only,) = outcomes(
            load, begin_seconds=0.01, answer_seconds=0.02, batch_seconds=0.04, client_seconds=0.3
        )
        between = 0.04 * (stages - 1)
        # The lock is shared while the engine tidies up after the last batch.
        assert only.seconds - 0.33 - stages * STAGE_SECONDS - between == pytest.approx(0.02)


def test_a_lone_request_has_every_core():
    scheduler = make_scheduler()
    for stage in (1, 2):
        scheduler.costs.use_team(stage, 0.5)
    load = [Arrival(0.0, UNSURE), Arrival(1.0, UNSURE), Arrival(1.0, UNSURE)]
    settled = {id(o.arrival): o.seconds for o in simulate(scheduler, load, RULE)}
    lone, *two = (settled[id(arrival)] for arrival in load)
    assert lone == pytest.approx(2 * 0.5 * STAGE_SECONDS)
    assert min(two) > lone


def test_a_turn_reads_what_has_come_and_begins_one_after_another():
    first, second, third = outcomes(at_once(3), begin_seconds=0.01)
    assert [o.seconds for o in (first, second)] == pytest.approx([0.03, 0.03]), "sent together"
    assert third.seconds >= 0.03


def test_a_request_that_comes_during_a_turn_is_seen_at_the_next():
    begin = 0.01
    first_turn, second_turn = begin, EACH_TURN * begin
    load = [*at_once(1 + EACH_TURN), Arrival(1.5 * first_turn, SURE, 0.04)]
    *_, waited = outcomes(load, begin_seconds=begin)
    assert waited.exit == 1, "its long wait to be read is not seen, so it is not refused"
    assert waited.finished > first_turn + second_turn + begin


def test_so_many_requests_begin_a_turn_and_answers_do_not_wait_for_the_others():
    begin = 0.01
    seen = outcomes(at_once(1 + 9 * EACH_TURN), 1e-9, begin_seconds=begin)
    turns = Counter(round((o.finished - begin) / (EACH_TURN * begin)) for o in seen)
    assert len(turns) >= 6, "the first are answered long before the last have begun"


def test_a_request_that_is_begun_too_late_is_refused_at_what_that_costs():
    deadline, begin, refuse = 0.05, 0.001, 0.0001
    seen = outcomes(at_once(40, deadline), 1e-9, begin_seconds=begin, refuse_seconds=refuse)
    first = 1  # has a turn of its own
    begun = sum(not o.refused for o in seen)
    assert begun == first + math.floor(deadline / TIMES_BEHIND / begin) + 1
    end = begun * begin + (40 - begun) * refuse
    refused = [o.finished for o in seen if o.refused]
    assert max(refused) == pytest.approx(end)
    assert min(refused) < end - refuse, "those of a turn are sent at its end"


def test_a_loop_that_is_hardly_behind_refuses_nobody_however_short_the_deadline():
    seen = outcomes(at_once(5, 0.004), begin_seconds=NOT_BEHIND_SECONDS / 8)
    assert not any(o.refused for o in seen)


def test_the_deadline_is_shortened_by_what_is_kept_back_or_by_what_the_loop_is_behind():
    alone = [Arrival(0.0, SURE, 0.003)]
    assert outcomes(alone, reserve_seconds=0.0015)[0].exit == 1
    assert outcomes(alone, reserve_seconds=0.0025)[0].exit == 0
    begin = NOT_BEHIND_SECONDS  # the third is read after so long, and is then so far behind
    enough = 2 * begin + STAGE_SECONDS + begin
    for deadline, exit in ((enough + 2e-4, 1), (enough - 2e-4, 0)):
        load = [*at_once(2), Arrival(0.0, SURE, deadline)]
        assert outcomes(load, begin_seconds=begin)[2].exit == exit


def test_clients_on_the_same_core_take_from_the_server():
    load = evenly(600)
    own = {"begin_seconds": 0.0005, "answer_seconds": 0.0003, "refuse_seconds": 0.0001}
    alone = goodput(load, **own, cores=1)
    beside = goodput(load, **own, cores=1, client_seconds=0.0008)
    elsewhere = goodput(load, **own, cores=2, client_seconds=0.0008)
    assert beside < alone
    assert beside < elsewhere


OVERLOAD = 4000
MILLISECONDS = (0.05, 0.1, 0.2, 0.4, 0.8)


@pytest.mark.slow
@pytest.mark.parametrize("cost", ["begin_seconds", "answer_seconds", "refuse_seconds"])
def test_where_the_loop_is_what_is_full_more_cost_never_gives_more(cost):
    usual = {"begin_seconds": 3e-4, "answer_seconds": 1e-4, "refuse_seconds": 5e-5}
    load, quick = evenly(OVERLOAD, 0.5), STAGE_SECONDS / 10
    gained = [goodput(load, quick, **{**usual, cost: ms / 1e3}) for ms in MILLISECONDS]
    for before, after in itertools.pairwise(gained):
        assert after <= before
    assert gained[-1] < 0.9 * gained[0]


@pytest.mark.slow
def test_refusing_what_is_late_keeps_a_loop_going_that_would_else_answer_all_late():
    own = {"begin_seconds": 5e-4, "answer_seconds": 3e-4}
    load = evenly(OVERLOAD)
    assert goodput(load, **own, refuse_seconds=1e-4) > 0.5 / 8e-4
    unhurried = [Arrival(a.time, SURE, 10.0) for a in load]  # whom nothing is refused
    answered = outcomes(unhurried, **own, refuse_seconds=1e-4)
    assert sum(o.seconds <= 0.05 for o in answered) < 0.1 * len(load)


costs = st.sampled_from([0.0, 1e-5, 2e-4, 3e-3])
loads = st.lists(
    st.builds(
        Arrival,
        st.floats(0, 0.05),
        st.sampled_from([SURE, UNSURE]),
        st.sampled_from([0.001, 0.004, 0.01, 0.05, math.inf]),
    ),
    max_size=40,
).map(lambda load: sorted(load, key=lambda a: a.time))


@examples(
    100,
    1000,
    load=loads,
    overhead=st.builds(
        Overhead, costs, costs, costs, costs, costs, costs, st.sampled_from([1, 2, math.inf])
    ),
    workers=st.sampled_from([1, 3]),
    http_seconds=st.sampled_from([0.0, 0.0005, 1.0]),
)
def test_no_job_is_lost_or_answered_twice_or_before_it_could_be(
    load, overhead, workers, http_seconds
):
    def settle():
        scheduler = make_scheduler(workers=workers, http_seconds=http_seconds)
        return simulate(scheduler, load, RULE, overhead=overhead)

    settled = settle()
    assert Counter(id(o.arrival) for o in settled) == Counter(map(id, load))
    for outcome in settled:
        least = overhead.client_seconds
        if outcome.refused and not outcome.exit:
            least += min(overhead.refuse_seconds, overhead.begin_seconds)
        if outcome.exit:
            least += overhead.begin_seconds + outcome.exit * STAGE_SECONDS
            least += overhead.answer_seconds
        assert outcome.seconds >= least - 1e-9
        assert (outcome.reason is None) == (outcome.exit == 0)
    assert settle() == settled


@pytest.mark.parametrize(("workers", "second"), [(1, 4 * STAGE_SECONDS), (2, 2 * STAGE_SECONDS)])
def test_workers_run_batches_at_the_same_time(workers, second):
    apart = [Arrival(0.0, UNSURE), Arrival(1e-9, UNSURE)]  # too far for one batch
    settled = simulate(make_scheduler(workers=workers), apart, RULE)
    assert [o.finished for o in settled] == pytest.approx([2 * STAGE_SECONDS, second])


@pytest.mark.parametrize(("http_seconds", "last"), [(1e-4, 0.004), (1.0, 0.005)])
def test_the_last_worker_sleeps_while_the_event_loop_is_late_and_not_beyond(http_seconds, last):
    crowd = at_once(32, 0.1)
    pair = [Arrival(1.0, UNSURE, 0.1), Arrival(1.0 + 1e-9, UNSURE, 0.1)]
    scheduler, numbers = make_scheduler(workers=2, http_seconds=http_seconds), []
    choose = scheduler.next_step

    def next_step(now):
        step = choose(now)
        numbers.append(scheduler.workers)
        return step

    scheduler.next_step = next_step
    settled = simulate(scheduler, [*crowd, *pair], RULE, Overhead(begin_seconds=0.001))
    assert 1 in numbers
    assert settled[-1].finished == pytest.approx(1.0 + last)


def test_without_overhead_only_the_scheduler_decides():
    seen = outcomes(at_once(16, 0.0045))
    assert 0 < sum(o.exit == 1 for o in seen) <= 8
    assert all(o.refused for o in seen if not o.exit)
    assert {o.reason for o in seen if o.exit} == {Reason.CONFIDENT}
