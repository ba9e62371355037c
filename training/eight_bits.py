"""What int8 needs to know of a network, and what it costs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from model.bundle import Bundle
from model.fold import fold_stages
from model.policy import Policy, Quantisation
from model.quantisation import Ranges, observe
from training import risk
from training.data import ImageSet
from training.logits import BATCH
from training.outcomes import outcomes_of

OBSERVED_IMAGES = 512
"""Ranges hardly widen beyond."""


def find_ranges(bundle: Bundle, images: ImageSet, chosen: np.ndarray) -> Ranges:
    """The ranges of what a network's convolutions take.

    Args:
        bundle: the network and its preprocess.
        images: decoded through that preprocess.
        chosen: indices of those to look at, of which the first few hundred are; none of them may
            certify anything.
    """
    normalise = bundle.description.preprocess.normalise
    pixels = images.pixels[torch.from_numpy(chosen[:OBSERVED_IMAGES])]
    return observe(fold_stages(bundle.net), (normalise(batch) for batch in pixels.split(BATCH)))


def price(
    ranges: Ranges, exact: Tensor, rounded: Tensor, class_ids: Tensor | None, policy: Policy
) -> Quantisation:
    """What the full network loses in int8, on images that had no part in choosing anything.

    Args:
        ranges: of `find_ranges`.
        exact: logits `[N, exits, classes]` in float32.
        rounded: the same in int8.
        class_ids: `[N]`; without them, every answer that differs counts as a loss.
        policy: gives the confidences, and the probability that the bound fails.
    """
    n = len(exact)
    labels = torch.zeros(n, dtype=torch.int64) if class_ids is None else class_ids
    full, changed = (
        outcomes_of(logits, labels, policy.calibrations, policy.measure)
        for logits in (exact, rounded)
    )
    if class_ids is None:
        lost = full.answers[:, -1] != changed.answers[:, -1]
        losses, gains = int(lost.sum()), 0
    else:
        before, after = full.right[:, -1], changed.right[:, -1]
        losses, gains = int((before & ~after).sum()), int((after & ~before).sum())
    bound = risk.upper_bound(
        lambda b: risk.paired_p_value(losses, gains, n, b) <= policy.delta, low=-1.0
    )
    return Quantisation(
        ranges=tuple(dict(stage) for stage in ranges),
        measured_accuracy_loss=(losses - gains) / n,
        accuracy_loss_bound=bound,
    )
