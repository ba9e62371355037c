"""TrivialAugment with AutoAugment's policy for CIFAR beside it, for whole batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from training import operations as do
from training.operations import Operation

LEVELS = 31
"""TrivialAugment's strengths: 0..30 thirtieths of the way."""


class Range(NamedTuple):
    """An operation's strength from one end to the other."""

    weakest: float
    strongest: float
    signed: bool
    """Whether half of the images get it the other way round."""


NOTHING = Range(0, 0, False)
TRIVIAL: dict[Operation, Range] = {
    do.identity: NOTHING,
    do.shear_x: Range(0, 0.99, True),
    do.shear_y: Range(0, 0.99, True),
    do.translate_x: Range(0, 32, True),
    do.translate_y: Range(0, 32, True),
    do.rotate: Range(0, 135, True),
    do.brightness: Range(0, 0.99, True),
    do.colour: Range(0, 0.99, True),
    do.contrast: Range(0, 0.99, True),
    do.sharpness: Range(0, 0.99, True),
    do.posterize: Range(8, 2, False),
    do.solarize: Range(255, 0, False),
    do.autocontrast: NOTHING,
    do.equalize: NOTHING,
}
"""The wide search space of Müller and Hutter (2021); translations here are in pixels."""

AUTO: dict[Operation, Range] = {
    do.shear_x: Range(0, 0.3, True),
    do.shear_y: Range(0, 0.3, True),
    do.translate_x: Range(0, 150 / 331, True),
    do.translate_y: Range(0, 150 / 331, True),
    do.rotate: Range(0, 30, True),
    do.brightness: Range(0, 0.9, True),
    do.colour: Range(0, 0.9, True),
    do.contrast: Range(0, 0.9, True),
    do.sharpness: Range(0, 0.9, True),
    do.posterize: Range(8, 4, False),
    do.solarize: Range(256, 0, False),
    do.autocontrast: NOTHING,
    do.equalize: NOTHING,
    do.invert: NOTHING,
}


class Move(NamedTuple):
    """One operation of a sub-policy."""

    operation: Operation
    chance: float
    level: int
    """0..9 ninths of the way."""


POLICY: tuple[tuple[Move, Move], ...] = (
    (Move(do.invert, 0.1, 7), Move(do.contrast, 0.2, 6)),
    (Move(do.rotate, 0.7, 2), Move(do.translate_x, 0.3, 9)),
    (Move(do.sharpness, 0.8, 1), Move(do.sharpness, 0.9, 3)),
    (Move(do.shear_y, 0.5, 8), Move(do.translate_y, 0.7, 9)),
    (Move(do.autocontrast, 0.5, 8), Move(do.equalize, 0.9, 2)),
    (Move(do.shear_y, 0.2, 7), Move(do.posterize, 0.3, 7)),
    (Move(do.colour, 0.4, 3), Move(do.brightness, 0.6, 7)),
    (Move(do.sharpness, 0.3, 9), Move(do.brightness, 0.7, 9)),
    (Move(do.equalize, 0.6, 5), Move(do.equalize, 0.5, 1)),
    (Move(do.contrast, 0.6, 7), Move(do.sharpness, 0.6, 5)),
    (Move(do.colour, 0.7, 7), Move(do.translate_x, 0.5, 8)),
    (Move(do.equalize, 0.3, 7), Move(do.autocontrast, 0.4, 8)),
    (Move(do.translate_y, 0.4, 3), Move(do.sharpness, 0.2, 6)),
    (Move(do.brightness, 0.9, 6), Move(do.colour, 0.2, 8)),
    (Move(do.solarize, 0.5, 2), Move(do.invert, 0.0, 3)),
    (Move(do.equalize, 0.2, 0), Move(do.autocontrast, 0.6, 0)),
    (Move(do.equalize, 0.2, 8), Move(do.equalize, 0.8, 4)),
    (Move(do.colour, 0.9, 9), Move(do.equalize, 0.6, 6)),
    (Move(do.autocontrast, 0.8, 4), Move(do.solarize, 0.2, 8)),
    (Move(do.brightness, 0.1, 3), Move(do.colour, 0.7, 0)),
    (Move(do.solarize, 0.4, 5), Move(do.autocontrast, 0.9, 3)),
    (Move(do.translate_y, 0.9, 9), Move(do.translate_y, 0.7, 9)),
    (Move(do.autocontrast, 0.9, 2), Move(do.solarize, 0.8, 3)),
    (Move(do.equalize, 0.8, 8), Move(do.invert, 0.1, 3)),
    (Move(do.translate_y, 0.7, 9), Move(do.autocontrast, 0.9, 1)),
)
"""The sub-policies that Cubuk et al. (2019) found for CIFAR, one drawn for each image."""


def trivial_augment(pixels: Tensor, generator: Generator) -> Tensor:
    """One operation at one strength for each image, both drawn evenly.

    Args:
        pixels: uint8 `[N, H, W, 3]`.
        generator: the source of randomness, on the same device.
    """
    n, height, width, _ = pixels.shape
    ranges = {
        **TRIVIAL,
        do.translate_x: Range(0, TRIVIAL[do.translate_x].strongest / width, True),
        do.translate_y: Range(0, TRIVIAL[do.translate_y].strongest / height, True),
    }
    which = _draw(len(ranges), n, generator)
    level = _draw(LEVELS, n, generator) / (LEVELS - 1)
    return _apply(pixels, list(ranges), which, level, _signs(n, generator), ranges)


def auto_augment(pixels: Tensor, generator: Generator) -> Tensor:
    """Two operations for each image, each with its chance. Arguments as for `trivial_augment`."""
    n, device = len(pixels), pixels.device
    operations = list(AUTO)
    drawn = _draw(len(POLICY), n, generator)
    for turn in range(2):
        moves = [pair[turn] for pair in POLICY]
        which = torch.tensor([operations.index(m.operation) for m in moves], device=device)[drawn]
        chance = torch.tensor([m.chance for m in moves], device=device)[drawn]
        level = torch.tensor([m.level / 9 for m in moves], device=device)[drawn]
        left = torch.rand(n, generator=generator, device=device) >= chance
        which = torch.where(left, -1, which)
        pixels = _apply(pixels, operations, which, level, _signs(n, generator), AUTO)
    return pixels


def _apply(
    pixels: Tensor,
    operations: Sequence[Operation],
    which: Tensor,
    level: Tensor,
    signs: Tensor,
    ranges: Mapping[Operation, Range],
) -> Tensor:
    """Each image through the operation that `which` `[N]` points to; -1 leaves it."""
    out = pixels.clone()
    for i, operation in enumerate(operations):
        chosen = (which == i).nonzero()[:, 0]
        if len(chosen) == 0:
            continue
        weakest, strongest, signed = ranges[operation]
        strength = weakest + (strongest - weakest) * level[chosen]
        out[chosen] = operation(pixels[chosen], strength * signs[chosen] if signed else strength)
    return out


def _draw(high: int, n: int, generator: Generator) -> Tensor:
    return torch.randint(high, (n,), generator=generator, device=generator.device)


def _signs(n: int, generator: Generator) -> Tensor:
    return 1.0 - 2.0 * _draw(2, n, generator)
