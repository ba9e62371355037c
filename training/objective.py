"""What a recipe minimises."""

from __future__ import annotations

from torch import Tensor

from training.losses import Terms, distillation_terms, feature_terms, label_terms, teachers_of
from training.recipe import NEXT, Recipe
from training.student import StudentOutputs


def objective(
    recipe: Recipe,
    outputs: StudentOutputs,
    target: Tensor,
    class_weights: Tensor | None = None,
    teacher: Tensor | None = None,
) -> Terms:
    """The recipe's terms for one batch.

    What an exit learns from labels is what its teachers leave: 1 minus their shares.

    Args:
        outputs: of every exit, shallow to deep.
        target: class ids `[N]`, or probabilities `[N, classes]`.
        class_weights: `[classes]`.
        teacher: logits `[N, classes]` of a separate network.
    """
    logits, pooled, adapted = outputs
    own, conventional = recipe.own_weight, recipe.teacher_weight if teacher is not None else 0.0
    softened = (recipe.temperature, recipe.temperature_squared)
    teachers = teachers_of(logits, recipe.distill_from)
    shares = [(own if t is not None else 0.0) + conventional for t in teachers]
    labels = [1 - share for share in shares]
    sources = pooled[1:] if recipe.distill_from == NEXT else [pooled[-1]] * len(adapted)
    return (
        label_terms(logits, target, labels, recipe.label_smoothing, class_weights)
        | distillation_terms("distillation", logits, teachers, own, *softened)
        | distillation_terms("teacher", logits, [teacher] * len(logits), conventional, *softened)
        | feature_terms(adapted, sources, recipe.own_feature_weight)
    )
