"""Reference recipes by name."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from model.architectures import ARCHITECTURES
from model.exits import HEADS
from model.network import PLACES
from training.options import check_choices, option
from training.recipe import ENSEMBLE, ONE_CYCLE, STEPS, Recipe


@dataclass(frozen=True, slots=True)
class Shape:
    """What is trained; each field is an option of `python -m training train`."""

    architecture: str = option("resnet18", "the backbone", tuple(sorted(ARCHITECTURES)))
    width: int | None = option(
        None, "channels of the first stage (default: the architecture's)", kind=int
    )
    attention: bool = option(True, "attention gates in the heads of exits")
    head: str | None = option(
        None,
        "of exits: paper as published, compact narrower (default: the architecture's)",
        tuple(HEADS),
        kind=str,
    )
    exits: str = option(PLACES[0], "an exit after each of these", PLACES)
    keep: str | None = option(
        None, "the exits to build, counted from shallow, such as 1,3,4 (default: all)", kind=str
    )
    size: int | None = option(
        None,
        "side of the square input, in pixels (default: 32 for images up to 64, else 224)",
        kind=int,
    )
    stem: int | None = option(
        None,
        "32 keeps the resolution, 224 divides it by four (default: 32 for sizes up to 64)",
        kind=int,
    )
    crop: float = option(1.0, "share of the shorter side that is kept outside training")

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop must be above 0 and at most 1, not {self.crop}")
        if self.size is not None and not 8 <= self.size <= 1024:
            raise ValueError(f"size must be between 8 and 1024 pixels, not {self.size}")
        if self.keep is not None and not all(e.strip().isdigit() for e in self.keep.split(",")):
            raise ValueError(f"keep must be numbers with commas, such as 1,3,4, not {self.keep}")


@dataclass(frozen=True, slots=True)
class Preset:
    """A recipe for a shape."""

    help: str
    recipe: Recipe = field(default_factory=Recipe)
    shape: Shape = field(default_factory=Shape)

    def with_options(self, given: dict[str, Any]) -> Preset:
        """The preset with some fields of its recipe or shape replaced.

        Raises:
            ValueError: a field is out of range.
        """
        own = {f.name for f in fields(Recipe)}
        recipe = {name: value for name, value in given.items() if name in own}
        shape = {name: value for name, value in given.items() if name not in own}
        return replace(
            self, recipe=replace(self.recipe, **recipe), shape=replace(self.shape, **shape)
        )


_AUTHORS = Recipe(
    epochs=250,
    batch_size=128,
    learning_rate=0.1,
    schedule=STEPS,
    warmup=0.0,
    momentum=0.9,
    nesterov=False,
    weight_decay=5e-4,
    decay_all=True,
    distillation_weight=0.3,
    temperature=3.0,
    feature_weight=0.03,
    pad=4,
)

PRESETS = {
    "fast": Preset("30 epochs in one cosine cycle, with crops and mirrors alone"),
    "paper": Preset(
        "the method as published in 2021, from its authors' code",
        replace(_AUTHORS, distort="auto", cutout=16),
        Shape(head="paper"),
    ),
    "paper-2019": Preset(
        "the method as first published, after its public reproduction: no attention, no "
        "AutoAugment or Cutout, Hinton's factor",
        # There the feature term is summed over whole maps with weight 1e-6; here it compares
        # pooled features, so its weight is the later paper's.
        replace(_AUTHORS, epochs=200, distillation_weight=0.1, temperature_squared=True),
        Shape(head="paper", attention=False),
    ),
    "best": Preset(
        "the modern levers that helped others most",
        Recipe(
            epochs=200,
            schedule=ONE_CYCLE,
            warmup=0.2,
            distill_from=ENSEMBLE,
            distillation_weight=0.5,
            temperature_squared=False,
            equilibrium=True,
            ema=0.999,
            distort="trivial",
            cutmix=0.5,
        ),
    ),
}
"""Each is reproduced by its name with a seed alone."""
