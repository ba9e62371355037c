"""What a client holds of its job, from its submission to its answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from model.policy import Reason
from server.errors import OfframpError
from server.jobs import Job
from server.promise import Loop, Promise
from server.rows import Row

log = logging.getLogger("offramp.engine")

DEGRADED = (Reason.DEADLINE, Reason.OVERLOAD)


@dataclass(frozen=True, slots=True)
class Seen:
    """What one exit said of an image."""

    exit: int
    class_id: int
    confidence: float
    milliseconds: float
    """From the image's arrival."""
    compute_milliseconds: float = 0.0
    """Of those, computing."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A job's result."""

    exit: int
    reason: Reason
    confidence: float
    probabilities: np.ndarray
    """Calibrated, float32 `[classes]`."""
    seen: tuple[Seen, ...]
    queue_seconds: float
    compute_seconds: float

    @property
    def degraded(self) -> bool:
        """Whether load or a deadline made it shallower than its rule asked for."""
        return self.reason in DEGRADED


@dataclass(slots=True, eq=False)
class Ticket:
    """A client's hold on a job: where its exits and its answer go."""

    loop: Loop
    promise: Promise[Answer]
    on_exit: Callable[[Seen], None] | None
    accepted: float
    inputs: np.ndarray | Row | None
    request_id: str = ""
    """What the log says of it if its run fails."""
    job: Job | None = None
    """Until it is settled."""
    seen: list[Seen] = field(default_factory=list)
    confidence: float = 0.0
    probabilities: np.ndarray | None = None
    compute_seconds: float = 0.0

    def settle(self, result: Answer | OfframpError) -> None:
        """Hand over the result, in the client's loop; a no-op on a ticket that is done."""
        if self.promise.done():
            return
        if isinstance(result, Answer):
            self.promise.set_result(result)
        else:
            self.promise.set_exception(result)

    def release(self) -> None:
        """Let go of what only a job in flight needs, features above all."""
        self.job = self.inputs = None


class Outbox:
    """Gathers what a turn of the engine has to tell, and wakes each client's loop once for it."""

    def __init__(self) -> None:
        self._calls: dict[Loop, list[Callable[[], None]]] = {}

    def show(self, ticket: Ticket, seen: Seen) -> None:
        """Tell the client of an exit on the way, if it wants to know."""
        if on_exit := ticket.on_exit:
            self._add(ticket, lambda: on_exit(seen))

    def settle(self, ticket: Ticket, result: Answer | OfframpError) -> None:
        """Tell the client its result."""
        self._add(ticket, lambda: ticket.settle(result))

    def send(self) -> None:
        """Send everything."""
        calls, self._calls = self._calls, {}
        for loop, functions in calls.items():
            try:
                loop.call_soon_threadsafe(_call_all, functions)
            except RuntimeError:  # the client's event loop is closed
                log.debug("a client's event loop closed before its answer came")

    def _add(self, ticket: Ticket, function: Callable[[], None]) -> None:
        self._calls.setdefault(ticket.loop, []).append(function)


def _call_all(functions: list[Callable[[], None]]) -> None:
    for function in functions:
        function()
