"""The learning rate over a run."""

from __future__ import annotations

import math
from typing import NamedTuple

from training.recipe import CONSTANT, ONE_CYCLE, STEPS, Recipe

DIP = 0.1
"""How far one-cycle lowers the momentum while the learning rate is highest (Smith 2018)."""
START = 1 / 25
"""Where one-cycle begins, as a share of the highest learning rate."""


class Pace(NamedTuple):
    """How fast gradient descent goes at one step."""

    learning_rate: float
    momentum: float


def pace(recipe: Recipe, step: int, steps: int) -> Pace:
    """Learning rate with momentum at `step` of `steps`."""
    share = _rise(recipe, step, steps)
    if recipe.schedule == ONE_CYCLE:
        rate = START + (1 - START) * share if step < _top(recipe, steps) else share
        momentum = max(0.0, recipe.momentum - DIP * min(share, 1.0))
        return Pace(recipe.learning_rate * rate, momentum)
    return Pace(recipe.learning_rate * share, recipe.momentum)


def _top(recipe: Recipe, steps: int) -> int:
    return max(1, round(recipe.warmup * steps))


def _rise(recipe: Recipe, step: int, steps: int) -> float:
    """Linear warm-up, then what the schedule says."""
    top = _top(recipe, steps)
    if step < top:
        return (step + 1) / top
    if recipe.schedule == CONSTANT:
        return 1.0
    if recipe.schedule == STEPS:
        return _divided(recipe.epochs, step * recipe.epochs // steps)
    progress = (step - top) / max(1, steps - top)
    return 0.5 * (1 + math.cos(math.pi * progress))


def _divided(epochs: int, epoch: int) -> float:
    """A tenth at one third, two thirds and ten epochs from the end, as the method's authors do.

    The last border is left out of runs so short that it would not come after the others.
    """
    thirds = epochs // 3, 2 * epochs // 3
    borders = {b for b in (*thirds, max(thirds[1], epochs - 10)) if b > 0}
    return 0.1 ** sum(epoch >= border for border in borders)
