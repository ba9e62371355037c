"""What a request carries along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from server.tracing import RequestTrace

CLIENT_CLOSED = 499
"""What a request counts as whose client went away, as in nginx."""


@dataclass(slots=True)
class Context:
    """One request's; `scope["state"]["context"]` holds it."""

    request_id: str
    arrived: float
    """When its first byte came, on the engine's clock."""
    behind: float = 0.0
    """Seconds that the event loop took to begin it…"""
    began: float = 0.0
    """…which was then."""
    route: str | None = None
    """Where images are answered; None for any other path."""
    status: int = CLIENT_CLOSED
    fields: dict[str, object] = field(default_factory=dict)
    """What the log line says beside the usual."""
    server_timing: str = ""
    trace: RequestTrace | None = None
    """Its spans, where somebody wants them."""
    started: bool = False
    body_bytes: int = 0
    """Of its body, those that have been read."""

    def note_answer(self, body: Mapping[str, Any]) -> None:
        """Have the log line say who answered, and why."""
        self.fields.update(exit=body["exit"], reason=body["reason"])
