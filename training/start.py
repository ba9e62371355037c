"""Where on a path of thresholds the tests of each bound begin."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from training import risk
from training.ladder import LOSSES, Method, Thresholds
from training.outcomes import Outcomes

DECIMALS = 2
"""Of the chances that are compared."""


def first_steps(
    path: Sequence[Thresholds], searched: Outcomes, n: int, method: Method, delta: float
) -> dict[float, int]:
    """For each bound, the most careful of the steps that are likeliest to be certified.

    A step that fails its test ends all tests. With few images that may be the most careful one:
    losing nothing is no proof then, while a bolder step may gain more than it loses. Other methods
    count no gains, so there the most careful step is always the likeliest.

    Args:
        path: nested thresholds, full network first.
        searched: of the images that the path was found on. Nothing but their number is known here
            of those that certify, so each sequence of tests is fixed before these are looked at.
        n: how many images certify.
        method, delta: of the tests.
    """
    if method is not Method.PAIRED or len(path) == 1:
        return {}
    losses, gains = np.array([_differences(searched, step) for step in path[1:]]).T
    chances = {b: risk.paired_powers(losses, gains, n, b, delta) for b in LOSSES if b}
    return {bound: 1 + int(np.argmax(chance.round(DECIMALS))) for bound, chance in chances.items()}


def _differences(outcomes: Outcomes, thresholds: Thresholds) -> tuple[float, float]:
    """The shares lost and gained, by the full network's calibrated probabilities.

    As in the search, they have less noise than the labels.
    """
    everyone, exit = np.arange(len(outcomes)), outcomes.taken(thresholds) - 1
    differs = outcomes.answers[everyone, exit] != outcomes.answers[:, -1]
    full, early = outcomes.belief[:, -1], outcomes.belief[everyone, exit]
    return float((full * differs).mean()), float((early * differs).mean())
