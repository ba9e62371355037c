"""Every test of a bound is exact, by summing over all outcomes that a calibration set can have."""

import functools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from training import risk


def trinomial(n, losses, gains):
    """Every likely outcome of n images: losses, gains, probabilities."""
    counts = np.arange(n + 1)
    plus, minus = (counts[stats.binom.pmf(counts, n, p) > 1e-12] for p in (losses, gains))
    plus, minus = (grid.ravel() for grid in np.meshgrid(plus, minus))
    same = n - plus - minus
    plus, minus, same = (c[same >= 0] for c in (plus, minus, same))
    probability = stats.multinomial.pmf(
        np.stack([plus, minus, same], axis=1), n, [losses, gains, 1 - losses - gains]
    )
    likely = probability > 1e-9
    return plus[likely], minus[likely], probability[likely]


@functools.cache
def paired(losses, gains, n, bound):
    return risk.paired_p_value(losses, gains, n, bound)


def paired_level(n, bound, losses, gains, delta=0.1):
    """The probability, exact but for 1e-6, that the paired test rejects at `delta`."""
    plus, minus, probability = trinomial(n, losses, gains)
    rejected = risk.paired_score(plus, minus, n, bound) <= risk.critical_score(n, bound, delta)
    return float(probability @ rejected)


@pytest.mark.parametrize("gains", [0.0, 0.001, 0.01, 0.03, 0.1])
@pytest.mark.parametrize(("n", "bound"), [(200, 0.02), (400, 0.01)])
def test_paired_test_rejects_a_true_hypothesis_at_most_delta_of_the_time(n, bound, gains):
    assert paired_level(n, bound, bound + gains, gains) <= 0.1
    assert paired_level(n, bound, 1.5 * bound + gains, gains) <= 0.1


def test_paired_test_wastes_little_of_its_level():
    # An invalid test is caught by the one above, one that never rejects by this one.
    assert paired_level(2000, 0.01, 0.04, 0.03) > 0.08


def test_the_power_of_the_paired_test_is_the_probability_that_it_rejects():
    n, bound, losses, gains = 300, 0.02, np.array([0.0, 0.01, 0.03]), np.array([0.0, 0.01, 0.01])
    powers = risk.paired_powers(losses, gains, n, bound, 0.1)
    pairs = zip(losses, gains, strict=True)
    assert powers == pytest.approx([paired_level(n, bound, *pair) for pair in pairs], abs=1e-5)
    assert powers[0] == pytest.approx(1)
    assert powers[2] < 0.1 < powers[1]


def test_paired_test_is_more_powerful_than_the_one_that_ignores_gains():
    losses, gains, n, bound = 40, 25, 1000, 0.03
    assert paired(losses, gains, n, bound) < 0.1 < risk.binomial_p_value(losses, n, bound)


@pytest.mark.parametrize("n", [50, 300])
@pytest.mark.parametrize("bound", [0.005, 0.02, 0.1])
@pytest.mark.parametrize("p_value", [risk.binomial_p_value, "hoeffding-bentkus"])
def test_p_values_are_super_uniform_at_the_edge_of_the_hypothesis(n, bound, p_value):
    if p_value == "hoeffding-bentkus":
        p_value = lambda failures, n, bound: risk.hoeffding_bentkus_p_value(failures / n, n, bound)  # noqa: E731
    failures = np.arange(n + 1)
    probability = stats.binom.pmf(failures, n, bound)
    p_values = np.array([p_value(int(f), n, bound) for f in failures])
    for level in p_values:
        assert probability @ (p_values <= level) <= level + 1e-12


@given(
    st.integers(1, 2000),
    st.floats(0, 1, exclude_max=True),
    st.floats(0.001, 0.999),
)
def test_hoeffding_bentkus_is_never_tighter_than_the_exact_binomial(n, share, bound):
    failures = int(share * n)
    exact = risk.binomial_p_value(failures, n, bound)
    assert risk.hoeffding_bentkus_p_value(failures / n, n, bound) >= exact - 1e-12


def test_hoeffding_bentkus_counts_whole_failures():
    n, failures, bound = 10_000, 7, 0.0015  # 7 / 10,000 * 10,000 is above 7 in floating point
    bentkus = math.e * stats.binom.cdf(failures, n, bound)
    assert risk.hoeffding_bentkus_p_value(failures / n, n, bound) <= bentkus


@given(st.integers(0, 40), st.integers(0, 40), st.integers(81, 1000), st.data())
def test_paired_score_falls_in_the_bound(losses, gains, n, data):
    low, high = sorted(data.draw(st.tuples(*[st.floats(-0.5, 0.5)] * 2)))
    scores = [risk.paired_score(losses, gains, n, bound) for bound in (low, high)]
    assert scores[1] <= scores[0] + 1e-9


