"""The terms that a network with exits is trained on, each a pure function of a batch's outputs.

After Zhang, Bao and Ma, "Self-Distillation: Towards Efficient and Compact Neural Networks"
(IEEE TPAMI 2021). Exits run from the shallowest to the deepest everywhere; terms are named
`kind/exit` and already weighted, so that their sum is what is minimised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Terms = dict[str, Tensor]


def label_loss(
    logits: Tensor,
    target: Tensor,
    smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy in nats a sample.

    Args:
        logits: `[N, classes]`.
        target: class ids int64 `[N]`, or probabilities `[N, classes]` of mixed images.
        smoothing: share of the target spread over all classes.
        class_weights: `[classes]`, by which a sample counts.
    """
    losses = F.cross_entropy(
        logits.float(),
        target,
        weight=class_weights,
        label_smoothing=smoothing,
        reduction="none",
    )
    return losses.mean()


def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float, squared: bool = False
) -> Tensor:
    """Soft cross-entropy of the student with the detached teacher, both `[N, classes]`.

    Hinton's factor temperature**2 comes in with `squared`; the authors' code leaves it out.
    """
    target = F.softmax(teacher.detach().float() / temperature, dim=1)
    loss = F.cross_entropy(student.float() / temperature, target)
    return loss * temperature**2 if squared else loss


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance a sample between pooled features, both `[N, C]`.

    The authors take one norm over the whole batch, which makes the term's strength depend on the
    batch size; a mean over samples does not.
    """
    return (student.float() - teacher.detach().float()).square().sum(1).mean()


def teachers_of(logits: Sequence[Tensor], source: str) -> list[Tensor | None]:
    """Whose logits teach each exit: `deepest`, `next` (deeper) or `ensemble` (the mean of all).

    The ensemble teaches the deepest exit too; else nothing does.
    """
    exits = len(logits)
    if source == "ensemble":
        mean = torch.stack([x.detach().float() for x in logits]).mean(0)
        return [mean] * exits if exits > 1 else [None]
    teachers = list(logits[1:]) if source == "next" else [logits[-1]] * (exits - 1)
    return [*teachers, None]


def label_terms(
    logits: Sequence[Tensor],
    target: Tensor,
    weights: Sequence[float],
    smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Terms:
    """Every exit against the labels. Arguments as for `label_loss`, with a weight for each exit."""
    return {
        f"label/{k}": weight * label_loss(x, target, smoothing, class_weights)
        for k, (x, weight) in enumerate(zip(logits, weights, strict=True), start=1)
    }


def distillation_terms(
    kind: str,
    logits: Sequence[Tensor],
    teachers: Sequence[Tensor | None],
    weight: float,
    temperature: float,
    squared: bool = False,
) -> Terms:
    """Every exit against its teacher, where it has one and `weight` is not zero."""
    return {
        f"{kind}/{k}": weight * distillation_loss(x, teacher, temperature, squared)
        for k, (x, teacher) in enumerate(zip(logits, teachers, strict=True), start=1)
        if teacher is not None and weight
    }


def feature_terms(adapted: Sequence[Tensor], teachers: Sequence[Tensor], weight: float) -> Terms:
    """Every exit but the deepest against its teacher's pooled features, unless `weight` is zero."""
    if not weight:  # then nothing is adapted
        return {}
    return {
        f"feature/{k}": weight * feature_loss(x, teacher)
        for k, (x, teacher) in enumerate(zip(adapted, teachers, strict=True), start=1)
    }


def total(terms: Terms) -> Tensor:
    """The sum of all terms."""
    return torch.stack(list(terms.values())).sum()
