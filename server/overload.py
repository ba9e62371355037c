"""The controller that trades accuracy for time under load.

It moves along a ladder of operating points, from the one in force in peace to the most lossy one
allowed. Up at once, as far as the predicted wait asks, as a share of the time that requests usually
allow, or the places taken, as a share of all; but no further than the load asks while all that
waits can still be answered. Down a level at a time, and only to a level that bears the load: the
present rate of arrivals times the work that an answer took when that level was last in force must
leave the device some rest. The wait alone cannot tell, since a shallower level makes it short while
the load is as large as before. At the end of a burst the rate falls at once, and full depth is back
within a second. What is known of a level fades, so that under a load that stays each is tried again
now and then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CALM = 0.3
"""Share of the usual deadline that may be spent waiting before answers get shallower."""
FIRM = 0.5
"""Share of it from which on answers are as shallow as they may get, while what waits can still be
answered in time: nearer to the deadline, much of it would be refused."""
CROWDED, FULL = 0.6, 0.9
"""The like of both, as shares of the server's places: where requests allow long, those are taken
before the wait counts as long, and what finds none is refused."""
BEARABLE = 0.9
"""Share of the device's time that the load may be expected to take at a level moved down to."""
RECOVERY_SECONDS = 0.6
"""From the most lossy level back to peace, once that bears the load…"""
RATE_SECONDS = 0.15
"""…which takes about so long to be noticed: the rate of arrivals is an average over that time."""
FADING_SECONDS = 60.0
"""A level out of force for so long counts for a third (1/e) of the work last measured at it, so
that it is tried again."""
UNLIMITED_BUDGET_SECONDS = 0.5
"""What counts as the usual deadline where requests have none."""
LEARNING_RATE = 0.05
"""Weight of one request in the usual deadline, a mean of logarithms…"""
MOST_FACTOR = 2.0
"""…in which none counts as being further than this factor away: a few requests that allow an hour
must not keep the others' answers from bending."""
WORK_LEARNING_RATE = 0.01
"""Weight of one answer in the work known of a level."""


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
        self._rate = 0.0
        self._arrived = 0.0
        # By level; one that was never in force is known by no work, so it will be tried.
        self._work = [0.0] * len(self._ladder)
        self._in_force = [0.0] * len(self._ladder)

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

    @property
    def calm_seconds(self) -> float:
        """The longest wait that bends nothing."""
        return CALM * self._budget

    def saw_arrival(self, now: float) -> None:
        """Count one request; `now` is in seconds of the engine's clock, like all that follow."""
        self._rate = self._rate_at(now) + 1 / RATE_SECONDS
        self._arrived = now

    def saw_answers(self, count: int, work_seconds: float) -> None:
        """Learn what the level in force costs: so much device time for each of these answers."""
        known = self._work[self._index] or work_seconds
        weight = min(1.0, WORK_LEARNING_RATE * count)
        self._work[self._index] = known + weight * (work_seconds - known)

    def saw_deadline(self, seconds: float) -> None:
        """Learn how long requests usually allow, from one that allows more than nothing."""
        factor = min(max(seconds / self._budget, 1 / MOST_FACTOR), MOST_FACTOR)
        self._budget *= factor**LEARNING_RATE

    def update(self, predicted_wait_seconds: float, now: float, places_taken: float = 0.0) -> Level:
        """The level for this predicted wait, and this share of the server's places taken."""
        self._in_force[self._index] = now
        wanted = self._wanted(predicted_wait_seconds, places_taken, now)
        while wanted < self._index and not self._bears(wanted, now):
            wanted += 1
        if wanted >= self._index:
            self._index, self._changed = wanted, now
            return self.level
        pause = RECOVERY_SECONDS / (len(self._ladder) - 1)
        steps = int((now - self._changed) / pause)
        if steps:
            self._index, self._changed = max(wanted, self._index - steps), now
        return self.level

    def _rate_at(self, now: float) -> float:
        return self._rate * math.exp((self._arrived - now) / RATE_SECONDS)

    def _bears(self, index: int, now: float) -> bool:
        known = math.exp((self._in_force[index] - now) / FADING_SECONDS)
        return self._rate_at(now) * self._work[index] * known < BEARABLE

    def _wanted(self, wait: float, places_taken: float, now: float) -> int:
        top = len(self._ladder) - 1
        late = (wait / self._budget - CALM) / (FIRM - CALM)
        full = (places_taken - CROWDED) / (FULL - CROWDED)
        pressure = max(late, full)
        if pressure <= 0:
            return 0
        asked = min(top, 1 + int(pressure * top))
        if pressure >= 1:
            return asked
        # What waits will be answered as it is: a few that met by chance bend nothing.
        return next((i for i in range(asked) if self._work[i] and self._bears(i, now)), asked)
