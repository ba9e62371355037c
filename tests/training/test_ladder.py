"""Over many calibration sets, at most delta of the certified points lose more than they may."""

import functools

import numpy as np
import pytest

from model.policy import NEVER
from tests.training.worlds import judged
from training import ladder as ladders
from training import risk
from training.ladder import LOSSES, Certifier, Method, images_needed, ladder, uncertifiable
from training.outcomes import Outcomes
from training.search import fill, nested_path
from training.start import first_steps
from training.tally import tally

DELTA = 0.1
SETS = 1000
TOLERANCE = 3 * (DELTA * (1 - DELTA) / SETS) ** 0.5
MACS = np.array([0.3, 0.5, 0.75, 1.0])


@pytest.fixture(scope="module", autouse=True)
def _remember_p_values():
    """Thousands of calibration sets have few different counts."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("paired_p_value", "binomial_p_value", "hoeffding_bentkus_p_value"):
            patch.setattr(risk, name, functools.cache(getattr(risk, name)))
        yield


@pytest.fixture(scope="module")
def population():
    """Every image there is, so that what a policy really loses is known exactly."""
    return judged(20_000, seed=1)


@pytest.fixture(scope="module")
def path(population):
    """Found on other images of the same kind, as the split of a calibration set does."""
    searched = judged(800, seed=1)
    return fill(nested_path(searched, MACS), searched.confidence)


def violations(population, path, bound, choose, n=600):
    """Share of calibration sets, drawn from the population, whose choice loses too much."""
    counts = tally(population, path)
    truth = (counts.losses - counts.gains) / len(population)
    rng = np.random.default_rng(0)
    chosen = [choose(population.pick(rng.integers(0, len(population), n))) for _ in range(SETS)]
    return float((truth[chosen] > bound).mean())


def certify(path, bound, method):
    return lambda images: Certifier(images, DELTA, method).certified(tally(images, path), bound)


@pytest.mark.slow
@pytest.mark.parametrize("bound", [0.01, 0.03])
@pytest.mark.parametrize("method", [Method.PAIRED, Method.BINOMIAL, Method.HOEFFDING_BENTKUS])
def test_certified_points_break_their_bound_at_most_delta_of_the_time(
    population, path, bound, method
):
    assert violations(population, path, bound, certify(path, bound, method)) <= DELTA + TOLERANCE


@pytest.mark.slow
def test_so_do_points_whose_tests_begin_where_the_search_says(population, path):
    """With so few images that the most careful thresholds could never be certified."""
    searched = judged(800, seed=1)
    first = first_steps(path, searched, 225, Method.PAIRED, DELTA)[0.01]
    assert first > 1

    def choose(images):
        return Certifier(images, DELTA, Method.PAIRED).certified(tally(images, path), 0.01, first)

    assert 0 < violations(population, path, 0.01, choose, n=225) <= DELTA + TOLERANCE


@pytest.mark.slow
def test_the_naive_choice_breaks_the_bound_far_more_often(population, path):
    """The boldest step whose loss on the calibration images themselves is small enough."""

    def naive(images, bound=0.01):
        counts = tally(images, path)
        return int(np.flatnonzero(counts.losses - counts.gains <= bound * len(images))[-1])

    assert violations(population, path, 0.01, naive) > 3 * DELTA


def at_the_edge(n, bound, gains):
    """Images whose only early step loses exactly `bound`: the hardest case for coverage."""
    early, full = np.ones((2, n), bool)
    early[: round((bound + gains) * n)] = False
    full[-round(gains * n) :] = False
    right = np.stack([early, full], axis=1)
    return Outcomes(np.ones((n, 2)), right.astype(int), right, right.astype(float))


@pytest.mark.slow
@pytest.mark.parametrize("method", [Method.PAIRED, Method.BINOMIAL])
def test_coverage_at_the_edge_is_delta_itself_and_no_more(method):
    """A bound that were off by much would fail here, on either side."""
    bound = 0.02
    gains = 0.01 if method is Method.PAIRED else 0.0001
    population = at_the_edge(100_000, bound, gains)
    path = [(NEVER,), (0.0,)]
    broken = violations(population, path, bound - 1e-9, certify(path, bound, method), n=2000)
    assert DELTA / 2 <= broken <= DELTA + TOLERANCE


@pytest.mark.slow
def test_expected_loss_under_conformal_risk_control_is_within_its_bound(population, path):
    counts = tally(population, path)
    choose = certify(path, 0.03, Method.EXPECTATION)
    rng = np.random.default_rng(0)
    chosen = [choose(population.pick(rng.integers(0, len(population), 300))) for _ in range(SETS)]
    assert 0.01 < (counts.losses[chosen] / len(population)).mean() <= 0.03


@pytest.fixture(scope="module")
def points(population, path):
    images = population.pick(np.arange(5000))
    return ladder([Certifier(images, DELTA, Method.PAIRED)], path, images, MACS)


@pytest.mark.slow
def test_the_ladder_starts_at_the_full_network_and_gets_cheaper(points):
    assert [p.max_accuracy_loss for p in points] == list(LOSSES)
    assert points[0].thresholds == (NEVER,) * 3
    assert (points[0].mean_macs, points[0].measured_accuracy_loss) == (1, 0)
    costs = [p.mean_macs for p in points]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.6


@pytest.mark.slow
def test_a_ladder_for_several_numerics_is_as_careful_as_the_most_careful_of_them(population, path):
    certifiers = [
        Certifier(population.pick(np.arange(start, start + 3000)), DELTA, Method.PAIRED)
        for start in (0, 3000, 6000)
    ]
    alone = [ladder([c], path, population, MACS) for c in certifiers]
    together = ladder(certifiers, path, population, MACS)
    assert [p.mean_macs for p in together] == [
        max(p.mean_macs for p in rungs) for rungs in zip(*alone, strict=True)
    ]
    assert together not in alone  # none of them is the most careful everywhere


@pytest.mark.slow
def test_too_few_images_fall_back_to_the_full_network_and_say_how_many_it_takes(path):
    images = judged(150, seed=1)
    certifier = Certifier(images, DELTA, Method.PAIRED)
    points = ladder([certifier], path, images, MACS)
    missing = dict(uncertifiable(certifier, points))
    assert missing[0.001] == images_needed(Method.PAIRED, DELTA, 0.001) > 2000
    assert all(n > 150 for bound, n in missing.items() if bound < 0.01)
    assert all(p.mean_macs == 1 and p.certified for p in points if p.max_accuracy_loss in missing)


def test_an_expectation_is_never_called_certified(population, path):
    images = population.pick(np.arange(2000))
    points = ladder([Certifier(images, DELTA, Method.EXPECTATION)], path, images, MACS)
    assert [p.certified for p in points if p.mean_macs < 1] == [False] * sum(
        p.mean_macs < 1 for p in points
    )
    assert sum(p.mean_macs < 1 for p in points) > 3


def test_an_upper_bound_is_the_least_loss_that_would_be_certified(population, path):
    images = population.pick(np.arange(3000))
    for method in (Method.PAIRED, Method.BINOMIAL):
        certifier = Certifier(images, DELTA, method)
        bound = certifier.upper_bound(path[-1])
        counts = tally(images, path)
        last = (int(counts.losses[-1]), int(counts.gains[-1]))
        assert certifier.rejects(*last, bound)
        assert not certifier.rejects(*last, bound - 1e-4)


def test_the_module_offers_every_method_a_p_value_or_an_expectation():
    for method in Method:
        assert images_needed(method, DELTA, 0.01) > 0
    assert ladders.images_needed(Method.EXPECTATION, DELTA, 0.01) == 99
