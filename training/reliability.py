"""How well confidences say how often answers are right."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BINS = 15


class Bins(NamedTuple):
    """A reliability diagram: images grouped by confidence into bins of equal width."""

    confidence: list[float]
    """Mean confidence of each bin that is not empty."""
    accuracy: list[float]
    """Share of right answers in each."""
    images: list[int]
    """How many images each holds."""


def reliability(confidence: np.ndarray, right: np.ndarray) -> Bins:
    """Group confidences `[N]` in 0..1 with whether the answers were right `[N]`."""
    index = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count = np.bincount(index, minlength=BINS)
    full = count > 0
    mean = np.bincount(index, weights=confidence, minlength=BINS)[full] / count[full]
    accuracy = np.bincount(index, weights=right, minlength=BINS)[full] / count[full]
    return Bins(mean.tolist(), accuracy.tolist(), count[full].tolist())


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float | None:
    """Expected calibration error in 0..1 (Naeini et al., AAAI 2015); None for no images."""
    if len(confidence) == 0:
        return None
    bins = reliability(confidence, right)
    gaps = np.abs(np.subtract(bins.confidence, bins.accuracy))
    return float(np.average(gaps, weights=bins.images))
