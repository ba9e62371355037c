"""Verdicts, operating points, and what a policy refuses to be."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from model.policy import NEVER, Calibration, OperatingPoint, Policy, Reason, Rule
from tests.conftest import point

PROBABILITIES = st.floats(0, 1)
EXITS = st.integers(2, 6)


def policy(*points, exits=4, **calibration):
    return Policy(
        weights_sha256="0" * 64,
        method="by hand",
        delta=0.1,
        calibration_images=100,
        calibrations=(Calibration(temperature=1.0, **calibration),) * exits,
        operating_points=points or (point(0.0, NEVER, NEVER, NEVER), point(0.01, 0.9, 0.8, 0.7)),
    )


@st.composite
def rules(draw):
    exits = draw(EXITS)
    thresholds = draw(st.lists(st.floats(0, NEVER), min_size=exits, max_size=exits))
    first = draw(st.integers(1, exits))
    return Rule(tuple(thresholds), first, draw(st.integers(first, exits)))


@given(rules(), PROBABILITIES)
def test_every_job_is_answered_no_later_than_its_last_exit(rule, confidence):
    assert rule.verdict(len(rule.thresholds), confidence) is Reason.FINAL
    assert rule.verdict(rule.max_exit, confidence) in (Reason.MAX_EXIT, Reason.FINAL)


@given(rules(), PROBABILITIES)
def test_no_job_is_confident_before_its_first_exit(rule, confidence):
    for exit in range(1, rule.min_exit):
        assert rule.verdict(exit, confidence) is None


@given(rules(), PROBABILITIES)
def test_a_job_leaves_early_exactly_when_its_confidence_reaches_the_threshold(rule, confidence):
    for exit in range(rule.min_exit, rule.max_exit):
        reached = confidence >= rule.thresholds[exit - 1]
        assert rule.verdict(exit, confidence) is (Reason.CONFIDENT if reached else None)


@given(rules(), PROBABILITIES, PROBABILITIES)
def test_more_confidence_never_keeps_a_job_longer(rule, one, other):
    low, high = sorted((one, other))
    for exit in range(1, len(rule.thresholds) + 1):
        if rule.verdict(exit, low) is not None:
            assert rule.verdict(exit, high) is not None


def test_a_confidence_equal_to_the_threshold_suffices():
    assert Rule((0.5, 0.0), 1, 2).verdict(1, 0.5) is Reason.CONFIDENT


def test_no_confidence_reaches_never():
    assert Rule((NEVER, 0.0), 1, 2).verdict(1, 1.0) is None


def test_a_confidence_that_is_no_number_never_suffices():
    assert Rule((0.0, 0.0), 1, 2).verdict(1, math.nan) is None


def test_one_threshold_for_a_request_replaces_the_policys():
    rule = policy().rule(policy().operating_points[1], threshold=0.5)
    assert rule.thresholds == (0.5, 0.5, 0.5, 0.0)


def test_a_rule_takes_the_points_thresholds_and_all_exits_by_default():
    assert policy().rule(policy().operating_points[1]) == Rule((0.9, 0.8, 0.7, 0.0), 1, 4)


def test_the_point_for_a_loss_is_the_next_on_the_ladder():
    three = policy(point(0.0, 1, 1, 1), point(0.01, 0.9, 0.9, 0.9), point(0.05, 0.5, 0.5, 0.5))
    for loss, chosen in [(0.0, 0.0), (0.009, 0.0), (0.01, 0.01), (0.04, 0.01), (1.0, 0.05)]:
        assert three.point_for(loss).max_accuracy_loss == chosen


def test_no_row_takes_the_place_of_one_that_could_not_be_certified():
    """Else the images that certify would choose, and the bound fail by either test."""
    fallen_back = point(0.02, NEVER, NEVER, NEVER).model_copy(update={"mean_macs": 1.0})
    cheap = point(0.01, 0.9, 0.9, 0.9).model_copy(update={"mean_macs": 0.5})
    assert policy(cheap, fallen_back).point_for(0.03) == fallen_back


def test_a_row_that_was_chosen_for_its_cost_is_taken_by_its_own_bound_alone():
    row, next_row = point(0.01, 0.9, 0.9, 0.9), point(0.02, 0.8, 0.8, 0.8)
    cheap = point(0.0143, 0.5, 0.5, 0.5).model_copy(update={"budget": 0.4, "mean_macs": 0.4})
    three = policy(row, cheap, next_row)
    for loss, chosen in [(0.0142, row), (0.0143, cheap), (0.0144, row), (0.02, next_row)]:
        assert three.point_for(loss) == chosen


def test_a_loss_below_every_point_is_refused_with_the_least():
    with pytest.raises(ValueError, match=r"loses at most 0\.005; the least is 0\.01"):
        policy(point(0.01, 1, 1, 1)).point_for(0.005)


@pytest.mark.parametrize("losses", [(0.05, 0.01), (0.01, 0.01)])
def test_operating_points_rise(losses):
    with pytest.raises(ValidationError, match="must rise in max_accuracy_loss"):
        policy(*(point(loss, 1, 1, 1) for loss in losses))


@pytest.mark.parametrize("thresholds", [(1, 1), (1, 1, 1, 1)])
def test_operating_points_have_a_threshold_for_every_exit_but_one(thresholds):
    with pytest.raises(ValidationError, match="a threshold for every exit but one"):
        policy(point(0.01, *thresholds))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Calibration, {"temperature": 0}),
        (Calibration, {"temperature": 1, "carry": -1}),
        (Calibration, {"temperature": 1, "slope": 0}),
        (Calibration, {"temperature": 1, "warmth": 1}),
        (Policy, policy().model_dump() | {"calibrations": ()}),
        (Policy, policy().model_dump() | {"operating_points": ()}),
        (Policy, policy().model_dump() | {"calibration_images": 0}),
        (Policy, policy().model_dump() | {"delta": 1.5}),
        (OperatingPoint, point(0.01, 1, 1, 1).model_dump() | {"thresholds": (-0.1, 0, 0)}),
        (OperatingPoint, point(0.01, 1, 1, 1).model_dump() | {"thresholds": (2.1, 0, 0)}),
        (OperatingPoint, point(0.01, 1, 1, 1).model_dump() | {"max_accuracy_loss": 1.1}),
    ],
)
def test_values_that_mean_nothing_are_refused(kind, fields):
    with pytest.raises(ValidationError):
        kind(**fields)


def test_answers_are_an_ensembles_where_any_exit_carries_the_ones_before():
    assert policy(carry=0.5).ensemble
    assert not policy().ensemble


def test_a_policy_comes_back_from_its_file_as_it_was():
    assert Policy.model_validate_json(policy().model_dump_json()) == policy()
