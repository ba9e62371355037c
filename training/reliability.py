"""How well confidences say how often answers are right."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from training.outcomes import Outcomes

BINS = 15


class Bins(BaseModel):
    """A reliability diagram: images grouped by confidence into bins of equal width."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    return Bins(confidence=mean.tolist(), accuracy=accuracy.tolist(), images=count[full].tolist())


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error in 0..1 (Naeini et al., AAAI 2015)."""
    bins = reliability(confidence, right)
    gaps = np.abs(np.subtract(bins.confidence, bins.accuracy))
    return float(np.average(gaps, weights=bins.images))


class ExitErrors(NamedTuple):
    """Calibration errors of one exit."""

    before: float
    """Of the exit by itself, as trained."""
    after: float
    """Of the calibrated confidence, over all images."""
    leaving: float | None
    """Of the calibrated confidence, over the images that leave there."""


def exit_errors(
    outcomes: Outcomes, logits: Tensor, class_ids: Tensor, taken: np.ndarray
) -> list[ExitErrors]:
    """Calibration errors of every exit, shallow to deep.

    Args:
        outcomes: calibrated, of the same N images.
        logits: fp32 `[N, exits, classes]`.
        class_ids: int64 `[N]`.
        taken: the exit that each image leaves at, `[N]`.
    """
    errors = []
    for k in range(outcomes.exits):
        raw, answers = logits[:, k].softmax(dim=1).max(dim=1)
        confidence, right, leaving = outcomes.confidence[:, k], outcomes.right[:, k], taken == k + 1
        errors.append(
            ExitErrors(
                calibration_error(raw.double().numpy(), (answers == class_ids).numpy()),
                calibration_error(confidence, right),
                calibration_error(confidence[leaving], right[leaving]) if leaving.any() else None,
            )
        )
    return errors
