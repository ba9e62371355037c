"""Operating points certified along a nested path of thresholds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from model.policy import NEVER, OperatingPoint
from training import risk
from training.outcomes import Outcomes, shares

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

    def certified(self, path: Sequence[Thresholds], bound: float) -> int:
        """The last index on a nested path that may lose at most `bound`; 0 is the full network."""
        steps = [self.outcomes.taken(t) for t in path[1:]]
        if self.method is Method.EXPECTATION:
            lost = [self.outcomes.differences(taken) > 0 for taken in steps]
            return risk.conformal_risk_control(np.stack(lost, axis=1), bound) if lost else 0
        p_values = (self.p_value(taken, bound) for taken in steps)
        return risk.fixed_sequence(p_values, self.delta)

    def p_value(self, taken: np.ndarray, bound: float) -> float:
        """P-value of "leaving at these exits loses more than `bound`"."""
        n = len(self.outcomes)
        difference = self.outcomes.differences(taken)
        losses, gains = int((difference > 0).sum()), int((difference < 0).sum())
        match self.method:
            case Method.PAIRED:
                nuisance = risk.NUISANCE_SHARE * self.delta
                return risk.paired_p_value(losses, gains, n, bound, nuisance)
            case Method.HOEFFDING_BENTKUS:
                return risk.hoeffding_bentkus_p_value(losses / n, n, bound)
            case _:
                return risk.binomial_p_value(losses, n, bound)

    def images_needed(self, bound: float) -> int | None:
        """The fewest test images that could certify anything at `bound`; None if none could."""

        def p_value(n: int) -> float:
            nothing = np.zeros((n, 1), dtype=np.int64)
            spotless = Outcomes(nothing, nothing, nothing == 0, nothing)
            return Certifier(spotless, self.delta, self.method).p_value(nothing[:, 0] + 1, bound)

        return risk.images_needed(p_value, self.delta, 10**7) if bound else None

    def upper_bound(self, thresholds: Thresholds) -> float:
        """What one threshold vector loses at most, by this method."""
        taken = self.outcomes.taken(thresholds)
        if self.method is Method.EXPECTATION:
            lost = (self.outcomes.differences(taken) > 0).sum()
            return float(lost + 1) / (len(self.outcomes) + 1)
        return risk.upper_bound(lambda bound: self.p_value(taken, bound), self.delta)


def ladder(
    certifier: Certifier, path: Sequence[Thresholds], everything: Outcomes, macs: np.ndarray
) -> tuple[OperatingPoint, ...]:
    """The boldest certified operating point for each loss; the full network where there is none.

    Args:
        certifier: with the images set aside for testing.
        path: nested thresholds, found without those images.
        everything: all calibration images, for the expected cost.
        macs: float64 `[exits]` as shares of the full network's.
    """
    return tuple(
        operating_point(
            bound,
            path[certifier.certified(path, bound) if bound else 0],
            everything,
            macs,
            certifier.in_probability,
        )
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
) -> Iterator[tuple[OperatingPoint, int | None]]:
    """Points that fell back to the full network, with the test images one would need at least."""
    for point in points:
        if point.max_accuracy_loss and all(t == NEVER for t in point.thresholds):
            yield point, certifier.images_needed(point.max_accuracy_loss)
