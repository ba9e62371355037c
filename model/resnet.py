"""ResNets after He et al. (2016), with the parameter names of torchvision's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from model.backbone import Backbone


def conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)


def projection(channels_in: int, channels_out: int, stride: int) -> nn.Module | None:
    """The shortcut's 1x1 convolution, or None where the identity fits."""
    if stride == 1 and channels_in == channels_out:
        return None
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
        nn.BatchNorm2d(channels_out),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    expansion = 1

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels_in, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = projection(channels_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(out + shortcut)


class ResNet(Backbone):
    """A ResNet without its classifier.

    Args:
        depths: blocks in each of the four stages.
        width: channels of the first stage (64 in the paper).
        stem: 32 keeps the resolution (3x3 convolution), 224 divides it by four (7x7 and pooling).
        growth: each stage's channels as a multiple of `width`.
        strides: by how much each stage divides the resolution.
    """

    def __init__(
        self,
        depths: Sequence[int],
        width: int = 64,
        stem: int = 32,
        growth: Sequence[int] = (1, 2, 4, 8),
        strides: Sequence[int] = (1, 2, 2, 2),
    ) -> None:
        super().__init__()
        self.stage_channels = tuple(width * g * BasicBlock.expansion for g in growth)
        # A first stage that halves the resolution is fed by a stem of half its width, since the
        # stem then runs on four times its pixels.
        channels = width // strides[0]
        if stem == 32:
            self.conv1 = conv3x3(3, channels)
            self.maxpool: nn.MaxPool2d | None = None
        else:
            self.conv1 = nn.Conv2d(3, channels, 7, 2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        for i, (depth, g, stride) in enumerate(zip(depths, growth, strides, strict=True)):
            blocks = []
            for j in range(depth):
                blocks.append(BasicBlock(channels, width * g, stride if j == 0 else 1))
                channels = width * g * BasicBlock.expansion
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))

    @property
    def stages(self) -> Sequence[Sequence[nn.Module]]:
        return [list(getattr(self, f"layer{i + 1}")) for i in range(len(self.stage_channels))]

    def stem(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return x if self.maxpool is None else self.maxpool(x)
