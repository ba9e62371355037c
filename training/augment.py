"""Augmentation of whole batches of uint8 images, on the device they live on."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from training.distort import auto_augment, trivial_augment
from training.mixing import mix
from training.recipe import Recipe

ERASED_AREA = (0.02, 0.33)
ERASED_ASPECT = (0.3, 3.3)


def augment(
    pixels: Tensor, class_ids: Tensor, classes: int, recipe: Recipe, generator: Generator
) -> tuple[Tensor, Tensor]:
    """All that the recipe does to a batch before it is normalised.

    Args:
        pixels: uint8 `[N, H, W, 3]`.
        class_ids: int64 `[N]`.
        classes: number of classes.
        recipe: says which augmentations.
        generator: the source of randomness, on the same device.

    Returns:
        uint8 `[N, H, W, 3]`, with class ids `[N]` or, of mixed images, probabilities
        `[N, classes]`.
    """
    pixels = crop_and_flip(pixels, recipe.pad, generator, recipe.mirror)
    if recipe.distort == "trivial":
        pixels = trivial_augment(pixels, generator)
    if recipe.distort == "auto":
        pixels = auto_augment(pixels, generator)
    pixels = cutout(pixels, recipe.cutout, generator)
    pixels = erase(pixels, recipe.erase, generator)
    return mix(pixels, class_ids, classes, recipe.mixup, recipe.cutmix, generator)


def crop_and_flip(pixels: Tensor, pad: int, generator: Generator, mirror: bool = True) -> Tensor:
    """Shift each image by up to `pad` pixels with black borders; mirror half of them.

    Args:
        pixels: uint8 `[N, H, W, 3]`.
        pad: the largest shift, in pixels.
        generator: the source of randomness, on the same device.
        mirror: whether to mirror at all.

    Returns:
        uint8 `[N, H, W, 3]`.
    """
    n, height, width, _ = pixels.shape
    device = pixels.device

    def draw(high: int) -> Tensor:
        return torch.randint(high, (n, 1), generator=generator, device=device)

    padded = torch.nn.functional.pad(pixels, (0, 0, pad, pad, pad, pad))
    rows = draw(2 * pad + 1) + torch.arange(height, device=device)
    columns = draw(2 * pad + 1) + torch.arange(width, device=device)
    if mirror:
        columns = torch.where(draw(2).bool(), columns.flip(1), columns)
    images = torch.arange(n, device=device)
    return padded[images[:, None, None], rows[:, :, None], columns[:, None, :]]


def cutout(pixels: Tensor, side: int, generator: Generator) -> Tensor:
    """Blacken one `side` x `side` square of each image, centred anywhere (DeVries 2017)."""
    if side == 0:
        return pixels
    n, height, width, _ = pixels.shape
    device = pixels.device

    def outside(length: int) -> Tensor:
        centre = torch.randint(length, (n, 1), generator=generator, device=device)
        offset = torch.arange(length, device=device) - centre
        return (offset < -(side // 2)) | (offset >= side - side // 2)

    keep = outside(height)[:, :, None] | outside(width)[:, None, :]
    return pixels * keep[..., None]


def erase(pixels: Tensor, share: float, generator: Generator) -> Tensor:
    """Fill a random rectangle of some images with noise (Zhong 2020).

    Args:
        pixels: uint8 `[N, H, W, 3]`.
        share: of images that lose a rectangle.
        generator: the source of randomness, on the same device.
    """
    if share == 0:
        return pixels
    n, height, width, _ = pixels.shape

    def draw(low: float, high: float) -> Tensor:
        u = torch.rand((n, 1), generator=generator, device=pixels.device)
        return low + (high - low) * u

    area = draw(*ERASED_AREA)
    aspect = draw(math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1])).exp()
    chosen = draw(0, 1) < share

    def inside(length: int, part: Tensor) -> Tensor:
        side = (part.clamp(max=1) * length).round()
        start = (draw(0, 1) * (length - side)).round()
        place = torch.arange(length, device=pixels.device)
        return (place >= start) & (place < start + side)

    rows = inside(height, (area * aspect).sqrt())
    columns = inside(width, (area / aspect).sqrt())
    gone = rows[:, :, None] & columns[:, None, :] & chosen[:, :, None]
    noise = torch.randint(
        256, pixels.shape, generator=generator, device=pixels.device, dtype=torch.uint8
    )
    return torch.where(gone[..., None], noise, pixels)
