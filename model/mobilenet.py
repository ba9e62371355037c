"""MobileNetV2 after Sandler et al. (2018), with the parameter names of torchvision's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from model.backbone import PUBLISHED_WIDTH, Backbone, Block, ending, scaled

STAGES = (
    ((1, 16, 1, 1), (6, 24, 2, 2)),
    ((6, 32, 3, 2),),
    ((6, 64, 4, 2), (6, 96, 3, 1)),
    ((6, 160, 3, 2), (6, 320, 1, 1)),
)
"""For each stage, groups of blocks: expansion, channels, how many, stride of the first."""
STEM_CHANNELS = 32
LAST_CHANNELS = 1280
MULTIPLE = 8


class ConvNormActivation(nn.Sequential):
    """A convolution, its normalisation, a ReLU that ends at six."""

    def __init__(
        self, channels_in: int, channels: int, kernel: int = 1, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(
            nn.Conv2d(
                channels_in, channels, kernel, stride, kernel // 2, groups=groups, bias=False
            ),
            nn.BatchNorm2d(channels),
            nn.ReLU6(inplace=True),
        )


class InvertedResidual(nn.Module):
    """A depthwise 3x3 convolution between a widening and a narrowing 1x1 one.

    Args:
        channels_in: of the features that come in.
        channels: of the features that go out.
        stride: of the depthwise convolution.
        expansion: by how much the 3x3 convolution is wider than what comes in.
    """

    def __init__(self, channels_in: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.channels = channels
        self.adds = stride == 1 and channels_in == channels
        inner = channels_in * expansion
        widening = [ConvNormActivation(channels_in, inner)] if expansion != 1 else []
        self.conv = nn.Sequential(
            *widening,
            ConvNormActivation(inner, inner, 3, stride, groups=inner),
            nn.Conv2d(inner, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(Backbone):
    """A MobileNetV2 without its classifier.

    Args:
        width: channels scale with it, in multiples of eight; 64 is the published network. As
            published, the last layer is never narrower than 1280.
        stem: 224 divides the resolution by four before the first exit, 32 keeps it.
    """

    default_head = "compact"

    def __init__(self, width: int = PUBLISHED_WIDTH, stem: int = 32) -> None:
        super().__init__()
        halving = 1 if stem == 32 else 2
        channels = _channels(STEM_CHANNELS, width)
        modules: list[nn.Module] = [ConvNormActivation(3, channels, 3, halving)]
        self.depths = []
        for i, stage in enumerate(STAGES):
            for expansion, published, count, stride in stage:
                stride = min(stride, halving) if i == 0 else stride
                wide = _channels(published, width)
                for j in range(count):
                    block = InvertedResidual(channels, wide, stride if j == 0 else 1, expansion)
                    modules.append(block)
                    channels = wide
            self.depths.append(sum(count for _, _, count, _ in stage))
        self.last_channels = _channels(LAST_CHANNELS, max(width, PUBLISHED_WIDTH))
        modules.append(ConvNormActivation(channels, self.last_channels))
        self.features = nn.Sequential(*modules)

    @property
    def stages(self) -> Sequence[Sequence[Block]]:
        _, *modules = self.features
        bounds = [0, *itertools.accumulate(self.depths)]
        *first, last = [
            [Block((b,), b.channels) for b in modules[a:z] if isinstance(b, InvertedResidual)]
            for a, z in itertools.pairwise(bounds)
        ]
        tail = modules[bounds[-1] :]
        return [*first, ending(last, *tail, channels=self.last_channels)]

    def stem(self, x: Tensor) -> Tensor:
        return self.features[0](x)


def _channels(published: int, width: int) -> int:
    """To the nearest multiple of eight, but never more than a tenth below, as published."""
    nearest = scaled(published, width, MULTIPLE)
    short = nearest * PUBLISHED_WIDTH < 0.9 * published * width
    return nearest + MULTIPLE if short else nearest
