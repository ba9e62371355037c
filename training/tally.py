"""What every step of a nested path of thresholds loses and gains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.outcomes import Outcomes


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of images at each step of a path, from the full network to the boldest thresholds."""

    losses: np.ndarray
    """int64 `[steps]`: only the full network is right."""
    gains: np.ndarray
    """int64 `[steps]`: only the early answer is right."""
    ever_lost: np.ndarray
    """int64 `[steps]`: lost at this step or at a safer one, so never falling."""


def tally(outcomes: Outcomes, path: Sequence[tuple[float, ...]]) -> Tally:
    """Count along a whole path at once.

    Thresholds never rise along a nested path, so an image leaves at one exit for a run of steps: it
    begins where that exit's threshold falls to the image's confidence (`suffices`), and ends where
    a shallower exit's does. The cost is that of a few sorts, however many steps there are.
    """
    steps, n, deepest = len(path), len(outcomes), outcomes.exits - 1
    thresholds = np.array(path).reshape(steps, deepest)
    losses, gains = np.zeros(steps + 1, np.int64), np.zeros(steps + 1, np.int64)
    end, lost_from = np.full(n, steps), np.full(n, steps)
    for k in range(deepest):
        begin = np.searchsorted(-thresholds[:, k], -outcomes.confidence[:, k])
        difference = outcomes.differences(np.full(n, k + 1))
        for counts, sign in ((losses, 1), (gains, -1)):
            chosen = (difference == sign) & (begin < end)
            np.add.at(counts, begin[chosen], 1)
            np.subtract.at(counts, end[chosen], 1)
            if sign == 1:
                lost_from[chosen] = np.minimum(lost_from, begin)[chosen]
        end = np.minimum(end, begin)
    ever_lost = np.bincount(lost_from, minlength=steps + 1)
    return Tally(*(np.cumsum(counts)[:-1] for counts in (losses, gains, ever_lost)))
