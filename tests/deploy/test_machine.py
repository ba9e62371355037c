"""Imagined threads share cores and a lock as real ones do."""

import math
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.machine import Machine, Needs, Work


def ends(machine, *pieces):
    """When threads with one piece of work each are done with it."""
    done = {}

    def thread(name, work):
        yield work
        done[name] = machine.now

    machine.run(*(thread(i, work) for i, work in enumerate(pieces)))
    return [done[i] for i in range(len(pieces))]


def core(seconds):
    return Work(Needs.CORE, seconds)


@pytest.mark.parametrize(("cores", "expected"), [(1, 3.0), (2, 1.5), (3, 1.0), (math.inf, 1.0)])
def test_threads_that_want_more_cores_than_there_are_share_them_evenly(cores, expected):
    assert ends(Machine(cores), core(1), core(1), core(1)) == pytest.approx([expected] * 3)


def test_what_is_left_goes_on_faster_when_another_thread_is_done():
    assert ends(Machine(1), core(1), core(3)) == pytest.approx([2.0, 4.0])


def test_no_thread_has_more_than_one_core():
    assert ends(Machine(8), core(1)) == [1.0]


def test_threads_that_need_the_lock_are_together_as_fast_as_one():
    locked = Work(Needs.LOCK, 1.0)
    assert ends(Machine(8), locked, locked) == pytest.approx([2.0, 2.0])


def test_the_lock_takes_one_core_however_many_want_it():
    locked = Work(Needs.LOCK, 1.0)
    assert ends(Machine(2), locked, locked, core(2)) == pytest.approx([2.0, 2.0, 2.0])


def test_a_device_fills_a_core_at_its_own_pace():
    assert ends(Machine(1), Work(Needs.DEVICE, 1.0), core(1)) == pytest.approx([1.0, 1.5])


def test_waiting_takes_no_core():
    assert ends(Machine(1), Work(Needs.TIME, 1.0), core(1)) == pytest.approx([1.0, 1.0])


def test_a_thread_waits_until_its_queue_has_something():
    machine, queue, seen = Machine(), deque(), []

    def giver():
        yield core(2)
        queue.append("it")

    def taker():
        yield queue
        seen.append((machine.now, queue.popleft()))
        yield queue
        seen.append("what nobody brought")

    machine.run(taker(), giver())
    assert seen == [(2.0, "it")]


works = st.builds(Work, st.sampled_from([Needs.CORE, Needs.LOCK]), st.floats(0, 1))


@given(pieces=st.lists(works, min_size=1, max_size=6), cores=st.sampled_from([1, 2, 4]))
def test_no_more_is_done_than_the_cores_can_and_none_idles_while_work_is_left(pieces, cores):
    finished = ends(Machine(cores), *pieces)
    total = sum(work.seconds for work in pieces)
    assert total / cores <= max(finished) + 1e-9
    assert max(finished) <= total + 1e-9
    if cores == 1:
        assert max(finished) == pytest.approx(total)
