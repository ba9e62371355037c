"""What int8 needs to know of a network, and what it costs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from model.bundle import Bundle
from model.fold import fold_stages
from model.policy import LARGEST_WEIGHT, Policy, Quantisation
from model.quantisation import Ranges, observe
from training import risk
from training.data import ImageSet
from training.logits import batch_size
from training.outcomes import outcomes_of

OBSERVED_IMAGES = 512
"""Ranges hardly widen beyond."""


def find_ranges(bundle: Bundle, images: ImageSet, chosen: np.ndarray) -> Ranges:
    """The ranges of what a network's convolutions take.

    Args:
        bundle: the network and its preprocess.
        images: decoded through that preprocess.
        chosen: indices of those to look at, of which a few hundred are, from all classes alike;
            none of them may certify anything.
    """
    normalise = bundle.description.preprocess.normalise
    observed = min(OBSERVED_IMAGES, len(chosen))
    spread = np.linspace(0, len(chosen) - 1, observed).round().astype(int)
    pixels = images.pixels[torch.from_numpy(chosen[spread])]
    batches = pixels.split(batch_size(bundle))
    return observe(fold_stages(bundle.net), (normalise(batch) for batch in batches))


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
    before, after = _full_depth(exact, policy), _full_depth(rounded, policy)
    truth = before if class_ids is None else class_ids.numpy()
    difference = (before == truth).astype(int) - (after == truth)
    losses, gains = risk.losses_and_gains(difference)
    return Quantisation(
        ranges=tuple(dict(stage) for stage in ranges),
        measured_accuracy_loss=float(difference.mean()),
        accuracy_loss_bound=risk.paired_upper_bound(losses, gains, len(difference), policy.delta),
        largest_weight=LARGEST_WEIGHT,
    )


def _full_depth(logits: Tensor, policy: Policy) -> np.ndarray:
    """What the full network answers: class ids `[N]`."""
    unknown = torch.zeros(len(logits), dtype=torch.int64)
    outcomes = outcomes_of(logits, unknown, policy.calibrations, policy.measure)
    return outcomes.answers[:, -1]
