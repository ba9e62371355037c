"""Wide pre-activation ResNets for small images after Zagoruyko and Komodakis (2016)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from model.backbone import (
    PUBLISHED_WIDTH,
    Backbone,
    Block,
    blocks_of,
    conv1x1,
    conv3x3,
    ending,
    projected,
    scaled,
    stem_conv,
    stem_pool,
)

STEM_CHANNELS = 16
STAGES = 3


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each after its normalisation, with a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.channels = channels
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = conv3x3(channels_in, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.relu = nn.ReLU(inplace=True)
        fits = stride == 1 and channels_in == channels
        self.shortcut = None if fits else conv1x1(channels_in, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu(self.bn1(x))
        # A projection takes the activated features, the identity those that came in.
        shortcut = x if self.shortcut is None else projected(self.shortcut, activated)
        out = self.relu(self.bn2(self.conv1(activated)))
        return self.conv2(out) + shortcut


class WideResNet(Backbone):
    """A WideResNet without its classifier.

    Args:
        depth: blocks in each of the three stages.
        factor: how many times wider than a ResNet of that depth it is published.
        width: channels scale with it; 64 is the published network.
        stem: 32 keeps the resolution, 224 divides it by four.
    """

    def __init__(
        self, depth: int, factor: int, width: int = PUBLISHED_WIDTH, stem: int = 32
    ) -> None:
        super().__init__()
        channels = scaled(STEM_CHANNELS, width)
        self.conv1 = stem_conv(channels, stem)
        self.maxpool = stem_pool(stem)
        for i in range(STAGES):
            blocks = []
            for j in range(depth):
                wide = scaled(STEM_CHANNELS * factor * 2**i, width)
                blocks.append(WideBlock(channels, wide, 2 if i > 0 and j == 0 else 1))
                channels = wide
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    @property
    def stages(self) -> Sequence[Sequence[Block]]:
        layers = [getattr(self, f"layer{i + 1}") for i in range(STAGES)]
        *first, last = blocks_of(layers)
        return [*first, ending(last, getattr(self, "bn", None), getattr(self, "relu", None))]

    def stem(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return x if self.maxpool is None else self.maxpool(x)
