import random

import pytest

from deploy.loadtest.schedules import poisson
from deploy.simulator import Arrival, simulate
from model.policy import NEVER, Rule
from server.costs import CostTable
from server.loaded import ladder
from server.overload import RECOVERY_SECONDS, Level, OverloadController
from server.scheduler import Scheduler
from server.served import Served
from server.settings import Settings

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


def test_answers_are_as_shallow_as_they_get_while_what_waits_can_still_be_in_time(controller):
    losses = [controller.update(wait, now=0.0).max_accuracy_loss for wait in (0.31, 0.4, 0.45)]
    assert losses == [0.02, 0.05, 1.0]


def test_answers_bend_before_the_last_place_is_taken(controller):
    said = [controller.update(0.1, 0.0, share).max_accuracy_loss for share in (0.6, 0.65, 0.9)]
    assert said == [0.01, 0.02, 1.0]


def test_images_that_meet_by_chance_bend_nothing_under_a_load_that_is_borne(controller):
    controller.saw_answers(1, 0.1)
    for i in range(10):  # a quarter of what it bears
        controller.saw_arrival(0.4 * i)
        assert controller.update(0.45, now=0.4 * i) is LADDER[0]
    assert controller.update(0.55, now=4.0) is LADDER[-1], "some of it would be late"
    for i in range(100):
        controller.saw_arrival(4.0 + 0.01 * i)
    assert controller.update(0.45, now=5.0) is not LADDER[0]


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
    controller.update(0.05, now=0.0)
    assert not controller.bent
    for _ in range(200):
        controller.saw_deadline(0.05)
    controller.update(0.05, now=0.0)
    assert controller.bent


def test_a_few_requests_that_allow_an_hour_or_nothing_change_the_usual_deadline_little(controller):
    usual = controller.calm_seconds
    for far in (3600.0, 1e-6):
        for i in range(1000):
            controller.saw_deadline(far if i % 20 == 0 else DEADLINE)
            assert 0.9 * usual < controller.calm_seconds < 1.1 * usual


def test_a_point_put_in_force_amid_warm_up_is_that_of_the_ladder(bundle_path):
    served = Served(Settings(bundle=bundle_path, device="cpu", threads=1, max_batch=1))
    served.loaded._use_programs = lambda *handing_over: served.use(0.05)
    served.warm_up()
    served.engine.prepare(lambda: None)  # it has taken what was sent before
    level = served.engine.scheduler.controller.level
    served.close()
    assert (level.max_accuracy_loss, served.loaded.point.max_accuracy_loss) == (0.05, 0.05)


def test_metrics_tell_what_is_in_force_before_the_server_is_ready(bundle_path):
    served = Served(Settings(bundle=bundle_path, device="cpu", threads=1, max_batch=1))

    def said():
        value = served.metrics.registry.get_sample_value
        model = {"model": served.loaded.bundle.description.name}
        threshold = value("offramp_policy_threshold", model | {"exit": "1"})
        return value("offramp_operating_point", model), threshold

    assert said() == (0.01, served.loaded.policy.point_for(0.01).thresholds[0])
    served.use(0.05)
    assert said() == (0.05, served.loaded.policy.point_for(0.05).thresholds[0])
    served.close()


def test_a_ladder_of_one_level_never_bends():
    controller = OverloadController(LADDER[:1], DEADLINE)
    assert controller.update(100.0, now=0.0) is LADDER[0]
    assert controller.update(0.0, now=1.0) is LADDER[0]


def arrive(controller, rate, start, end, wait):
    """Look at every arrival of a steady load; the levels seen."""
    seen = []
    for i in range(int(rate * (end - start))):
        now = start + i / rate
        controller.saw_arrival(now)
        seen.append(controller.update(wait(controller), now))
        controller.saw_answers(1, 0.002 if controller.level is LADDER[0] else 0.0005)
    return seen


def short_when_bent(controller):
    return 0.0 if controller.bent else 0.6


