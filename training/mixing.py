"""Images made of two, with the share of each in the label."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


def mix(
    pixels: Tensor,
    class_ids: Tensor,
    classes: int,
    mixup: float,
    cutmix: float,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """Blend or paste images that are augmented together in pairs (Zhang 2018, Yun 2019).

    Each image draws for itself whether it is blended, pasted into, or left, with its share of the
    result uniform in 0..1, which is both papers' choice on CIFAR.

    Args:
        pixels: uint8 `[N, H, W, 3]`.
        class_ids: int64 `[N]`.
        classes: number of classes.
        mixup: share of images that are blended.
        cutmix: share of images that get a rectangle of another.
        generator: the source of randomness, on the same device.

    Returns:
        uint8 `[N, H, W, 3]`, with the class ids untouched where nothing is ever mixed, else
        probabilities `[N, classes]`.
    """
    if mixup + cutmix == 0:
        return pixels, class_ids
    n, device = len(pixels), pixels.device
    partner = torch.randperm(n, generator=generator, device=device)
    kind = torch.rand(n, generator=generator, device=device)
    share = torch.rand(n, generator=generator, device=device)
    box = _boxes(pixels, (1 - share).sqrt(), generator)

    pasted = kind < cutmix
    blended = ~pasted & (kind < cutmix + mixup)
    area = box.flatten(1).float().mean(1)
    share = torch.where(pasted, 1 - area, torch.where(blended, share, torch.ones_like(share)))

    other = pixels[partner]
    weight = share.view(n, 1, 1, 1)
    mixed = (pixels * weight + other * (1 - weight)).round().to(torch.uint8)
    mixed = torch.where(blended.view(n, 1, 1, 1), mixed, pixels)
    mixed = torch.where((box & pasted.view(n, 1, 1))[..., None], other, mixed)
    labels = F.one_hot(class_ids, classes).float()
    return mixed, labels * share[:, None] + labels[partner] * (1 - share[:, None])


def _boxes(pixels: Tensor, side: Tensor, generator: Generator) -> Tensor:
    """Whether each pixel lies in its image's box, bool `[N, H, W]`.

    Args:
        pixels: `[N, H, W, 3]`.
        side: of the box as a share of the image's, `[N]`; centred anywhere, cut at the border.
    """
    n, height, width, _ = pixels.shape

    def inside(length: int) -> Tensor:
        centre = torch.rand((n, 1), generator=generator, device=pixels.device) * length
        place = torch.arange(length, device=pixels.device) + 0.5
        return (place - centre).abs() < side[:, None] * length / 2

    return inside(height)[:, :, None] & inside(width)[:, None, :]
