import pytest

from server.overload import RECOVERY_SECONDS, Level, OverloadController

LADDER = [Level(0.01, (0.9,)), Level(0.02, (0.7,)), Level(0.05, (0.5,)), Level(1.0, (0.0,))]
DEADLINE = 1.0


@pytest.fixture
def controller():
    return OverloadController(LADDER, DEADLINE)


def test_peace_is_kept_while_the_wait_is_short(controller):
    assert controller.update(0.2, now=0.0) is LADDER[0]
    assert not controller.bent


def test_answers_bend_further_the_longer_the_wait(controller):
    losses = [controller.update(wait, now=0.0).max_accuracy_loss for wait in (0.2, 0.4, 0.7, 0.99)]
    assert losses == sorted(losses)
    assert losses[0] == 0.01
    assert losses[-1] == 1.0


def test_overload_is_answered_at_once(controller):
    assert controller.update(5.0, now=0.0) is LADDER[-1]


def test_full_depth_is_back_within_a_second_of_the_end_of_a_burst(controller):
    controller.update(5.0, now=0.0)
    now = 0.0
    while controller.bent:
        now += 0.01
        controller.update(0.0, now)
    assert now <= min(1.0, RECOVERY_SECONDS + 0.05)


def test_a_long_idle_spell_ends_overload_at_the_first_look(controller):
    controller.update(5.0, now=0.0)
    assert controller.update(0.0, now=60.0) is LADDER[0]


def test_a_short_calm_does_not_end_overload(controller):
    controller.update(5.0, now=0.0)
    controller.update(0.0, now=0.01)
    assert controller.level is LADDER[-1]


def test_the_budget_follows_the_deadlines_that_requests_have(controller):
    assert not OverloadController(LADDER, DEADLINE).update(0.05, now=0.0) is not LADDER[0]
    for _ in range(200):
        controller.saw_deadline(0.05)
    controller.update(0.05, now=0.0)
    assert controller.bent


def test_a_ladder_of_one_level_never_bends():
    controller = OverloadController(LADDER[:1], DEADLINE)
    assert controller.update(100.0, now=0.0) is LADDER[0]
    assert controller.update(0.0, now=1.0) is LADDER[0]
