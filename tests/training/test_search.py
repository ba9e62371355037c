"""The search finds the cheapest thresholds for what they lose, nested from careful to bold."""

import itertools

import numpy as np
import pytest

from model.policy import NEVER
from tests.training.worlds import judged
from training.outcomes import Outcomes, shares
from training.search import budgeted_path, expected_loss, fill, nested_path

COSTS = np.array([0.3, 0.5, 0.75, 1.0])


@pytest.fixture(scope="module")
def outcomes():
    return judged(1500)


@pytest.fixture(scope="module")
def path(outcomes):
    return nested_path(outcomes, COSTS)


def spent_and_lost(outcomes, path, costs=COSTS):
    loss = expected_loss(outcomes)
    taken = [outcomes.taken(t) for t in path]
    everyone = np.arange(len(outcomes))
    return np.array([[costs[t - 1].mean(), loss[everyone, t - 1].mean()] for t in taken]).T


@pytest.mark.slow
@pytest.mark.parametrize("exits", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_no_image_leaves_later_further_down_a_path(seed, exits):
    outcomes = judged(100, seed, exits=exits)
    path = fill(nested_path(outcomes, COSTS[-exits:]), outcomes.confidence)
    assert path[0] == (NEVER,) * (exits - 1)
    assert (np.diff(path, axis=0) <= 0).all()
    taken = np.array([outcomes.taken(t) for t in path])
    assert (np.diff(taken, axis=0) <= 0).all()


def test_a_path_goes_from_the_full_network_to_the_cheapest_exit(outcomes, path):
    cost, loss = spent_and_lost(outcomes, path)
    assert (cost[0], loss[0]) == (1.0, 0.0)
    assert cost[-1] < 0.4
    assert (np.diff(cost) <= 0).all()


def brute_force(outcomes, costs, price):
    """The least mean cost + price * loss over every threshold vector that differs."""
    values = costs + price * expected_loss(outcomes)
    levels = [sorted({*outcomes.confidence[:, k], NEVER}) for k in range(outcomes.exits - 1)]
    everyone = np.arange(len(outcomes))
    vectors = itertools.product(*levels)
    return min(values[everyone, outcomes.taken(v) - 1].mean() for v in vectors)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_search_comes_within_three_percent_of_brute_force(seed):
    outcomes, costs = judged(16, seed, exits=4), COSTS
    path = nested_path(outcomes, costs)
    cost, loss = spent_and_lost(outcomes, path, costs)
    for price in (0.5, 2, 8, 32):
        assert (cost + price * loss).min() <= 1.03 * brute_force(outcomes, costs, price)


def test_thresholds_of_each_exit_beat_one_shared_by_all(outcomes, path):
    shared = [(t,) * 3 for t in np.linspace(1, 0, 200)]
    cost, loss = spent_and_lost(outcomes, path)
    shared_cost, shared_loss = spent_and_lost(outcomes, shared)
    for allowed in (0.005, 0.01, 0.02):
        assert cost[loss <= allowed].min() < shared_cost[shared_loss <= allowed].min()


def test_filling_a_path_keeps_its_steps_and_makes_them_small(outcomes, path):
    filled = fill(path, outcomes.confidence)
    assert set(path) <= set(filled)
    gap = max(np.diff(spent_and_lost(outcomes, path)[0], prepend=1.0), key=abs)
    filled_gap = max(np.diff(spent_and_lost(outcomes, filled)[0], prepend=1.0), key=abs)
    assert abs(filled_gap) < abs(gap)


@pytest.mark.slow
@pytest.mark.parametrize("exits", [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3)), 4])
def test_a_filled_path_lets_few_images_leave_early_before_it_lets_more(exits):
    outcomes = judged(1500, exits=exits)
    path = fill(nested_path(outcomes, COSTS[-exits:]), outcomes.confidence)
    early = np.array([(outcomes.taken(step) < exits).mean() for step in path])
    assert 0 < early[1] < 0.02
    assert np.diff(early[early < 0.3]).max() < 0.02


def test_a_single_exit_has_nothing_to_search():
    outcomes = judged(100, exits=1)
    assert fill(nested_path(outcomes, COSTS[-1:]), outcomes.confidence) == [()]


@pytest.mark.slow
def test_the_search_saves_what_it_is_told_costs(outcomes):
    """Where exit 2 costs as much as the whole network, nothing leaves there before it must."""
    dear = np.array([0.3, 1.0, 1.0, 1.0])
    taken = outcomes.taken(nested_path(outcomes, dear)[200])
    assert shares(taken, 4)[1] < shares(outcomes.taken(nested_path(outcomes, COSTS)[200]), 4)[1]


def test_the_budgeted_curve_sends_the_planned_share_to_each_exit(outcomes):
    middle = budgeted_path(outcomes)[19:21]  # q just under and just over 1: about equal shares
    for thresholds in middle:
        assert shares(outcomes.taken(thresholds), 4) == pytest.approx([0.25] * 4, abs=0.06)


def test_images_that_are_all_alike_leave_together():
    alike = np.full((30, 3), 0.5)
    right = np.ones((30, 3), bool)
    outcomes = Outcomes(alike, np.zeros((30, 3), int), right, np.ones((30, 3)))
    path = nested_path(outcomes, COSTS[1:])
    assert shares(outcomes.taken(path[-1]), 3).tolist() == [1, 0, 0]
