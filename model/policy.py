"""The calibrated rule that says whether an exit's answer suffices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

Probability = Annotated[float, Field(ge=0, le=1)]
NEVER = 2.0
"""A threshold that no confidence reaches."""
LARGEST_WEIGHT = 63
"""In int8, in steps. With an eighth bit, sums of two products would overflow the sixteen bits that
x86 without VNNI has for them."""


class Reason(StrEnum):
    """Why a job was answered from the exit it was answered from."""

    CONFIDENT = "confident"
    FINAL = "final"
    DEADLINE = "deadline"
    OVERLOAD = "overload"
    MAX_EXIT = "max_exit"


def suffices(confidence: Any, threshold: Any) -> Any:
    """Whether to answer: a bool for numbers, elementwise for arrays of either."""
    return confidence >= threshold


class Measure(StrEnum):
    """What an exit's confidence is computed from; `model.confidence` holds the formulas."""

    PROBABILITY = "probability"
    MARGIN = "margin"
    ENTROPY = "entropy"
    AGREEMENT = "agreement"


@dataclass(frozen=True, slots=True)
class Rule:
    """What decides one job: a threshold for each exit, and the exits it may leave at."""

    thresholds: tuple[float, ...]
    """One for each exit, shallow to deep; the last is never asked."""
    min_exit: int
    max_exit: int

    def verdict(self, exit: int, confidence: float) -> Reason | None:
        """The reason to answer from `exit` at this calibrated confidence, or None to go on."""
        if exit == len(self.thresholds):
            return Reason.FINAL
        if exit == self.max_exit:
            return Reason.MAX_EXIT
        if exit >= self.min_exit and suffices(confidence, self.thresholds[exit - 1]):
            return Reason.CONFIDENT
        return None


class OperatingPoint(BaseModel):
    """Thresholds with the accuracy they may cost and the compute they save."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_accuracy_loss: Probability = Field(
        description="bound on the accuracy lost against the full network, as a share"
    )
    thresholds: tuple[Annotated[float, Field(ge=0, le=NEVER)], ...] = Field(
        description="calibrated confidence that suffices at each exit but the deepest"
    )
    certified: bool = Field(
        description="whether the bound holds with probability 1 - delta, or only in expectation"
    )
    measured_accuracy_loss: float = Field(
        description="accuracy lost on the calibration images; negative is a gain; where they had "
        "no labels, the share answered otherwise than by the full network"
    )
    mean_macs: Probability = Field(
        description="expected multiply-accumulates, as a share of the full network's"
    )
    exit_shares: tuple[Probability, ...] = Field(
        description="share of the calibration images that leave at each exit"
    )
    budget: Probability | None = Field(
        None,
        description="mean_macs that it was chosen for; a point of the ladder was chosen for its "
        "bound instead",
    )


class Calibration(BaseModel):
    """How one exit's logits become answer probabilities and a calibrated confidence.

    With nothing but a temperature, on the measure `probability`, this is temperature scaling (Guo
    et al., "On Calibration of Modern Neural Networks", ICML 2017).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    temperature: float = Field(gt=0, description="divides the exit's logits before the softmax")
    carry: float = Field(
        0.0, ge=0, description="weight of the shallower exits' log-probabilities; 0: exit alone"
    )
    alone: float | None = Field(
        None, gt=0, description="temperature where the network is cut at this exit, with no carry"
    )
    slope: float = Field(1.0, gt=0, description="of the measure's score, in the log-odds of right")
    offset: float = Field(0.0, description="of the log-odds of right")


class Quantisation(BaseModel):
    """What int8 needs to know, and what it costs before any early exit does."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    ranges: tuple[dict[str, tuple[float, float]], ...] = Field(
        description="least and largest input of every convolution, stage by stage"
    )
    measured_accuracy_loss: float = Field(
        description="accuracy that the full network lost against float32 on the images that "
        "certified the policy; negative is a gain"
    )
    accuracy_loss_bound: float = Field(
        description="what it may lose at most, with probability 1 - delta"
    )
    largest_weight: int = Field(
        127, ge=1, description="of each channel, in steps; 127 where a policy does not say"
    )


class Policy(BaseModel):
    """Calibrated confidences and operating points, as `policy.json` holds them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    weights_sha256: str = Field(description="digest of the weights it was made for")
    method: str = Field(description="how the operating points were chosen")
    delta: Probability = Field(description="probability that a certified bound fails")
    calibration_images: int = Field(ge=1)
    dtypes: tuple[str, ...] = Field((), description="numerics that its bounds were certified in")
    quantisation: Quantisation | None = Field(
        None, description="for int8, whose bounds are against the full network in int8"
    )
    measure: Measure = Field(Measure.PROBABILITY, description="what a confidence is made from")
    calibrations: tuple[Calibration, ...] = Field(min_length=1, description="one for each exit")
    operating_points: tuple[OperatingPoint, ...] = Field(
        min_length=1, description="from the smallest accuracy loss to the largest"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Policy:
        losses = [p.max_accuracy_loss for p in self.operating_points]
        if losses != sorted(set(losses)):
            raise ValueError("operating points must rise in max_accuracy_loss")
        for point in self.operating_points:
            if len(point.thresholds) != self.exits - 1:
                raise ValueError("each operating point needs a threshold for every exit but one")
        return self

    @property
    def exits(self) -> int:
        """How many exits the policy speaks of."""
        return len(self.calibrations)

    @property
    def ensemble(self) -> bool:
        """Whether answers come from all exits passed so far, not from the last one alone."""
        return any(c.carry for c in self.calibrations)

    def for_int8(self) -> Quantisation:
        """What int8 needs to know.

        Raises:
            ValueError: the policy was not made for it, or for another way to round.
        """
        again = "run: python -m training calibrate BUNDLE --data DIR --dtype auto int8"
        if self.quantisation is None:
            raise ValueError(f"the policy was not calibrated for int8; {again}")
        if (was := self.quantisation.largest_weight) != LARGEST_WEIGHT:
            raise ValueError(
                f"the policy was calibrated for int8 with weights up to {was} steps, where they "
                f"are now up to {LARGEST_WEIGHT}; {again}"
            )
        return self.quantisation

    def point_for(self, max_accuracy_loss: float) -> OperatingPoint:
        """The operating point with this bound, else the one of the ladder with the next smaller.

        It is taken even where it runs the full network and another point is cheaper. Choosing among
        points by what the certifying images gave each would choose between tests, and the bound
        could fail with either. For the same reason points made for a budget are never fallen back
        to.

        Raises:
            ValueError: every operating point may lose more.
        """
        allowed = [
            point
            for point in self.operating_points
            if point.max_accuracy_loss == max_accuracy_loss
            or (point.max_accuracy_loss < max_accuracy_loss and point.budget is None)
        ]
        if not allowed:
            least = self.operating_points[0].max_accuracy_loss
            raise ValueError(
                f"no operating point loses at most {max_accuracy_loss:g}; the least is {least:g}"
            )
        return allowed[-1]

    def rule(
        self,
        point: OperatingPoint,
        threshold: float | None = None,
        min_exit: int = 1,
        max_exit: int | None = None,
    ) -> Rule:
        """The rule for one job: an operating point, or `threshold` at every exit in its stead."""
        shallow: Sequence[float] = point.thresholds
        if threshold is not None:
            shallow = [threshold] * (self.exits - 1)
        return Rule((*shallow, 0.0), min_exit, max_exit or self.exits)
