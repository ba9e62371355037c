"""ResNets with squeeze-and-excitation after Hu et al. (2018), with the names of timm's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from model.resnet import BasicBlock, Bottleneck, ResidualBlock

REDUCTION = 16
LEAST = 8
"""Channels that a squeeze keeps at least, and a multiple of which it has."""


class SqueezeExcite(nn.Module):
    """Weighs each channel by a factor in 0..1 computed from all channels' means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = max(LEAST, (channels // REDUCTION + LEAST // 2) // LEAST * LEAST)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = F.relu(self.fc1(x.mean((2, 3), keepdim=True)))
        return x * self.fc2(squeezed).sigmoid()


class _Weighed(ResidualBlock):
    """Weighs the residual of the block that it is mixed into."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.se = SqueezeExcite(self.channels)

    def residual(self, x: Tensor) -> Tensor:
        return self.se(super().residual(x))


class SEBasicBlock(_Weighed, BasicBlock):
    """A basic block that weighs its residual."""


class SEBottleneck(_Weighed, Bottleneck):
    """A bottleneck that weighs its residual."""
