"""What a calibrated bundle does on test images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from model.bundle import Bundle
from model.policy import NEVER, OperatingPoint, Policy
from training import risk
from training.outcomes import Outcomes, shares
from training.reliability import Bins, exit_errors, reliability

LEVEL = 0.9
"""Of the two-sided intervals."""


class ReportPart(BaseModel):
    """A part of report.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ExitResult(ReportPart):
    """One exit, were every image to leave there."""

    exit: int
    macs: int
    parameters: int
    accuracy: float
    """As served."""
    alone: float
    """Of the exit by itself."""
    error_before: float
    error_after: float
    error_leaving: float | None
    milliseconds: float
    """Measured to leave there, batch of one, eager."""
    only_full_network_right: int
    """Images that the full network gets right and this exit wrong."""
    only_this_exit_right: int
    reliability: Bins


class PointResult(ReportPart):
    """One operating point on the test images."""

    max_accuracy_loss: float
    certified: bool
    accuracy: float
    loss: float
    """Of accuracy against the full network."""
    loss_interval: tuple[float, float]
    """Exact, for the loss over the distribution that the images come from."""
    exit_shares: tuple[float, ...]
    mean_macs: float
    """As a share of the full network's."""
    speedup_macs: float
    speedup_measured: float


class CurvePoint(ReportPart):
    """Accuracy and mean MACs (as a share) of one threshold vector."""

    mean_macs: float
    accuracy: float


class Report(ReportPart):
    """All of report.json."""

    bundle: str
    version: str
    weights_sha256: str
    images: int
    device: str
    dtype: str
    """Numerics that everything was measured in."""
    certified_dtypes: tuple[str, ...]
    """Numerics that the bounds were certified in."""
    method: str
    delta: float
    measure: str
    ensemble: bool
    calibration_images: int
    shown_loss: float
    """The operating point that class shares, sheets and leaving errors are about."""
    exits: tuple[ExitResult, ...]
    operating_points: tuple[PointResult, ...]
    path: tuple[CurvePoint, ...]
    budgeted: tuple[CurvePoint, ...]
    class_shares: dict[str, tuple[float, ...]]
    """Share of each class's images that leave at each exit."""

    @property
    def point_shown(self) -> PointResult:
        """The operating point that sentences are about."""
        return next(p for p in self.operating_points if p.max_accuracy_loss == self.shown_loss)

    @property
    def covered(self) -> bool:
        """Whether the bounds speak of the numerics that were measured."""
        return self.dtype in self.certified_dtypes


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything that a report is computed from."""

    bundle: Bundle
    outcomes: Outcomes
    logits: Tensor
    class_ids: Tensor
    seconds: np.ndarray
    """To leave at each exit, `[exits]`."""
    shown: OperatingPoint
    """The operating point to show images of."""

    @property
    def policy(self) -> Policy:
        """What was measured."""
        return self.bundle.calibrated

    @property
    def macs(self) -> np.ndarray:
        """To leave at each exit: float64 `[exits]`."""
        return np.array([e.macs for e in self.bundle.description.exits], dtype=float)

    @property
    def taken(self) -> np.ndarray:
        """The exit of each image at the shown operating point: `[N]`."""
        return self.outcomes.taken(self.shown.thresholds)


def exit_results(m: Measured) -> tuple[ExitResult, ...]:
    """Every exit by itself, shallow to deep."""
    errors = exit_errors(m.outcomes, m.logits, m.class_ids, m.taken)
    alone = (m.logits.argmax(dim=2) == m.class_ids[:, None]).double().mean(dim=0).tolist()
    results = []
    for k, described in enumerate(m.bundle.description.exits):
        right, full = m.outcomes.right[:, k], m.outcomes.right[:, -1]
        results.append(
            ExitResult(
                exit=k + 1,
                macs=described.macs,
                parameters=described.parameters,
                accuracy=float(right.mean()),
                alone=alone[k],
                error_before=errors[k].before,
                error_after=errors[k].after,
                error_leaving=errors[k].leaving,
                milliseconds=1e3 * m.seconds[k],
                only_full_network_right=int((full & ~right).sum()),
                only_this_exit_right=int((right & ~full).sum()),
                reliability=reliability(m.outcomes.confidence[:, k], right),
            )
        )
    return tuple(results)


def point_results(m: Measured) -> tuple[PointResult, ...]:
    """Every operating point, from careful to bold."""
    return tuple(_point_result(m, point) for point in m.policy.operating_points)


def _point_result(m: Measured, point: OperatingPoint) -> PointResult:
    taken = m.outcomes.taken(point.thresholds)
    share = shares(taken, m.outcomes.exits)
    difference = m.outcomes.differences(taken)
    skips = any(threshold != NEVER for threshold in point.thresholds)  # if not of these images
    return PointResult(
        max_accuracy_loss=point.max_accuracy_loss,
        certified=point.certified,
        accuracy=float(m.outcomes.right_at(taken).mean()),
        loss=float(difference.mean()),
        loss_interval=loss_interval(difference) if skips else (0.0, 0.0),
        exit_shares=tuple(share.tolist()),
        mean_macs=float(share @ m.macs / m.macs[-1]),
        speedup_macs=float(m.macs[-1] / (share @ m.macs)),
        speedup_measured=float(m.seconds[-1] / (share @ m.seconds)),
    )


def loss_interval(differences: np.ndarray) -> tuple[float, float]:
    """Exact two-sided interval for the mean of differences `[N]` in {-1, 0, +1}."""
    (losses, gains), n = risk.losses_and_gains(differences), len(differences)
    delta = (1 - LEVEL) / 2
    least = -risk.paired_upper_bound(gains, losses, n, delta)
    return least, risk.paired_upper_bound(losses, gains, n, delta)


def curve(m: Measured, vectors: Sequence[tuple[float, ...]]) -> tuple[CurvePoint, ...]:
    """Accuracy over cost of threshold vectors."""
    points = []
    for thresholds in vectors:
        taken = m.outcomes.taken(thresholds)
        cost = shares(taken, m.outcomes.exits) @ m.macs / m.macs[-1]
        accuracy = m.outcomes.right_at(taken).mean()
        points.append(CurvePoint(mean_macs=float(cost), accuracy=float(accuracy)))
    return tuple(points)


def class_shares(m: Measured) -> dict[str, tuple[float, ...]]:
    """Exit shares of each class at the shown operating point, by label."""
    ids, exits = m.class_ids.numpy(), m.outcomes.exits
    return {
        label: tuple(shares(m.taken[ids == i], exits).tolist())
        for i, label in enumerate(m.bundle.description.classes)
        if (ids == i).any()
    }
