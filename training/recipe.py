"""Everything that decides what a training run computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from training.options import check_choices, option

SELF_DISTILLATION, DEEP_SUPERVISION, PLAIN = METHODS = (
    "self-distillation",
    "deep-supervision",
    "plain",
)
DEEPEST, ENSEMBLE, NEXT = SOURCES = ("deepest", "ensemble", "next")
COSINE, ONE_CYCLE, STEPS, CONSTANT = SCHEDULES = ("cosine", "one-cycle", "steps", "constant")
DISTORTIONS = ("none", "trivial", "auto")
PRECISIONS = ("bf16", "fp16", "fp32")
CLASS_WEIGHTS = ("none", "balanced")
LIMITS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("epochs batch_size accumulate", lambda v: v >= 1, "at least 1"),
    (
        "warmup label_smoothing distillation_weight teacher_weight erase mixup cutmix",
        lambda v: 0 <= v <= 1,
        "between 0 and 1",
    ),
    ("ema momentum", lambda v: 0 <= v < 1, "at least 0, below 1"),
    ("learning_rate temperature crop_area", lambda v: v > 0, "above 0"),
    ("feature_weight weight_decay pad cutout", lambda v: v >= 0, "at least 0"),
    ("seed", lambda v: 0 <= v < 2**63, "at least 0, below 2**63"),
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Hyperparameters of one run; each field is an option of `python -m training train`."""

    method: str = option(
        SELF_DISTILLATION,
        "plain trains a network with its last exit alone, deep-supervision every exit on labels "
        "alone, self-distillation adds the terms below",
        METHODS,
    )
    distill_from: str = option(
        DEEPEST, "which exits teach the shallower: the deepest, all, or the next deeper", SOURCES
    )
    distillation_weight: float = option(0.3, "share of self-distillation in an exit's loss")
    temperature: float = option(3.0, "that both kinds of distillation soften logits with")
    temperature_squared: bool = option(False, "scale distillation by its square (Hinton 2015)")
    feature_weight: float = option(0.0, "of the distance between adapted and teaching features")
    teacher_weight: float = option(0.3, "share of the --teacher bundle in an exit's loss")
    equilibrium: bool = option(False, "balance the gradients of exits in the trunk (Li 2019)")
    label_smoothing: float = option(0.0, "share of the label spread over all classes")
    class_weights: str = option(
        "none", "balanced weighs classes by the inverse of their number of images", CLASS_WEIGHTS
    )

    epochs: int = option(30, "passes over the training images")
    batch_size: int = option(128, "images a step, over all processes together")
    accumulate: int = option(1, "parts that a step's images are run in, to save memory")
    learning_rate: float = option(0.1, "at its highest")
    schedule: str = option(COSINE, "of the learning rate", SCHEDULES)
    warmup: float = option(0.15, "share of all steps in which the learning rate rises")
    momentum: float = option(0.9, "of gradient descent")
    nesterov: bool = option(True, "look ahead along the momentum")
    weight_decay: float = option(5e-4, "pull of weights towards zero")
    decay_all: bool = option(False, "also pull biases and normalisation towards zero")
    ema: float = option(0.0, "decay of the weights' moving average, which is then what is kept")
    precision: str = option("bf16", "of convolutions; weights stay in fp32", PRECISIONS)

    pad: int = option(4, "largest random shift, in pixels")
    mirror: bool = option(True, "mirror half of the images")
    distort: str = option(
        "none", "trivial is TrivialAugment, auto is AutoAugment's policy for CIFAR", DISTORTIONS
    )
    cutout: int = option(0, "side of a black square, in pixels")
    erase: float = option(0.0, "share of images with a random rectangle of noise")
    mixup: float = option(0.0, "share of images blended with another")
    cutmix: float = option(0.0, "share of images with a rectangle of another")
    crop_area: float = option(
        1.0, "least share of an image that a random crop keeps, where images stream from disk"
    )
    seed: int = option(0, "of weights, order and augmentation")

    def __post_init__(self) -> None:
        check_choices(self)
        for names, fits, bounds in LIMITS:
            for name in names.split():
                if not fits(getattr(self, name)):
                    raise ValueError(f"{name} must be {bounds}, not {getattr(self, name)}")
        if self.mixup + self.cutmix > 1:
            raise ValueError("mixup and cutmix are shares of images; together at most 1")
        if self.accumulate > self.batch_size:
            raise ValueError(f"{self.batch_size} images cannot be run in {self.accumulate} parts")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")

    def check_teacher(self) -> None:
        """Raise ValueError where self-distillation and a separate teacher take more than all."""
        if self.own_weight + self.teacher_weight > 1:
            raise ValueError(
                f"distillation_weight {self.own_weight:g} and teacher_weight "
                f"{self.teacher_weight:g} are shares of an exit's loss; together at most 1"
            )

    @property
    def own_weight(self) -> float:
        """Share of self-distillation; nothing unless that is the method."""
        return self.distillation_weight if self.method == SELF_DISTILLATION else 0.0

    @property
    def own_feature_weight(self) -> float:
        """Weight of the feature term; nothing unless self-distillation is the method."""
        return self.feature_weight if self.method == SELF_DISTILLATION else 0.0