@given(st.integers(0, 300), st.integers(0, 300), st.integers(602, 3000), st.floats(-0.3, 0.3))
def test_one_more_loss_never_makes_a_policy_look_better(losses, gains, n, bound):
    now, then = risk.paired_score([losses, losses + 1], gains, n, bound)
    assert then >= now
    assert risk.paired_score(losses + 1, max(0, gains - 1), n, bound) >= now  # as many differ
    if bound > 0:
        assert risk.binomial_p_value(losses + 1, n, bound) >= risk.binomial_p_value(
            losses, n, bound
        )


@pytest.mark.parametrize("v", [0.02, 0.05, 0.3])
def test_a_level_is_the_probability_of_the_outcomes_with_such_a_score(v):
    n, bound, score = 150, 0.02, -1.3
    plus, minus, probability = trinomial(n, (v + bound) / 2, (v - bound) / 2)
    scores = risk.paired_score(plus, minus, n, bound)
    level = probability[scores <= score + 1e-9].sum()
    most = risk._most_losses(score, n, bound)
    assert risk._rejected(most, n, v, (1 + bound / v) / 2) == pytest.approx(level, abs=1e-6)


@pytest.mark.slow
def test_the_critical_score_is_where_the_p_value_crosses_delta():
    n, bound = 800, 0.02
    critical = risk.critical_score(n, bound, 0.1)
    for losses in range(60):
        rejected = risk.paired_score(losses, 30, n, bound) <= critical
        # What is added between the grid's points differs from score to score.
        p_value = paired(losses, 30, n, bound)
        assert p_value < 0.105 if rejected else p_value > 0.095


def test_a_level_beyond_reach_rejects_nothing():
    assert risk.critical_score(2000, 0.2, 1e-30) == -math.inf


def binomial_upper_bound(failures, n, delta):
    return risk.upper_bound(lambda b: risk.binomial_p_value(failures, n, b), delta)


@pytest.mark.slow
def test_the_upper_bound_of_a_binomial_covers():
    n, delta = 80, 0.1
    for p in (0.01, 0.1, 0.5):
        successes = np.arange(n + 1)
        above = np.array([binomial_upper_bound(int(s), n, delta) >= p for s in successes])
        assert stats.binom.pmf(successes, n, p) @ above >= 1 - delta


def test_upper_bound_is_where_the_p_value_crosses_delta():
    clopper_pearson = stats.beta.ppf(1 - 0.1, 3 + 1, 100 - 3)
    assert binomial_upper_bound(3, 100, 0.1) == pytest.approx(clopper_pearson, abs=2e-5)


@pytest.mark.parametrize(
    ("n", "losses", "gains", "delta"), [(95, 7, 7, 0.2), (160, 9, 14, 0.1), (259, 14, 20, 0.2)]
)
def test_no_bound_above_an_upper_bound_is_left_unrejected(n, losses, gains, delta):
    """Of these counts, a p-value rises again where the bound does."""
    bound = risk.paired_upper_bound(losses, gains, n, delta)
    p_values = [risk.paired_p_value(losses, gains, n, bound + 5e-4 * k) for k in range(-9, 40)]
    assert max(p_values[9:]) <= delta < max(p_values[:9])


def test_an_upper_bound_is_1_where_nothing_less_is_rejected():
    assert risk.upper_bound(lambda bound: 0.3 * (bound < 1), 0.2) == 1


def test_fixed_sequence_stops_at_the_first_that_is_not_rejected_and_looks_no_further():
    def rejected():
        yield from (True, True, False)
        raise AssertionError("tested beyond the first failure")

    assert risk.fixed_sequence(rejected()) == 2


def test_conformal_risk_control_keeps_the_expected_loss():
    """Over all data sets, as the theorem's expectation is; first losses uniform over 20 steps."""
    n, bound, steps = 40, 0.3, 20
    rng = np.random.default_rng(0)
    realised = []
    for _ in range(4000):
        lost_from = rng.integers(1, steps + 1, n + 1)  # the last image is the fresh one
        ever_lost = np.cumsum(np.bincount(lost_from[:n], minlength=steps + 1))
        step = risk.conformal_risk_control(ever_lost, n, bound)
        realised.append(lost_from[n] <= step)
    assert np.mean(realised) <= bound + 3 * math.sqrt(bound / 4000)
    assert np.mean(realised) > bound - 0.07


def test_conformal_risk_control_allows_nothing_that_it_cannot():
    assert risk.conformal_risk_control(np.array([0, 5, 9]), 10, 0.05) == 0


@pytest.mark.parametrize("bound", [0.001, 0.01, 0.05])
def test_images_needed_is_the_fewest_that_certify(bound):
    def rejects(n):
        return paired(0, 0, n, bound) <= 0.1

    n = risk.images_needed(rejects)
    assert rejects(n) and not rejects(n - 1)
