"""When several processes leave together."""

import signal
from dataclasses import dataclass, field

import torch

from training.distributed import Processes
from training.interrupt import ASK_SECONDS, Leaving, Request


@dataclass(frozen=True, slots=True)
class Pair(Processes):
    """One of two processes, the other of which is signalled after some steps and as fast."""

    signalled: list[bool] = field(default_factory=list)

    def sum(self, values):
        other = values.clone()
        other[0] = float(self.signalled[0])
        return values + other


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def leaving(request=None, begun=0):
    clock, pair = Clock(), Pair(torch.device("cpu"), count=2, signalled=[False])
    return Leaving(request or Request(), pair, begun, clock), clock, pair


def steps_asked(one, clock, steps, seconds_a_step):
    """After which steps the processes speak to each other."""
    asked = []
    for step in steps:
        clock.now += seconds_a_step
        before = one.asked_at
        one.now(step)
        if one.asked_at != before:
            asked.append(step)
    return asked


def test_processes_ask_each_other_every_two_seconds():
    one, clock, _ = leaving()
    assert steps_asked(one, clock, range(1, 600), 1 / 64) == [1, 129, 257, 385, 513]


def test_steps_longer_than_that_are_all_asked_after():
    one, clock, _ = leaving(begun=70)
    assert steps_asked(one, clock, range(71, 76), 10.0) == [71, 72, 73, 74, 75]


def test_processes_that_slow_down_ask_sooner_again():
    one, clock, _ = leaving()
    steps_asked(one, clock, range(1, 130), 1 / 64)
    assert steps_asked(one, clock, range(130, 300), 1 / 8) == [257, 273, 289]


def test_processes_ask_when_they_have_waited_for_each_other_anyway():
    one, clock, pair = leaving()
    steps_asked(one, clock, range(1, 10), 1 / 64)
    clock.now += 60.0  # of validation
    pair.signalled[0] = True
    assert not one.now(10) and one.now(10, waited=True)


def test_a_signal_to_another_process_is_heard_when_it_is_asked():
    one, clock, pair = leaving()
    clock.now += 1.0
    assert not one.now(1)
    pair.signalled[0] = True
    left = []
    for step in range(2, 10):
        clock.now += 1.0
        if one.now(step):
            left.append(clock.now)
            break
    assert left and left[0] - 1.0 <= ASK_SECONDS


def test_one_process_leaves_after_the_step_in_which_it_was_told():
    request = Request()
    alone = Leaving(request, Processes(torch.device("cpu")))
    assert not alone.now(1)
    request.signal = signal.SIGTERM
    assert alone.now(2)
