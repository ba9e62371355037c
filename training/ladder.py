"""Operating points certified along a nested path of thresholds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import numpy as np

from model.policy import NEVER, OperatingPoint
from training import risk
from training.outcomes import Outcomes, shares
from training.tally import Tally, tally

LOSSES = (0.0, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05)
"""The ladder's accuracy losses, as shares."""

Thresholds = tuple[float, ...]


class Method(StrEnum):
    """Which statement is proved, and by which test."""

    PAIRED = "paired"
    """Accuracy lost, net of answers that only early exit gets right; exact."""
    BINOMIAL = "binomial"
    """Share of images that only the full network gets right; exact."""
    HOEFFDING_BENTKUS = "hoeffding-bentkus"
    """The same share; valid for any loss in 0..1, so never tighter than binomial."""
    DISAGREEMENT = "disagreement"
    """Share of images answered otherwise than by the full network; exact, needs no labels."""
    EXPECTATION = "expectation"
    """The share that only the full network gets right, on average over calibration sets."""


def promise(method: str, delta: float) -> str:
    """How far a method's bounds hold, in words."""
    if method == Method.EXPECTATION:
        return "on average over calibration sets"
    return f"with probability {100 * (1 - delta):g}% over calibration sets"


@dataclass(frozen=True, slots=True)
class Certifier:
    """Tests threshold vectors on images that had no part in choosing them.

    For `Method.DISAGREEMENT`, the outcomes must be those against the full network.
    """

    outcomes: Outcomes
    delta: float
    method: Method

    @property
    def in_probability(self) -> bool:
        """Whether bounds hold with probability 1 - delta rather than in expectation."""
        return self.method is not Method.EXPECTATION

    def certified(self, counts: Tally, bound: float, first: int = 1) -> int:
        """The last step of a nested path that may lose at most `bound`; 0 is the full network.

        Args:
            counts: of this certifier's outcomes along the path.
            bound: accuracy lost, as a share. The full network alone loses nothing for certain, so
                where that is demanded nothing is tested.
            first: the step that tests begin with, chosen without these outcomes. An expectation
                needs no tests.
        """
        if bound == 0:
            return 0
        if self.method is Method.EXPECTATION:
            return risk.conformal_risk_control(counts.ever_lost, len(self.outcomes), bound)
        rejected = risk.fixed_sequence(self._tests(counts, bound, first))
        return first - 1 + rejected if rejected else 0

    def _tests(self, counts: Tally, bound: float, first: int) -> Iterable[bool]:
        losses, gains, n = counts.losses[first:], counts.gains[first:], len(self.outcomes)
        if self.method is Method.PAIRED:
            scores = risk.paired_score(losses, gains, n, bound)
            return (scores <= risk.critical_score(n, bound, self.delta)).tolist()
        pairs = zip(losses.tolist(), gains.tolist(), strict=True)
        return (self.rejects(*pair, bound) for pair in pairs)

    def rejects(self, losses: int, gains: int, bound: float) -> bool:
        """Whether these counts show that no more than `bound` is lost."""
        return self._p_value(losses, gains, bound) <= self.delta

    def _p_value(self, losses: int, gains: int, bound: float) -> float:
        return _p_value(self.method, losses, gains, len(self.outcomes), bound)

    def upper_bound(self, thresholds: Thresholds) -> float:
        """What one threshold vector loses at most, by this method."""
        differences = self.outcomes.differences(self.outcomes.taken(thresholds))
        losses, gains = risk.losses_and_gains(differences)
        if self.method is Method.EXPECTATION:
            return (losses + 1) / (len(self.outcomes) + 1)
        return risk.upper_bound(lambda bound: self._p_value(losses, gains, bound), self.delta)


def _p_value(method: Method, losses: int, gains: int, n: int, bound: float) -> float:
    match method:
        case Method.PAIRED:
            return risk.paired_p_value(losses, gains, n, bound)
        case Method.HOEFFDING_BENTKUS:
            return risk.hoeffding_bentkus_p_value(losses / n, n, bound)
        case _:
            return risk.binomial_p_value(losses, n, bound)


@lru_cache(maxsize=256)
def images_needed(method: Method, delta: float, bound: float) -> int:
    """The fewest test images that certify `bound` for a policy that never loses one."""
    if method is Method.EXPECTATION:
        return math.ceil(1 / bound) - 1
    return risk.images_needed(lambda n: _p_value(method, 0, 0, n, bound) <= delta)


def ladder(
    certifiers: Sequence[Certifier],
    path: Sequence[Thresholds],
    everything: Outcomes,
    macs: np.ndarray,
    first: Mapping[float, int] | None = None,
) -> tuple[OperatingPoint, ...]:
    """The boldest certified operating point for each loss; the full network where there is none.

    Args:
        certifiers: with the images set aside for testing, one for each of the numerics. A step
            that all of them reach holds for each, since each alone would have gone as far.
        path: nested thresholds, found without those images.
        everything: all calibration images, for the expected cost.
        macs: float64 `[exits]` as shares of the full network's.
        first: the step that a bound's tests begin with, chosen without those images; where it is
            not given, the most careful.
    """
    begin = first or {}
    counts = [tally(certifier.outcomes, path) for certifier in certifiers]

    def boldest(bound: float) -> int:
        pairs = zip(certifiers, counts, strict=True)
        return min(c.certified(count, bound, begin.get(bound, 1)) for c, count in pairs)

    in_probability = certifiers[0].in_probability
    return tuple(
        operating_point(bound, path[boldest(bound)], everything, macs, in_probability)
        for bound in LOSSES
    )


def operating_point(
    bound: float, thresholds: Thresholds, outcomes: Outcomes, macs: np.ndarray, certified: bool
) -> OperatingPoint:
    """Describe thresholds by what they do on these images."""
    taken = outcomes.taken(thresholds)
    share = shares(taken, outcomes.exits)
    return OperatingPoint(
        max_accuracy_loss=bound,
        thresholds=thresholds,
        certified=certified or all(t == NEVER for t in thresholds),
        measured_accuracy_loss=float(outcomes.differences(taken).mean()),
        mean_macs=min(1.0, float(share @ macs)),
        exit_shares=tuple(share.tolist()),
    )


def uncertifiable(
    certifier: Certifier, points: Sequence[OperatingPoint]
) -> Iterator[tuple[float, int]]:
    """Losses that fell back to the full network, with the test images one would need at least."""
    for point in points:
        bound = point.max_accuracy_loss
        if bound and all(t == NEVER for t in point.thresholds):
            yield bound, images_needed(certifier.method, certifier.delta, bound)
