"""ResNets after He et al. (2016), with the parameter names of torchvision's.

ResNeXt (Xie et al., 2017) groups the bottleneck's 3x3 convolution, WideResNet-50-2 (Zagoruyko
and Komodakis, 2016) widens it; both are rows of the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from model.backbone import (
    PUBLISHED_WIDTH,
    Backbone,
    Block,
    blocks_of,
    conv1x1,
    conv3x3,
    projected,
    stem_conv,
    stem_pool,
)


class Projection(nn.Sequential):
    """A shortcut's 1x1 convolution with its normalisation."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__(
            conv1x1(channels_in, channels_out, stride),
            nn.BatchNorm2d(channels_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        convolution, norm = self
        assert isinstance(convolution, nn.Conv2d)
        return norm(projected(convolution, x))


def projection(channels_in: int, channels_out: int, stride: int) -> nn.Module | None:
    """What makes a shortcut fit, or None where the identity fits."""
    fits = stride == 1 and channels_in == channels_out
    return None if fits else Projection(channels_in, channels_out, stride)


class ResidualBlock(nn.Module):
    """Adds what `residual` makes of the features to a shortcut of them."""

    relu: nn.ReLU
    downsample: nn.Module | None
    channels: int
    """Of the output."""

    def residual(self, x: Tensor) -> Tensor:
        """Features `[N, C_in, H, W]` to what is added to their shortcut."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        out = self.residual(x)
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(out + shortcut)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions with a shortcut."""

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.channels = width
        self.conv1 = conv3x3(channels_in, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = projection(channels_in, width, stride)

    def residual(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(out))


class Bottleneck(ResidualBlock):
    """A 3x3 convolution between two 1x1 ones, with a shortcut of four times the width.

    Args:
        channels_in: of the features that come in.
        width: a quarter of the channels that go out.
        stride: of the 3x3 convolution, as in torchvision.
        groups: of the 3x3 convolution.
        base_width: its channels a group, for a `width` of 64.
    """

    def __init__(
        self, channels_in: int, width: int, stride: int, groups: int = 1, base_width: int = 64
    ) -> None:
        super().__init__()
        self.channels = 4 * width
        inner = max(1, width * base_width // PUBLISHED_WIDTH) * groups
        self.conv1 = conv1x1(channels_in, inner)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, inner, stride, groups)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv1x1(inner, self.channels)
        self.bn3 = nn.BatchNorm2d(self.channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection(channels_in, self.channels, stride)

    def residual(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.bn3(self.conv3(out))


class ResNet(Backbone):
    """A ResNet without its classifier.

    Args:
        depths: blocks in each stage.
        block: makes a block from its input channels, its width and its stride.
        width: channels of the first stage's 3x3 convolutions (64 in the paper).
        stem: 32 keeps the resolution (3x3 convolution), 224 divides it by four (7x7 and pooling).
        growth: each stage's width as a multiple of `width`.
        strides: by how much each stage divides the resolution.
    """

    def __init__(
        self,
        depths: Sequence[int],
        block: Callable[[int, int, int], ResidualBlock] = BasicBlock,
        width: int = PUBLISHED_WIDTH,
        stem: int = 32,
        growth: Sequence[int] = (1, 2, 4, 8),
        strides: Sequence[int] = (1, 2, 2, 2),
    ) -> None:
        super().__init__()
        # A first stage that halves the resolution is fed by a stem of half its width, since the
        # stem then runs on four times its pixels.
        channels = max(1, width // strides[0])
        self.conv1 = stem_conv(channels, stem)
        self.maxpool = stem_pool(stem)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.layers = len(depths)
        for i, (depth, g, stride) in enumerate(zip(depths, growth, strides, strict=True)):
            blocks: list[ResidualBlock] = []
            for j in range(depth):
                blocks.append(block(channels, width * g, stride if j == 0 else 1))
                channels = blocks[-1].channels
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            if isinstance(blocks[0], Bottleneck):
                self.default_head = "compact"

    @property
    def stages(self) -> Sequence[Sequence[Block]]:
        layers = [getattr(self, f"layer{i + 1}") for i in range(self.layers)]
        return blocks_of(layers)

    def stem(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return x if self.maxpool is None else self.maxpool(x)
