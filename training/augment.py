"""Augmentation of whole batches of uint8 images, on the device they live on."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def crop_and_flip(pixels: Tensor, pad: int, generator: Generator) -> Tensor:
    """Shift each image by up to `pad` pixels with black borders and mirror half of them.

    Args:
        pixels: uint8 `[N, H, W, 3]`.
        pad: the largest shift, in pixels.
        generator: the source of randomness, on the same device.

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
