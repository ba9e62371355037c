"""When a request came, and how far the event loop is behind."""

from __future__ import annotations

from starlette.types import Scope

from server.errors import InvalidParameter
from server.protocol import parameters_from

ARRIVED, READ = "offramp.arrived", "offramp.read"
"""In a request's scope: `time.perf_counter` when its first byte and its whole head were read."""
TIMES_BEHIND = 3
"""A request that waited to begin has waited before, where it cannot be seen, to be read, and its
answer will wait to be sent, beside the stages it needs."""
NOT_BEHIND_SECONDS = 0.001
"""What a loop with nothing else to do may take to begin a request."""


def arrival(scope: Scope, now: float) -> float:
    """When a request's first byte came."""
    came: float = scope.get(ARRIVED, now)
    return came


def seconds_behind(scope: Scope, now: float) -> float:
    """How long a request whose head is complete has waited for the event loop to begin it."""
    return now - float(scope.get(READ, now))


def is_hopeless(scope: Scope, behind: float, default_deadline_ms: float | None) -> bool:
    """Whether the event loop is so far behind that an answer would be late.

    Args:
        scope: of a request for an answer.
        behind: as `seconds_behind` says.
        default_deadline_ms: of requests that name none, if they have one.
    """
    if behind <= NOT_BEHIND_SECONDS:
        return False
    try:
        deadline_ms = parameters_from(scope["query_string"]).deadline_ms or default_deadline_ms
    except InvalidParameter:
        return False  # it must not be told to try again
    return deadline_ms is not None and TIMES_BEHIND * behind > deadline_ms / 1e3
