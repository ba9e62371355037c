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


class HalvingBlock(nn.Sequential):
    """One depthwise-separable 3x3 convolution that halves the resolution."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(*_separable(channels_in, channels_out, stride=2))


def _separable(channels_in: int, channels_out: int, stride: int) -> list[nn.Module]:
    return [
        DepthwiseConv2d(channels_in, stride),
        nn.Conv2d(channels_in, channels_out, 1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    ]


class AttentionGate(nn.Module):
    """Weighs features by a map in 0..1 computed from themselves at half the resolution.

    Args:
        block: features to the map before its last normalisation, of as many channels.
        channels: how many.
    """

    def __init__(self, block: nn.Module, channels: int) -> None:
        super().__init__()
        self.block = block
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        mask = F.relu(self.bn(self.block(x)))
        mask = F.interpolate(mask, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return x * mask.sigmoid()


class ExitHead(nn.Module):
    """Classifies the features after one block; never changes what the trunk hands on.

    Args:
        gate: weighs the features first.
        align: brings them to the resolution of the last stage.
        features: channels after that.
        classes: number of classes.
    """

    def __init__(self, gate: nn.Module, align: nn.Sequential, features: int, classes: int) -> None:
        super().__init__()
        self.gate = gate
        self.align = align
        self.fc = nn.Linear(features, classes)

    def pooled(self, x: Tensor) -> Tensor:
        """Features `[N, C, H, W]` to aligned, pooled features `[N, fc.in_features]`."""
        return self.align(self.gate(x)).mean(dim=(-2, -1))

    def forward(self, x: Tensor) -> Tensor:
        """Features `[N, C, H, W]` to logits `[N, classes]`."""
        return self.fc(self.pooled(x))


def paper_head(channels: Sequence[int], classes: int, attention: bool) -> ExitHead:
    """The published head: as wide as the features that it aligns.

    Args:
        channels: of the features here, then after each alignment block, down to the last
            stage's; a single entry means no alignment (the last stage's exits).
        classes: number of classes.
        attention: whether an attention gate comes first (never where nothing is aligned).
    """
    gate: nn.Module = nn.Identity()
    if attention and len(channels) > 1:
        gate = AttentionGate(SeparableBlock(channels[0], channels[0]), channels[0])
    align = (SeparableBlock(a, b) for a, b in itertools.pairwise(channels))
    return ExitHead(gate, nn.Sequential(*align), channels[-1], classes)


def compact_head(channels: Sequence[int], classes: int, attention: bool) -> ExitHead:
    """A head for bottlenecks, which hand on four times the channels that they work with.

    The cost of the published head rises with their square: on ResNet-50 it is a third of the
    backbone. This one computes only where pixels are few: each step halves the resolution channel
    by channel before it mixes channels, once, into half as many as the published one has, and the
    gate mixes through an eighth of them. Arguments as for `paper_head`.
    """
    first, *deeper = channels
    gate: nn.Module = nn.Identity()
    if attention and deeper:
        gate = AttentionGate(_squeezed(first), first)
    narrow = [first, *(max(1, c // 2) for c in deeper)]
    align = (HalvingBlock(a, b) for a, b in itertools.pairwise(narrow))
    return ExitHead(gate, nn.Sequential(*align), narrow[-1], classes)


def _squeezed(channels: int) -> nn.Module:
    """A block at half the resolution that mixes channels through an eighth of them."""
    inside = max(1, channels // 8)
    return nn.Sequential(
        *_separable(channels, inside, stride=2), nn.Conv2d(inside, channels, 1, bias=False)
    )


HEADS = {"paper": paper_head, "compact": compact_head}
"""How a head is made, by name: from the channels on its way, the classes, and its attention."""
