"""Every test of a bound is exact, by summing over all outcomes that a calibration set can have."""

import functools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from training import risk

NUISANCE = risk.NUISANCE_SHARE * 0.1
"""Of the paired test, at delta = 0.1."""


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
    return risk.paired_p_value(losses, gains, n, bound, NUISANCE)


def paired_level(n, bound, losses, gains, delta=0.1):
    """The probability, exact but for 1e-6, that the paired test rejects at `delta`."""
    plus, minus, probability = trinomial(n, losses, gains)
    pairs = zip(plus.tolist(), minus.tolist(), strict=True)
    rejected = np.array([paired(*pair, n, bound) <= delta for pair in pairs])
    return float(probability @ rejected)


@pytest.mark.parametrize("gains", [0.0, 0.001, 0.01, 0.03, 0.1])
@pytest.mark.parametrize(("n", "bound"), [(200, 0.02), (400, 0.01)])
def test_paired_test_rejects_a_true_hypothesis_at_most_delta_of_the_time(n, bound, gains):
    assert paired_level(n, bound, bound + gains, gains) <= 0.1
    assert paired_level(n, bound, 1.5 * bound + gains, gains) <= 0.1


def test_paired_test_wastes_little_of_its_level():
    # An invalid test is caught by the one above, one that never rejects by this one.
    assert paired_level(2000, 0.01, 0.04, 0.03) > 0.06


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


@given(st.integers(0, 40), st.integers(0, 40), st.integers(81, 3000), st.data())
def test_paired_p_value_falls_in_the_bound(losses, gains, n, data):
    low, high = sorted(data.draw(st.tuples(*[st.floats(-0.5, 0.5)] * 2)))
    assert paired(losses, gains, n, high) <= paired(losses, gains, n, low) + 1e-12


@given(st.integers(0, 30), st.integers(0, 30), st.integers(100, 3000), st.floats(0.001, 0.3))
def test_one_more_loss_never_makes_a_policy_look_better(losses, gains, n, bound):
    now = paired(losses, gains, n, bound)
    assert paired(losses + 1, gains, n, bound) >= now - 1e-12
    assert risk.binomial_p_value(losses + 1, n, bound) >= risk.binomial_p_value(losses, n, bound)


@pytest.mark.parametrize("n", [137, 400])
def test_paired_tail_is_that_of_the_sum_it_claims(n):
    losses, gains, bound = 3, 4, 0.02
    most = risk.clopper_pearson_upper(losses + gains, n, NUISANCE)
    one = np.array([(most - bound) / 2, 1 - most, (most + bound) / 2])  # of -1, 0, +1
    law = np.array([1.0])
    for _ in range(n):
        law = np.convolve(law, one)
    tail = law[: n + losses - gains + 1].sum()
    assert paired(losses, gains, n, bound) == pytest.approx(tail + NUISANCE, abs=1e-10)


def test_paired_p_value_of_a_policy_that_never_differs_is_the_nuisance():
    assert paired(0, 0, 100_000, 0.001) == NUISANCE


def test_clopper_pearson_covers():
    n, delta = 80, 0.1
    for p in (0.01, 0.1, 0.5):
        successes = np.arange(n + 1)
        above = np.array([risk.clopper_pearson_upper(int(s), n, delta) >= p for s in successes])
        assert stats.binom.pmf(successes, n, p) @ above >= 1 - delta


def test_upper_bound_is_where_the_p_value_crosses_delta():
    bound = risk.upper_bound(lambda b: risk.binomial_p_value(3, 100, b), 0.1)
    assert bound == pytest.approx(risk.clopper_pearson_upper(3, 100, 0.1), abs=2e-5)


def test_fixed_sequence_stops_at_the_first_that_is_not_rejected_and_looks_no_further():
    def p_values():
        yield from (0.01, 0.1, 0.11)
        raise AssertionError("tested beyond the first failure")

    assert risk.fixed_sequence(p_values(), 0.1) == 2


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
    def p_value(n):
        return risk.paired_p_value(0, 0, n, bound, NUISANCE)

    n = risk.images_needed(p_value, 0.1)
    assert p_value(n) <= 0.1 < p_value(n - 1)
