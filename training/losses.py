"""The terms of self-distillation, each a pure function of a batch's outputs.

After Zhang, Bao and Ma, "Self-Distillation: Towards Efficient and Compact Neural Networks"
(IEEE TPAMI 2021). Exits run from the shallowest to the deepest everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def label_loss(logits: Tensor, class_ids: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of logits `[N, classes]` with labels `[N]`, in nats a sample."""
    return F.cross_entropy(logits.float(), class_ids, label_smoothing=smoothing)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Soft cross-entropy of the student with the detached teacher, both `[N, classes]`.

    Hinton's factor temperature**2 is left out, as in the authors' code.
    """
    target = F.softmax(teacher.detach().float() / temperature, dim=1)
    return F.cross_entropy(student.float() / temperature, target)


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance a sample between pooled features, both `[N, C]`.

    The authors take one norm over the whole batch, which makes the term's strength depend on the
    batch size; a mean over samples does not.
    """
    return (student.float() - teacher.detach().float()).square().sum(1).mean()


def self_distillation(
    logits: Sequence[Tensor],
    adapted: Sequence[Tensor],
    deepest_features: Tensor,
    class_ids: Tensor,
    *,
    distillation_weight: float,
    feature_weight: float,
    temperature: float,
    smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """The published loss, by named and already weighted terms whose sum is to be minimised.

    The deepest exit learns from labels alone. Each shallower exit learns from labels with weight
    1 - `distillation_weight`, from the deepest exit's logits with `distillation_weight`, and from
    its features with `feature_weight`.

    Args:
        logits: of every exit, shallow to deep, each `[N, classes]`.
        adapted: pooled features of every exit but the deepest, mapped to `[N, C]`.
        deepest_features: `[N, C]`.
        class_ids: int64 `[N]`.
    """
    *shallow, deepest = logits
    terms = {f"label/{len(logits)}": label_loss(deepest, class_ids, smoothing)}
    for k, student in enumerate(shallow, start=1):
        label = label_loss(student, class_ids, smoothing)
        terms[f"label/{k}"] = (1 - distillation_weight) * label
        if distillation_weight:
            soft = distillation_loss(student, deepest, temperature)
            terms[f"distillation/{k}"] = distillation_weight * soft
        if feature_weight:
            distance = feature_loss(adapted[k - 1], deepest_features)
            terms[f"feature/{k}"] = feature_weight * distance
    return terms


def total(terms: dict[str, Tensor]) -> Tensor:
    """The sum of all terms."""
    return torch.stack(list(terms.values())).sum()
