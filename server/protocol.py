"""What goes over the wire in answer to a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json

from model.policy import OperatingPoint, Reason
from server.errors import OfframpError
from server.parameters import Parameters
from server.tickets import Answer, Seen

ROUNDING = 6
"""Decimals of a probability on the wire."""


class Label(BaseModel):
    """One of the likeliest labels."""

    label: str = Field(description="a class's name")
    class_id: int = Field(ge=0, description="its place in the labels of /model")
    probability: float = Field(
        ge=0,
        le=1,
        description="the network's own; over all labels they sum to 1. How likely the answer is to "
        "be right, `confidence` says",
    )


class SeenBody(BaseModel):
    """What one exit said."""

    exit: int = Field(ge=1, description="1 is the shallowest")
    label: str = Field(description="the likeliest label by then")
    class_id: int = Field(ge=0, description="its place in the labels of /model")
    confidence: float = Field(ge=0, le=1, description="calibrated probability that it is right")
    elapsed_ms: float = Field(ge=0, description="milliseconds from the first byte")


class Timing(BaseModel):
    """Where the time went, in milliseconds."""

    decode: float = Field(ge=0, description="decoding and preprocessing")
    queue: float = Field(ge=0, description="waiting for stage batches")
    compute: float = Field(ge=0, description="in stage batches")
    total: float = Field(ge=0, description="from the first byte to this answer")


class AnswerBody(BaseModel):
    """One image's answer."""

    label: str = Field(description="the likeliest label")
    class_id: int = Field(ge=0, description="its place in the labels of /model")
    confidence: float = Field(
        ge=0, le=1, description="calibrated: of answers at 0.9, about 90 % are right"
    )
    exit: int = Field(ge=1, description="the exit that answered; 1 is the shallowest")
    exits: int = Field(ge=1, description="how many exits the network has")
    reason: Reason = Field(description="why this exit answered")
    degraded: bool = Field(description="shallower than asked for, by load or deadline")
    top_k: list[Label] = Field(description="the likeliest labels, best first")
    model: str = Field(description="the bundle's name")
    version: str = Field(description="the bundle's version")
    request_id: str = Field(description="as in the `X-Request-ID` header")
    timing_ms: Timing = Field(description="where the time went")
    seen: list[SeenBody] | None = Field(
        None, description="only with `explain`: every exit on the way"
    )


class ErrorBody(BaseModel):
    """Any failure."""

    error: str = Field(description="a sentence for people")
    code: str = Field(description="a stable name for programs")
    request_id: str = Field(description="what the log knows the request by")


class BatchBody(BaseModel):
    """Answers and errors, in the order of the images."""

    results: list[AnswerBody | ErrorBody] = Field(description="one for each image, in order")


class ExitBody(BaseModel):
    """One exit of the network."""

    exit: int = Field(ge=1, description="1 is the shallowest")
    macs: int = Field(description="multiply-accumulates to answer from here")
    macs_share: float = Field(ge=0, le=1, description="those, as a share of the whole network's")
    parameters: int = Field(description="parameters that an image answered from here uses")
    accuracy: float | None = Field(description="top-1 on the test images, if measured")


class ModelBody(BaseModel):
    """The network that answers."""

    name: str = Field(description="the bundle's name")
    version: str = Field(description="the bundle's version")
    architecture: str = Field(description="the network's family")
    weights_sha256: str = Field(description="digest of its weights")
    device: str = Field(description="where it runs: cpu or cuda")
    dtype: str = Field(description="its numerics")
    input_size: int = Field(description="side of the network's input, in pixels")
    labels: list[str] = Field(description="by class id")
    exits: list[ExitBody] = Field(description="shallow to deep")


class PolicyBody(BaseModel):
    """The calibrated policy, and which of its operating points is in force."""

    method: str = Field(description="how the operating points were chosen")
    delta: float = Field(ge=0, le=1, description="probability that a certified bound fails")
    calibration_images: int = Field(description="how many images it was calibrated on")
    operating_points: list[OperatingPoint] = Field(
        description="from the smallest accuracy loss to the largest"
    )
    in_force: OperatingPoint = Field(description="in peace; overload may bend it")
    overloaded: bool = Field(description="whether overload bends it now")


class LevelBody(BaseModel):
    """One level that overload may move to."""

    max_accuracy_loss: float = Field(description="its bound; 1 where only the first exit answers")
    thresholds: list[float] = Field(description="confidence that suffices, by exit but the last")


class EngineBody(BaseModel):
    """What the scheduler decides with, as it is now."""

    seconds: dict[int, dict[int, float]] = Field(
        description="expected seconds of a batch, by stage, then by batch size"
    )
    teams: dict[int, float] = Field(
        description="what a single image takes with a team of threads, as a share of its seconds, "
        "by stage"
    )
    ladder: list[LevelBody] = Field(description="from peace to the most lossy level allowed")
    max_batch: int = Field(description="most images in one stage batch")
    workers: int = Field(description="stage batches that run at the same time")
    most_workers: int = Field(
        description="that would, were HTTP not to need the last one's core at times"
    )
    http_seconds: float = Field(
        description="what a request is taken to cost beside its stages, where the last worker has "
        "the core that this is done on; 0 where every worker has one of its own"
    )
    backlog_seconds: float = Field(description="what is queued is expected to take so long")


class PolicyChange(BaseModel):
    """Which operating point to put in force."""

    model_config = ConfigDict(extra="forbid")

    max_accuracy_loss: float = Field(
        ge=0,
        le=1,
        strict=True,  # or `true` would be the number 1
        description="the most accuracy it may lose, as a share",
        examples=[0.01],
    )


def error_body(error: OfframpError, request_id: str) -> dict[str, Any]:
    """An error as it goes over the wire."""
    return {"error": str(error), "code": error.code, "request_id": request_id}


def top_labels(probabilities: np.ndarray, labels: tuple[str, ...], k: int) -> list[dict[str, Any]]:
    """The `k` likeliest labels, best first.

    Args:
        probabilities: float32 `[classes]`.
        labels: by class id.
    """
    best = (-probabilities).argsort(kind="stable")[:k].tolist()
    return [
        {
            "label": labels[i],
            "class_id": i,
            "probability": round(float(probabilities[i]), ROUNDING),
        }
        for i in best
    ]


def seen_body(seen: Seen, labels: tuple[str, ...]) -> dict[str, Any]:
    """One exit on the way, as `explain` and the event stream show it."""
    return {
        "exit": seen.exit,
        "label": labels[seen.class_id],
        "class_id": seen.class_id,
        "confidence": round(seen.confidence, ROUNDING),
        "elapsed_ms": round(seen.milliseconds, 3),
    }


def answer_body(
    answer: Answer,
    parameters: Parameters,
    labels: tuple[str, ...],
    exits: int,
    context: Mapping[str, Any],
) -> dict[str, Any]:
    """An answer as it goes over the wire, in the order of the contract.

    Args:
        context: `model`, `version`, `request_id`, `timing_ms`.
    """
    best = top_labels(answer.probabilities, labels, parameters.top_k)
    body = {
        "label": best[0]["label"],
        "class_id": best[0]["class_id"],
        "confidence": round(answer.confidence, ROUNDING),
        "exit": answer.exit,
        "exits": exits,
        "reason": answer.reason.value,
        "degraded": answer.degraded,
        "top_k": best,
        **context,
    }
    if parameters.explain:
        body["seen"] = [seen_body(seen, labels) for seen in answer.seen]
    return body


def event(name: str, data: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), to_json(data))
