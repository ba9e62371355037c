"""From an exit's logits to answer probabilities and a calibrated confidence."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from model.policy import Calibration, Measure

EPSILON = 1e-6
"""Keeps log-odds of probabilities that round to 0 or 1 finite in fp32."""


class Judgement(NamedTuple):
    """What one exit says of a batch of jobs."""

    confidence: Tensor
    """fp32 `[N]` in 0..1: the calibrated probability that the answer is right."""
    probabilities: Tensor
    """fp32 `[N, classes]`, each row summing to 1; the answer is the largest."""
    state: Tensor
    """fp32 `[N, classes]`: what the next exit wants as `passed`."""


def judge(
    logits: Tensor, passed: Tensor | None, calibration: Calibration, measure: Measure
) -> Judgement:
    """Judge one exit's logits without any device synchronisation.

    The answer comes from a geometric ensemble of the exits passed so far, each weighted by what
    calibration found it to be worth: softmax(logits / temperature + carry * passed).

    Args:
        logits: `[N, classes]`, any floating dtype.
        passed: the `state` of the exit before, row for row, or None at the shallowest exit.
        calibration: of this exit.
        measure: what the confidence is made from.
    """
    combined = logits.float() / calibration.temperature
    if passed is not None and calibration.carry:
        combined = combined + calibration.carry * passed
    state = F.log_softmax(combined, dim=1)
    probabilities = state.exp()
    score = scores(measure, probabilities, passed)
    return Judgement(odds_of(score, calibration).sigmoid(), probabilities, state)


def odds_of(score: Tensor, calibration: Calibration) -> Tensor:
    """Log-odds `[N]` that answers with these scores `[N, S]` are right."""
    weighted = [c * score[:, i] for i, c in enumerate(calibration.coefficients)]
    return torch.stack(weighted).sum(dim=0) + calibration.offset


def scores(measure: Measure, probabilities: Tensor, passed: Tensor | None) -> Tensor:
    """The measure's scores of the answers, larger for surer ones, on the scale of log-odds.

    Args:
        measure: which scores.
        probabilities: `[N, classes]` of this exit.
        passed: log-probabilities `[N, classes]` of the exit before, or None.

    Returns:
        `[N, measure.scores]`, all finite where the probabilities are.
    """
    two, classes = probabilities.topk(min(2, probabilities.shape[1]), dim=1)
    match measure:
        case Measure.PROBABILITY:
            columns = [_probability(two)]
        case Measure.MARGIN:
            columns = [_margin(two)]
        case Measure.ENTROPY:
            columns = [_entropy(probabilities)]
        case Measure.AGREEMENT:
            columns = [_agreement(two, classes, passed)]
        case Measure.COMBINED:
            columns = [
                _probability(two),
                _margin(two),
                _entropy(probabilities),
                _agreement(two, classes, passed),
            ]
    return torch.stack(columns, dim=1)


def _probability(two: Tensor) -> Tensor:
    return _log_odds(two[:, 0])


def _margin(two: Tensor) -> Tensor:
    return (two[:, 0].clamp(min=EPSILON) / two[:, -1].clamp(min=EPSILON)).log()


def _entropy(probabilities: Tensor) -> Tensor:
    """One minus the entropy as a share of the largest possible."""
    entropy = torch.special.entr(probabilities).sum(dim=1)
    return _log_odds(1 - entropy / math.log(max(2, probabilities.shape[1])))


def _agreement(two: Tensor, classes: Tensor, passed: Tensor | None) -> Tensor:
    """The answer's probability, averaged over this exit and the one before it."""
    now = two[:, 0]
    if passed is None:
        return _log_odds(now)
    before = passed.gather(1, classes[:, :1]).squeeze(1).exp()
    return _log_odds((now + before) / 2)


def _log_odds(probability: Tensor) -> Tensor:
    return probability.logit(eps=EPSILON)