def test_a_level_that_cannot_bear_the_load_is_not_gone_back_to(controller):
    arrive(controller, 400, 0.0, 2.0, lambda _: 0.0)
    seen = arrive(controller, 1000, 2.0, 12.0, short_when_bent)
    assert LADDER[0] not in seen[1000:]


def test_what_is_known_of_a_level_fades_so_that_it_is_tried_again(controller):
    arrive(controller, 400, 0.0, 2.0, lambda _: 0.0)
    seen = arrive(controller, 1000, 2.0, 62.0, short_when_bent)
    assert LADDER[0] in seen[10_000:]


def test_full_depth_is_back_within_a_second_of_the_fall_to_a_load_it_bears(controller):
    arrive(controller, 400, 0.0, 2.0, lambda _: 0.0)
    arrive(controller, 1500, 2.0, 4.0, short_when_bent)
    assert controller.bent
    arrive(controller, 400, 4.0, 5.0, lambda _: 0.0)
    assert not controller.bent


class Watched(OverloadController):
    """Notes when it moves, and where to."""

    def __init__(self, ladder, deadline):
        super().__init__(ladder, deadline)
        self.moves = []

    def update(self, predicted_wait_seconds, now, places_taken=0.0):
        before, level = self.level, super().update(predicted_wait_seconds, now, places_taken)
        if level is not before:
            self.moves.append((now, level))
        return level


STAGES, MAX_BATCH, ALLOWED = 4, 8, 0.05
COSTS = {k: {n: 1e-3 + 0.25e-3 * n for n in (1, 2, 4, 8)} for k in range(1, STAGES + 1)}
FULL_DEPTH = MAX_BATCH / sum(row[MAX_BATCH] for row in COSTS.values())
STEPS = [Level(0.01, (0.9, 0.9, 0.9)), Level(0.05, (0.5, 0.5, 0.5)), Level(1.0, (0.0, 0.0, 0.0))]


def watch(times):
    """The moves under a load of images of which a fifth is easy and a fifth hard."""
    controller, chance = Watched(STEPS, ALLOWED), random.Random(0)
    seen = [(0.95,) * STAGES, *[(0.6, 0.6, 0.7, 0.8)] * 3, (0.1, 0.2, 0.6, 0.7)]
    load = [Arrival(at, chance.choice(seen), ALLOWED) for at in times]
    rule = Rule((*STEPS[0].thresholds, 0.0), 1, STAGES)
    simulate(Scheduler(CostTable(COSTS), controller, MAX_BATCH), load, rule)
    return controller.moves


@pytest.mark.slow
@pytest.mark.parametrize("load", [1.2, 1.5, 2.0])
def test_a_steady_overload_settles_at_a_level(load):
    moves = watch(poisson(load * FULL_DEPTH, 9.0))
    assert moves, "the load is none"
    assert sum(at > 3.0 for at, _ in moves) <= 6, "more than one move a second"


@pytest.mark.parametrize("load", [1.5, 3.0])
def test_full_depth_is_back_within_a_second_of_the_end_of_a_simulated_burst(load):
    burst = poisson(load * FULL_DEPTH, 3.0)
    moves = watch([*burst, *(3.0 + at for at in poisson(0.5 * FULL_DEPTH, 3.0))])
    assert moves[-1][1] is STEPS[0]
    assert moves[-1][0] <= 4.0


def test_overload_moves_to_cheaper_levels_alone(bundle):
    policy = bundle.policy
    full = policy.operating_points[1].model_copy(
        update={"max_accuracy_loss": 0.02, "mean_macs": 1.0, "thresholds": (NEVER,) * 3}
    )
    first, *others = policy.operating_points
    points = sorted((first, full, *others), key=lambda p: p.max_accuracy_loss)
    policy = policy.model_copy(update={"operating_points": tuple(points)})
    levels = ladder(policy, first, Settings())
    assert [level.max_accuracy_loss for level in levels] == [0.0, 0.01, 0.05, 1.0]
