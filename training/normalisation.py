"""The mean of each channel with its spread, which inputs are normalised by."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model.preprocess import Triple
from training.data import DataError, Images

Statistics = tuple[Triple, Triple]

CIFAR100: Statistics = ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762))
CIFAR10: Statistics = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
MOST_IMAGES = 5_000
"""Enough for three digits; more only takes longer."""
BATCH = 500


def normalisation(images: Images, size: int) -> Statistics:
    """The customary figures for CIFAR, else what these images have."""
    if size == 32 and is_cifar100(images.classes):
        return CIFAR100
    if size == 32 and " ".join(images.classes) == CIFAR10_CLASSES:
        return CIFAR10
    return measure(images)


def is_cifar100(classes: Sequence[str]) -> bool:
    """Whether these are CIFAR-100's classes."""
    return len(classes) == 100 and {"aquarium_fish", "sweet_pepper"} <= set(classes)


def measure(images: Images) -> Statistics:
    """Mean with standard deviation of each channel, for pixels in 0..1, over a sample."""
    count = min(len(images), MOST_IMAGES)
    sample = torch.linspace(0, len(images) - 1, count).long()
    n, sums, squares = 0, torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for pixels, _ in images.batches(sample.split(BATCH)):
        x = pixels.reshape(-1, 3).cpu().double() / 255
        n += len(x)
        sums += x.sum(0)
        squares += x.square().sum(0)
    if n == 0:
        raise DataError(f"none of {count} images could be read; the first: {images.unreadable[0]}")
    mean = sums / n
    std = (squares / n - mean.square()).clamp(min=0).sqrt().clamp(min=1 / 255)
    return _triple(mean), _triple(std)


def _triple(values: torch.Tensor) -> Triple:
    r, g, b = (round(v, 4) for v in values.tolist())
    return r, g, b
