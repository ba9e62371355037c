"""When a request came, and how far the event loop is behind."""

from __future__ import annotations

import math

from starlette.types import Scope

from server.errors import InvalidParameter
from server.parameters import parameters_from

ARRIVED, READ = "offramp.arrived", "offramp.read"
"""In a request's scope: `time.perf_counter` when its first byte and its whole head were read."""
BODY = "offramp.body"
"""There too, once any of its body has been read, or it is known to have none."""
TIMES_BEHIND = 3
"""How often a request waits as long as it has waited to begin: before, to be read, where it cannot
be seen; and its answer will, to be sent."""
TIMES_LATE = 10
"""How often it would have to wait so for a loop that wants a core more to itself."""
NOT_BEHIND_SECONDS = 0.001
"""What a loop with nothing else to do may take to begin a request."""
RESERVE_SECONDS = 0.01
"""Kept back from each deadline for what is not the engine's: a request waits to be read, and its
answer to be sent. That takes 1 ms on an idle machine, and 10 where every core is wanted…"""
RESERVE_SHARE = 0.2
"""…but never more than this share of it."""


def arrival(scope: Scope, now: float) -> float:
    """When a request's first byte came."""
    came: float = scope.get(ARRIVED, now)
    return came


def seconds_behind(scope: Scope, now: float) -> float:
    """How long a request whose head is complete has waited for the event loop to begin it."""
    return now - float(scope.get(READ, now))


def allowed_seconds(scope: Scope, default_deadline_ms: float | None) -> float:
    """How long a request for an answer allows; infinite where there is no deadline.

    Args:
        scope: of the request.
        default_deadline_ms: of requests that name none, if they have one.
    """
    try:
        return parameters_from(scope["query_string"]).allowed_seconds(default_deadline_ms)
    except InvalidParameter:
        return math.inf  # it must not be told to try again


def is_hopeless(behind: float, allowed: float) -> bool:
    """Whether the event loop is so far behind that an answer would be late.

    Args:
        behind: as `seconds_behind` says.
        allowed: as `allowed_seconds` says.
    """
    return behind > NOT_BEHIND_SECONDS and TIMES_BEHIND * behind > allowed


def is_late(behind: float, allowed: float) -> bool:
    """Whether the event loop takes long to begin requests, for what one allows. Arguments as for
    `is_hopeless`, of whom each was late first.
    """
    return behind > NOT_BEHIND_SECONDS and TIMES_LATE * behind > allowed


def reserve_seconds(allowed: float) -> float:
    """What is kept back from a deadline so many seconds away."""
    return min(RESERVE_SECONDS, RESERVE_SHARE * allowed)
