"""Decoded image to normalised tensor; the same object in training, calibration and serving."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

Triple = tuple[float, float, float]
Above0 = Annotated[float, Field(gt=0)]


class Preprocess(BaseModel):
    """How an image becomes the network's input; travels in the bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    size: int = Field(ge=8, le=1024, description="side of the square input, in pixels")
    crop: float = Field(1.0, gt=0, le=1, description="share of the shorter side that is kept")
    mean: Triple = Field(description="mean of each channel, for pixels in 0..1")
    std: tuple[Above0, Above0, Above0] = Field(
        description="standard deviation of each channel, for pixels in 0..1"
    )

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Cut the central square and scale it.

        Args:
            image: RGB, of any size.

        Returns:
            uint8 `[size, size, 3]`, channels last as the network's layout wants them.
        """
        if image.size == (self.size, self.size) and self.crop == 1:
            return np.asarray(image)
        side = min(image.size) * self.crop
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        # Cropping within the resize keeps a 1x20000 image from ever becoming 32x640000.
        square = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        return np.asarray(square)

    def normalise(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 `[N, H, W, 3]` to normalised `[N, 3, H, W]` in channels-last memory."""
        return normalised(pixels, *self.affine_on(pixels.device), dtype)

    def affine_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """What a pixel is multiplied by, and what is added: fp32 `[3, 1, 1]` each.

        Sent to a card once only: within a CUDA graph nothing can be.
        """
        if device.type == "cpu":
            return self._affine
        if device not in self._affines:
            scale, shift = self._affine
            self._affines[device] = scale.to(device), shift.to(device)
        return self._affines[device]

    @cached_property
    def _affines(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    @cached_property
    def _affine(self) -> tuple[Tensor, Tensor]:
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (1 / (255 * std)).view(3, 1, 1), (-mean / std).view(3, 1, 1)


def normalised(pixels: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """As `Preprocess.normalise`, with what `Preprocess.affine_on` gives."""
    x = pixels.permute(0, 3, 1, 2)
    return torch.addcmul(shift, x.to(torch.float32), scale).to(dtype)
