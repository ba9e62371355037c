"""Everything that decides what a training run computes."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Recipe:
    """Hyperparameters of one run; each field is an option of `python -m training train`."""

    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 0.1
    warmup: float = 0.15
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    distillation_weight: float = 0.3
    feature_weight: float = 0.0
    temperature: float = 3.0
    pad: int = 4
    cutout: int = 0
    seed: int = 0


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """One cycle: linear warm-up over `recipe.warmup` of all steps, then cosine down to zero."""
    rise = max(1, round(recipe.warmup * steps))
    if step < rise:
        return recipe.learning_rate * (step + 1) / rise
    progress = (step - rise) / max(1, steps - rise)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
