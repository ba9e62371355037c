"""The exit head: attention gate, alignment convolutions, classifier.

After Zhang, Bao and Ma, "Self-Distillation: Towards Efficient and Compact Neural Networks"
(IEEE TPAMI 2021) and its authors' released code.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DepthwiseConv2d(nn.Conv2d):
    """A 3x3 convolution of each channel by itself."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__(channels, channels, 3, stride, 1, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and x.device.type == "cpu"):
            return super().forward(x)
        # oneDNN has no fast bf16 backward for a strided depthwise convolution: 31 ms against
        # 1.4 ms in fp32 (128 x 64 x 16 x 16, two Zen 4 cores, torch 2.13).
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


class SeparableBlock(nn.Sequential):
    """Two depthwise-separable 3x3 convolutions; the first halves the resolution."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(
            *_separable(channels_in, channels_in, stride=2),
            *_separable(channels_in, channels_out, stride=1),
        )


def _separable(channels_in: int, channels_out: int, stride: int) -> list[nn.Module]:
    return [
        DepthwiseConv2d(channels_in, stride),
        nn.Conv2d(channels_in, channels_out, 1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    ]


class AttentionGate(nn.Module):
    """Weighs features by a map in 0..1 computed from themselves at half the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = SeparableBlock(channels, channels)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        mask = F.relu(self.bn(self.block(x)))
        mask = F.interpolate(mask, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return x * mask.sigmoid()


class ExitHead(nn.Module):
    """Classifies the features after one block; never changes what the trunk hands on.

    Args:
        channels: of the features here, then after each alignment block, down to the last
            stage's; a single entry means no alignment (the last stage's exits).
        classes: number of classes.
        attention: whether an attention gate comes first (never where nothing is aligned).
        reduced_from: channels of the features where a 1x1 convolution first brings them to
            `channels[0]`; by default there is none.
    """

    def __init__(
        self,
        channels: Sequence[int],
        classes: int,
        attention: bool = True,
        reduced_from: int | None = None,
    ) -> None:
        super().__init__()
        steps = list(itertools.pairwise(channels))
        self.reduce = (
            nn.Identity() if reduced_from is None else _pointwise(reduced_from, channels[0])
        )
        self.gate = AttentionGate(channels[0]) if attention and steps else nn.Identity()
        self.align = nn.Sequential(*(SeparableBlock(a, b) for a, b in steps))
        self.fc = nn.Linear(channels[-1], classes)

    def pooled(self, x: Tensor) -> Tensor:
        """Features `[N, C, H, W]` to aligned, pooled features `[N, fc.in_features]`."""
        return self.align(self.gate(self.reduce(x))).mean(dim=(-2, -1))

    def forward(self, x: Tensor) -> Tensor:
        """Features `[N, C, H, W]` to logits `[N, classes]`."""
        return self.fc(self.pooled(x))


def _pointwise(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


def paper_head(channels: Sequence[int], classes: int, attention: bool) -> ExitHead:
    """The published head: as wide as the features that it aligns."""
    return ExitHead(channels, classes, attention)


def compact_head(channels: Sequence[int], classes: int, attention: bool) -> ExitHead:
    """The published head behind a 1x1 convolution, as narrow as a bottleneck's inside.

    Bottlenecks hand on four times the channels that they work with, and the cost of a head rises
    with their square: on ResNet-50 the published heads cost a third of the backbone. This one
    aligns to a quarter of the last stage's channels, half as many a step shallower, but never
    widens what comes in.
    """
    *shallow, last = channels
    if not shallow:
        return ExitHead(channels, classes, attention)
    halvings = range(len(shallow), -1, -1)
    narrow = [
        max(1, min(c, last // (COMPACT * 2**h))) for c, h in zip(channels, halvings, strict=True)
    ]
    return ExitHead(narrow, classes, attention, None if narrow[0] == channels[0] else channels[0])


COMPACT = 4
"""How many times fewer channels a compact head has, as bottlenecks have inside."""
HEADS = {"paper": paper_head, "compact": compact_head}
"""How a head is made, by name: from the channels on its way, the classes, and its attention."""
