"""ShuffleNetV2 after Ma et al. (2018), with the parameter names of torchvision's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.backbone import (
    PUBLISHED_WIDTH,
    Backbone,
    Block,
    blocks_of,
    conv1x1,
    ending,
    scaled,
    stem_pool,
)

STEM_CHANNELS = 24
STAGES = {"stage2": (4, 116), "stage3": (8, 232), "stage4": (4, 464)}
"""Blocks and channels of each stage, by torchvision's name."""
LAST_CHANNELS = 1024


def _depthwise(channels: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
    return [conv, nn.BatchNorm2d(channels)]


def _pointwise(channels_in: int, channels: int) -> list[nn.Module]:
    return [conv1x1(channels_in, channels), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


class ShuffleBlock(nn.Module):
    """Runs half of the channels through convolutions, then mixes them with the other half.

    With a stride both halves come from all channels, each through its own convolutions.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.channels = channels
        half = channels // 2
        self.splits = stride == 1
        self.branch1 = nn.Sequential(
            *([] if self.splits else _depthwise(channels_in, stride)),
            *([] if self.splits else _pointwise(channels_in, half)),
        )
        self.branch2 = nn.Sequential(
            *_pointwise(half if self.splits else channels_in, half),
            *_depthwise(half, stride),
            *_pointwise(half, half),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.splits:
            kept, taken = x.chunk(2, dim=1)
        else:
            kept, taken = self.branch1(x), x
        mixed = torch.cat((kept, self.branch2(taken)), dim=1)
        return F.channel_shuffle(mixed, 2)


class ShuffleNetV2(Backbone):
    """A ShuffleNetV2 without its classifier.

    Args:
        width: channels scale with it; 64 is the published network (1.0x).
        stem: 32 keeps the resolution, 224 divides it by four.
    """

    default_head = "compact"

    def __init__(self, width: int = PUBLISHED_WIDTH, stem: int = 32) -> None:
        super().__init__()
        channels = scaled(STEM_CHANNELS, width)
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, channels, 3, 1 if stem == 32 else 2, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        self.maxpool = stem_pool(stem)
        for name, (depth, published) in STAGES.items():
            wide = scaled(published, width, multiple=2)
            first = ShuffleBlock(channels, wide, 2)
            others = [ShuffleBlock(wide, wide, 1) for _ in range(depth - 1)]
            setattr(self, name, nn.Sequential(first, *others))
            channels = wide
        self.last_channels = scaled(LAST_CHANNELS, width)
        self.conv5 = nn.Sequential(*_pointwise(channels, self.last_channels))

    @property
    def stages(self) -> Sequence[Sequence[Block]]:
        layers = [getattr(self, name) for name in STAGES]
        *first, last = blocks_of(layers)
        tail = getattr(self, "conv5", None)
        return [*first, ending(last, tail, channels=self.last_channels)]

    def stem(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return x if self.maxpool is None else self.maxpool(x)
