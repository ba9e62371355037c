"""What a run trains on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from model.preprocess import Preprocess
from training.checkpoint import Origin
from training.data import Images
from training.distributed import Processes
from training.recipe import Recipe
from training.student import StudentOutputs
from training.teacher import Teacher


@dataclass(frozen=True, slots=True)
class Work:
    """All that stays the same while a run changes."""

    recipe: Recipe
    training: Images
    validation: Images
    preprocess: Preprocess
    folder: Path
    origin: Origin
    processes: Processes
    forward: Callable[..., StudentOutputs]
    """The student, perhaps wrapped or compiled."""
    class_weights: Tensor | None = None
    teacher: Teacher | None = None
    after_step: Callable[[int], None] = lambda step: None
    """Called with each step that was done."""

    @property
    def steps_an_epoch(self) -> int:
        """Whole batches; the rest of an epoch's images waits for another."""
        return len(self.training) // self.recipe.batch_size
