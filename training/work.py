"""What a run trains on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from model.preprocess import Preprocess
from training.captured import Recorder
from training.checkpoint import Origin
from training.data import Images
from training.distributed import Processes
from training.recipe import Recipe
from training.student import StudentOutputs
from training.teacher import Teacher

SAVE_SECONDS = 30.0
"""Writing a checkpoint may take as long as an epoch on a card."""


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
    record: Recorder | None = None
    """How a step is captured; each batch must then be whole."""
    steps_at_once: int = 1
    """Whose images are augmented together; each batch must then be whole."""
    save_seconds: float = SAVE_SECONDS
    """How old a checkpoint may be at the end of an epoch without being replaced."""
    after_step: Callable[[int], None] = lambda step: None
    """Called with each step that was done."""

    @property
    def steps_an_epoch(self) -> int:
        """Whole batches; the rest of an epoch's images waits for another."""
        return len(self.training) // self.recipe.batch_size
