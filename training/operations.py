"""Image operations with a strength of their own for each image of a batch.

Pixels are uint8 `[N, H, W, 3]`, strengths fp32 `[N]`. Colours follow Pillow to within one step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Operation = Callable[[Tensor, Tensor], Tensor]

FILL = 128
"""What comes in from outside an image that is moved, as AutoAugment's authors chose."""


def identity(pixels: Tensor, strength: Tensor) -> Tensor:
    return pixels


def shear_x(pixels: Tensor, strength: Tensor) -> Tensor:
    """Slide rows by `strength` times their distance from the middle."""
    return _moved(pixels, shear_x=strength)


def shear_y(pixels: Tensor, strength: Tensor) -> Tensor:
    """Slide columns by `strength` times their distance from the middle."""
    return _moved(pixels, shear_y=strength)


def translate_x(pixels: Tensor, strength: Tensor) -> Tensor:
    """Shift to the left by `strength` times the width."""
    return _moved(pixels, x=2 * strength)


def translate_y(pixels: Tensor, strength: Tensor) -> Tensor:
    """Shift up by `strength` times the height."""
    return _moved(pixels, y=2 * strength)


def rotate(pixels: Tensor, strength: Tensor) -> Tensor:
    """Turn by `strength` degrees."""
    angle = strength.deg2rad()
    cosine, sine = angle.cos(), angle.sin()
    return _moved(pixels, cosine - 1, cosine - 1, shear_x=-sine, shear_y=sine)


def brightness(pixels: Tensor, strength: Tensor) -> Tensor:
    """Scale by 1 + `strength`."""
    return _blended(pixels, torch.zeros_like(pixels, dtype=torch.float32), strength)


def colour(pixels: Tensor, strength: Tensor) -> Tensor:
    """Scale the distance from grey by 1 + `strength`."""
    return _blended(pixels, _grey(pixels), strength)


def contrast(pixels: Tensor, strength: Tensor) -> Tensor:
    """Scale the distance from the mean grey by 1 + `strength`."""
    mean = (_grey(pixels).mean(dim=(1, 2, 3), keepdim=True) + 0.5).floor()
    return _blended(pixels, mean, strength)


def sharpness(pixels: Tensor, strength: Tensor) -> Tensor:
    """Scale the distance from the smoothed image by 1 + `strength`; borders stay."""
    x = pixels.float()
    # No convolution: a card would round it to TF32, and look for its fastest kernel at every size.
    # No pooling: on a CPU it takes two to five times as long as these sums.
    rows = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
    sums = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    smooth = x.clone()
    smooth[:, 1:-1, 1:-1] = ((sums + 4 * x[:, 1:-1, 1:-1]) / 13 + 0.5).floor()
    return _blended(pixels, smooth, strength)


def posterize(pixels: Tensor, strength: Tensor) -> Tensor:
    """Keep the highest `strength` bits, rounded."""
    dropped = (8 - strength.round()).to(torch.uint8).view(-1, 1, 1, 1)
    return (pixels >> dropped) << dropped


def solarize(pixels: Tensor, strength: Tensor) -> Tensor:
    """Invert what is at least `strength` in 0..256."""
    return torch.where(pixels >= strength.view(-1, 1, 1, 1), 255 - pixels, pixels)


def invert(pixels: Tensor, strength: Tensor) -> Tensor:
    return 255 - pixels


def autocontrast(pixels: Tensor, strength: Tensor) -> Tensor:
    """Stretch each channel to 0..255."""
    low = pixels.amin(dim=(1, 2), keepdim=True).float()
    high = pixels.amax(dim=(1, 2), keepdim=True).float()
    stretched = ((pixels - low) * (255 / (high - low).clamp(min=1))).clamp(0, 255)
    return torch.where(high > low, stretched, pixels.float()).to(torch.uint8)


def equalize(pixels: Tensor, strength: Tensor) -> Tensor:
    """Make each channel's histogram flat."""
    n, height, width, _ = pixels.shape
    x = pixels.permute(0, 3, 1, 2).reshape(n * 3, height * width).long()
    counts = torch.zeros(n * 3, 256, dtype=torch.long, device=pixels.device)
    counts.scatter_add_(1, x, torch.ones_like(x))
    highest = counts.gather(1, x.amax(1, keepdim=True))
    step = (height * width - highest) // 255
    below = counts.cumsum(1) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    flat = torch.where(step > 0, table.gather(1, x), x)
    return flat.view(n, 3, height, width).permute(0, 2, 3, 1).to(torch.uint8)


def _grey(pixels: Tensor) -> Tensor:
    """fp32 `[N, H, W, 1]`."""
    weights = torch.tensor([19595.0, 38470.0, 7471.0], device=pixels.device)
    return ((pixels.float() @ weights + 32768) / 65536).floor()[..., None]


def _blended(pixels: Tensor, dull: Tensor, strength: Tensor) -> Tensor:
    factor = (1 + strength).view(-1, 1, 1, 1)
    return (dull + factor * (pixels - dull)).clamp(0, 255).to(torch.uint8)


def _moved(
    pixels: Tensor,
    scale_x: Tensor | float = 0.0,
    scale_y: Tensor | float = 0.0,
    x: Tensor | float = 0.0,
    y: Tensor | float = 0.0,
    shear_x: Tensor | float = 0.0,
    shear_y: Tensor | float = 0.0,
) -> Tensor:
    """Sample each image where a matrix, given by its distance from the identity, points to."""
    theta = torch.zeros(len(pixels), 2, 3, device=pixels.device)
    theta[:, 0, 0] = 1 + scale_x
    theta[:, 1, 1] = 1 + scale_y
    theta[:, 0, 1] = shear_x
    theta[:, 1, 0] = shear_y
    theta[:, 0, 2] = x
    theta[:, 1, 2] = y
    image = pixels.permute(0, 3, 1, 2).float() - FILL  # so that zero padding is the fill
    grid = F.affine_grid(theta, list(image.shape), align_corners=False)
    moved = F.grid_sample(image, grid, "bilinear", "zeros", align_corners=False) + FILL
    return moved.round().clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)
