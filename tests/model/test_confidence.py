"""Answer probabilities and confidences follow their formulas, finite at every extreme."""

import math

import pytest
import torch

from model.confidence import judge, score
from model.policy import Calibration, Measure

EVERY_MEASURE = pytest.mark.parametrize("measure", list(Measure))
PLAIN = Calibration(temperature=1.0)


def logits(rows=64, classes=10, scale=3.0):
    return scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(0))


def odds(p):
    return math.log(p / (1 - p))


def test_a_temperature_alone_is_temperature_scaling():
    said = judge(logits(), None, Calibration(temperature=2.5), Measure.PROBABILITY)
    expected = (logits() / 2.5).softmax(1)
    torch.testing.assert_close(said.probabilities, expected)
    torch.testing.assert_close(said.confidence, expected.amax(1))
    torch.testing.assert_close(said.log_probabilities, expected.log())


def test_the_answer_is_a_geometric_ensemble_of_the_exits_passed():
    before = logits(scale=1.0).log_softmax(1)
    said = judge(logits(), before, Calibration(temperature=2.0, carry=0.7), Measure.PROBABILITY)
    weighted = (logits() / 2.0).softmax(1) * before.exp() ** 0.7
    torch.testing.assert_close(said.probabilities, weighted / weighted.sum(1, keepdim=True))


def test_without_carry_the_exits_before_say_nothing():
    alone = judge(logits(), None, PLAIN, Measure.PROBABILITY)
    with_before = judge(logits(), logits(scale=9.0).log_softmax(1), PLAIN, Measure.PROBABILITY)
    assert torch.equal(alone.probabilities, with_before.probabilities)


def test_slope_and_offset_act_on_log_odds():
    plain = judge(logits(), None, PLAIN, Measure.MARGIN).confidence.double().logit()
    said = judge(
        logits(), None, Calibration(temperature=1.0, slope=0.5, offset=-1.0), Measure.MARGIN
    )
    expected = (0.5 * plain - 1.0).sigmoid().float()
    torch.testing.assert_close(said.confidence, expected, rtol=1e-3, atol=1e-4)


def test_each_measure_is_its_formula():
    probabilities = torch.tensor([[0.6, 0.3, 0.1]])
    passed = torch.tensor([[0.2, 0.5, 0.3]]).log()
    entropy = -sum(p * math.log(p) for p in (0.6, 0.3, 0.1)) / math.log(3)
    expected = {
        Measure.PROBABILITY: odds(0.6),
        Measure.MARGIN: math.log(0.6 / 0.3),
        Measure.ENTROPY: odds(1 - entropy),
        Measure.AGREEMENT: odds((0.6 + 0.2) / 2),
    }
    assert expected.keys() == set(Measure)
    for measure, value in expected.items():
        assert score(measure, probabilities, passed).item() == pytest.approx(value, rel=1e-4)


def test_agreement_at_the_shallowest_exit_is_its_probability():
    probabilities = torch.tensor([[0.6, 0.3, 0.1]])
    assert score(Measure.AGREEMENT, probabilities, None).item() == pytest.approx(odds(0.6))


EXTREMES = {
    "certain": [1e4, -1e4, -1e4],
    "torn between two": [1e4, 1e4, -1e4],
    "knowing nothing": [0.0, 0.0, 0.0],
    "beyond half precision": [6.5e4, 0.0, -6.5e4],
}


@EVERY_MEASURE
@pytest.mark.parametrize("carry", [0.0, 1.0])
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_logits_give_finite_confidences(measure, carry, name):
    row = torch.tensor([EXTREMES[name]])
    passed = row.flip(1).log_softmax(1)
    calibration = Calibration(temperature=0.1, carry=carry, slope=20.0, offset=5.0)
    said = judge(row, passed, calibration, measure)
    assert 0 <= said.confidence.item() <= 1
    assert said.probabilities.isfinite().all()
    assert said.probabilities.sum().item() == pytest.approx(1)
    assert not said.log_probabilities.isnan().any()


@EVERY_MEASURE
def test_a_single_class_is_certain(measure):
    said = judge(torch.tensor([[3.0]]), None, PLAIN, measure)
    assert said.probabilities.item() == 1
    assert 0 <= said.confidence.item() <= 1


@EVERY_MEASURE
def test_logits_in_half_precision_are_judged_in_full(measure):
    half = logits().half()
    said = judge(half, None, PLAIN, measure)
    assert said.confidence.dtype == said.probabilities.dtype == torch.float32
    torch.testing.assert_close(
        said.confidence, judge(half.float(), None, PLAIN, measure).confidence
    )


@EVERY_MEASURE
def test_a_row_is_judged_the_same_in_any_company(measure):
    before = logits(scale=1.0).log_softmax(1)
    calibration = Calibration(temperature=1.5, carry=0.3)
    together = judge(logits(), before, calibration, measure)
    for i in (0, 31, 63):
        alone = judge(logits()[i : i + 1], before[i : i + 1], calibration, measure)
        torch.testing.assert_close(alone.confidence, together.confidence[i : i + 1])


@EVERY_MEASURE
def test_a_likelier_answer_is_a_surer_one(measure):
    rows = torch.tensor([[gap, 0.0, -1.0] for gap in (0.1, 1.0, 2.0, 4.0)])
    confidence = judge(rows, None, PLAIN, measure).confidence.tolist()
    assert confidence == sorted(confidence)
    assert len(set(confidence)) == 4
