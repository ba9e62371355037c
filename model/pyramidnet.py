"""PyramidNets, whose channels grow with every block, after Han et al. (2017)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from model.backbone import (
    PUBLISHED_WIDTH,
    Backbone,
    Block,
    blocks_of,
    conv1x1,
    conv3x3,
    ending,
    scaled,
    stem_conv,
    stem_pool,
)

STEM_CHANNELS = 16
STAGES = 3


class PyramidBottleneck(nn.Module):
    """A bottleneck with a normalisation before and after each convolution.

    The shortcut has no weights: it is pooled where the resolution halves, and padded with zeros
    where channels are added.
    """

    def __init__(self, channels_in: int, inner: int, stride: int) -> None:
        super().__init__()
        self.channels = 4 * inner
        self.added = self.channels - channels_in
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = conv1x1(channels_in, inner)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, inner, stride)
        self.bn3 = nn.BatchNorm2d(inner)
        self.conv3 = conv1x1(inner, self.channels)
        self.bn4 = nn.BatchNorm2d(self.channels)
        self.relu = nn.ReLU(inplace=True)
        self.pool = None if stride == 1 else nn.AvgPool2d(stride, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.bn1(x))
        out = self.conv2(self.relu(self.bn2(out)))
        out = self.bn4(self.conv3(self.relu(self.bn3(out))))
        shortcut = x if self.pool is None else self.pool(x)
        return out + F.pad(shortcut, (0, 0, 0, 0, 0, self.added))


class PyramidNet(Backbone):
    """A PyramidNet of bottlenecks without its classifier.

    Args:
        depth: blocks in each of the three stages.
        widening: channels that all blocks together add to the stem's 16 as published; a
            bottleneck hands on four times that.
        width: channels scale with it; 64 is the published network.
        stem: 32 keeps the resolution, 224 divides it by four.
    """

    default_head = "compact"

    def __init__(
        self, depth: int, widening: int, width: int = PUBLISHED_WIDTH, stem: int = 32
    ) -> None:
        super().__init__()
        channels = scaled(STEM_CHANNELS, width)
        self.conv1 = stem_conv(channels, stem)
        self.bn1 = nn.BatchNorm2d(channels)
        self.maxpool = stem_pool(stem)
        for i in range(STAGES):
            blocks = []
            for j in range(depth):
                share = (i * depth + j + 1) / (STAGES * depth)
                inner = scaled(round(STEM_CHANNELS + widening * share), width)
                blocks.append(PyramidBottleneck(channels, inner, 2 if i > 0 and j == 0 else 1))
                channels = blocks[-1].channels
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    @property
    def stages(self) -> Sequence[Sequence[Block]]:
        layers = [getattr(self, f"layer{i + 1}") for i in range(STAGES)]
        *first, last = blocks_of(layers)
        return [*first, ending(last, getattr(self, "bn", None), getattr(self, "relu", None))]

    def stem(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        return x if self.maxpool is None else self.maxpool(x)
