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
    log_probabilities: Tensor
    """fp32 `[N, classes]`: what the next exit takes as `passed`."""


class Constants(NamedTuple):
    """A calibration as numbers on a card, so that one kernel serves every exit."""

    temperature: Tensor
    carry: Tensor
    slope: Tensor
    offset: Tensor


def judge(
    logits: Tensor, passed: Tensor | None, calibration: Calibration | Constants, measure: Measure
) -> Judgement:
    """Judge one exit's logits without any device synchronisation.

    The answer comes from a geometric ensemble of the exits passed so far, each weighted by what
    calibration found it to be worth: softmax(logits / temperature + carry * passed).

    Args:
        logits: `[N, classes]`, any floating dtype.
        passed: the `log_probabilities` of the exit before, row for row, or None at the
            shallowest exit.
        calibration: of this exit.
        measure: what the confidence is made from.
    """
    combined = logits.float() / calibration.temperature
    if passed is not None:
        combined = combined + calibration.carry * passed
    log_probabilities = F.log_softmax(combined, dim=1)
    probabilities = log_probabilities.exp()
    odds = calibration.slope * score(measure, probabilities, passed) + calibration.offset
    return Judgement(odds.sigmoid(), probabilities, log_probabilities)


def score(measure: Measure, probabilities: Tensor, passed: Tensor | None) -> Tensor:
    """How sure the answers are by one measure, on the scale of log-odds.

    Args:
        measure: which.
        probabilities: `[N, classes]` of this exit.
        passed: log-probabilities `[N, classes]` of the exit before, or None.

    Returns:
        fp32 `[N]`, finite where the probabilities are.
    """
    match measure:
        case Measure.PROBABILITY:
            return _log_odds(probabilities.amax(dim=1))
        case Measure.MARGIN:
            return _margin(probabilities)
        case Measure.ENTROPY:
            return _entropy(probabilities)
        case Measure.AGREEMENT:
            return _agreement(probabilities, passed)


def _margin(probabilities: Tensor) -> Tensor:
    """The logarithm of how many times likelier the answer is than the runner-up."""
    two = probabilities.topk(min(2, probabilities.shape[1]), dim=1).values.clamp(min=EPSILON)
    return (two[:, 0] / two[:, -1]).log()


def _entropy(probabilities: Tensor) -> Tensor:
    """One minus the entropy as a share of the largest possible."""
    tiny = torch.finfo(probabilities.dtype).tiny
    entropy = -(probabilities * probabilities.clamp(min=tiny).log()).sum(dim=1)
    return _log_odds(1 - entropy / math.log(max(2, probabilities.shape[1])))


def _agreement(probabilities: Tensor, passed: Tensor | None) -> Tensor:
    """The answer's probability, averaged over this exit and the one before it."""
    now, answer = probabilities.max(dim=1)
    if passed is None:
        return _log_odds(now)
    before = passed.gather(1, answer[:, None]).squeeze(1).exp()
    return _log_odds((now + before) / 2)


def _log_odds(probability: Tensor) -> Tensor:
    inside = probability.clamp(EPSILON, 1 - EPSILON)
    return (inside / (1 - inside)).log()  # as logit, which OpenVINO does not know
