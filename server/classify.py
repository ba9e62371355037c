"""One image from bytes to its answer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.policy import OperatingPoint, Rule
from server.arrival import is_late, reserve_seconds
from server.context import Context
from server.engine import Engine
from server.errors import InvalidParameter, OfframpError, Overloaded
from server.loaded import Loaded
from server.parameters import Parameters
from server.protocol import answer_body, error_body
from server.served import Served
from server.tickets import Answer, Seen


@dataclass(frozen=True, slots=True)
class Admission:
    """What a request is let in with before its body is read, so that a drain still answers it."""

    parameters: Parameters
    rule: Rule
    loaded: Loaded
    """The bundle that answers it, though another may take its place meanwhile."""
    engine: Engine
    promised: float
    """When its client wants the answer, on the engine's clock."""
    deadline: float
    """When the engine must have given it."""
    late_at: float
    """When the event loop began its request, if that took long."""


def admit(
    parameters: Parameters, served: Served, context: Context, former: Admission | None = None
) -> Admission:
    """Let a request in.

    Args:
        former: by which it was let in before its parameters were known.

    Raises:
        InvalidParameter: it asks for what the network does not have.
        Unavailable: the server is warming up, draining or stuck.
    """
    loaded = former.loaded if former else served.loaded
    rule = rule_for(parameters, loaded)
    engine = former.engine if former else served.engine
    allowed = parameters.allowed_seconds(served.settings.default_deadline_ms)
    promised = context.arrived + allowed
    deadline = promised - max(reserve_seconds(allowed), context.behind)
    late_at = context.began if is_late(context.behind, allowed) else -math.inf
    return Admission(parameters, rule, loaded, engine, promised, deadline, late_at)


def rule_for(parameters: Parameters, loaded: Loaded) -> Rule:
    """The rule that these parameters ask for.

    Raises:
        InvalidParameter: an exit that the network does not have, or none left to answer; an
            operating point that the policy does not have, or a threshold beside it.
    """
    exits = loaded.policy.exits
    max_exit = parameters.max_exit or exits
    for name, exit in (("min_exit", parameters.min_exit), ("max_exit", max_exit)):
        if exit > exits:
            raise InvalidParameter(f"{name}: there is no exit {exit}; the network has {exits}")
    if parameters.min_exit > max_exit:
        raise InvalidParameter("min_exit: must not be deeper than max_exit")
    point = _point_for(parameters, loaded)
    return loaded.policy.rule(point, parameters.threshold, parameters.min_exit, parameters.max_exit)


def _point_for(parameters: Parameters, loaded: Loaded) -> OperatingPoint:
    if parameters.max_accuracy_loss is None:
        return loaded.point
    if parameters.threshold is not None:
        raise InvalidParameter("threshold: send it or max_accuracy_loss, not both")
    try:
        return loaded.policy.point_for(parameters.max_accuracy_loss)
    except ValueError as error:
        raise InvalidParameter(f"max_accuracy_loss: {error}") from None


@contextmanager
def queue_place(served: Served) -> Iterator[None]:
    """Hold a place in the server before any work is done for an image.

    Raises:
        Overloaded: every place is taken.
    """
    if served.in_flight >= served.settings.max_queue:
        served.metrics.refused.labels("queue_full").inc()
        raise Overloaded(served.loaded.backlog_seconds)
    served.in_flight += 1
    try:
        yield
    finally:
        served.in_flight -= 1


async def answered(
    image: bytes | np.ndarray,
    admission: Admission,
    served: Served,
    context: Context,
    on_exit: Callable[[Seen], None] | None = None,
) -> tuple[Answer, float]:
    """Decode, schedule and answer one image.

    Args:
        image: encoded, or uint8 pixels `[H, W, 3]` of any size.
        on_exit: called for each exit passed.

    Returns:
        The answer, and the seconds that decoding took.

    Raises:
        OfframpError: any of its subclasses that concern one image.
    """
    engine, deadline = admission.engine, admission.deadline
    with queue_place(served):
        served.waiting.check(engine)  # before any work is done in vain
        engine.check(deadline)
        pixels, decode_seconds = await admission.loaded.decoder(image, deadline)
        ticket = engine.submit(
            pixels,
            admission.rule,
            context.arrived,
            deadline,
            bends=admission.parameters.bends,
            late_at=admission.late_at,
            on_exit=on_exit,
            request_id=context.request_id,
        )
        answer = await served.waiting.answer(ticket, engine)
    if math.isfinite(admission.promised):
        served.metrics.answered_by(admission.promised, time.perf_counter())
    if context.trace:
        context.trace.image(context.arrived, ticket.accepted, decode_seconds, answer)
    return answer, decode_seconds


async def classify(
    data: bytes,
    admission: Admission,
    served: Served,
    context: Context,
    on_exit: Callable[[Seen], None] | None = None,
) -> dict[str, Any]:
    """Like `answered`; returns the answer as it goes over the wire."""
    answer, decode_seconds = await answered(data, admission, served, context, on_exit)
    return _body(answer, admission, context, decode_seconds)


async def classify_or_error(
    data: bytes, admission: Admission, served: Served, context: Context
) -> dict[str, Any]:
    """Like `classify`, for one of several images: its failure is its own entry."""
    try:
        return await classify(data, admission, served, context)
    except OfframpError as error:
        return error_body(error, context.request_id)


def _body(
    answer: Answer, admission: Admission, context: Context, decode_seconds: float
) -> dict[str, Any]:
    loaded = admission.loaded
    description = loaded.bundle.description
    timing = {
        "decode": round(1e3 * decode_seconds, 3),
        "queue": round(1e3 * answer.queue_seconds, 3),
        "compute": round(1e3 * answer.compute_seconds, 3),
        "total": round(1e3 * (time.perf_counter() - context.arrived), 3),
    }
    return answer_body(
        answer,
        admission.parameters,
        description.classes,
        loaded.policy.exits,
        {
            "model": description.name,
            "version": description.version,
            "request_id": context.request_id,
            "timing_ms": timing,
        },
    )
