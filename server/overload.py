"""The controller that trades accuracy for time under load.

It moves along a ladder of operating points, from the one in force in peace to the most lossy one
allowed. The level follows the predicted wait, as a share of the time that requests usually allow:
up at once, down one level at a time, so that full depth is back within `RECOVERY_SECONDS` of the
end of a burst without flapping between two levels on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CALM = 0.3
"""Share of the usual deadline that may be spent waiting before answers get shallower."""
RECOVERY_SECONDS = 0.8
"""From the most lossy level back to peace, once the wait is calm."""
UNLIMITED_BUDGET_SECONDS = 0.5
"""What counts as the usual deadline where requests have none."""
LEARNING_RATE = 0.05


@dataclass(frozen=True, slots=True)
class Level:
    """One rung of the ladder."""

    max_accuracy_loss: float
    """Its bound; 1 where only the first exit answers."""
    thresholds: tuple[float, ...]
    """One for each exit but the deepest."""


class OverloadController:
    """Decides how far answers bend.

    Args:
        ladder: from peace (first) to the most lossy level allowed.
        deadline_seconds: the server's default deadline, the first guess of the usual one.
    """

    def __init__(self, ladder: Sequence[Level], deadline_seconds: float | None) -> None:
        self._ladder = tuple(ladder)
        self._budget = deadline_seconds or UNLIMITED_BUDGET_SECONDS
        self._index = 0
        self._changed = 0.0

    @property
    def ladder(self) -> tuple[Level, ...]:
        """From peace to the most lossy level allowed."""
        return self._ladder

    @property
    def level(self) -> Level:
        """The level in force."""
        return self._ladder[self._index]

    @property
    def bent(self) -> bool:
        """Whether answers are shallower than in peace."""
        return self._index > 0

    def saw_deadline(self, seconds: float) -> None:
        """Learn how long requests usually allow."""
        self._budget += LEARNING_RATE * (seconds - self._budget)

    def update(self, predicted_wait_seconds: float, now: float) -> Level:
        """The level for this predicted wait; `now` is in seconds of the engine's clock."""
        wanted = self._wanted(predicted_wait_seconds)
        if wanted >= self._index:
            self._index, self._changed = wanted, now
            return self.level
        pause = RECOVERY_SECONDS / (len(self._ladder) - 1)
        steps = int((now - self._changed) / pause)
        if steps:
            self._index, self._changed = max(wanted, self._index - steps), now
        return self.level

    def _wanted(self, wait: float) -> int:
        top = len(self._ladder) - 1
        pressure = (wait / self._budget - CALM) / (1 - CALM)
        if pressure <= 0:
            return 0
        return min(top, 1 + int(pressure * top))
