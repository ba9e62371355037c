"""VGGs with batch normalisation after Simonyan and Zisserman (2015), torchvision's names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from model.backbone import PUBLISHED_WIDTH, Backbone, Block, scaled

CHANNELS = (64, 128, 256, 512, 512)


class VGG(Backbone):
    """A VGG without its classifier or its last pooling, which exits do by themselves.

    Args:
        depths: convolutions in each of the five stages; every stage but the first halves the
            resolution before its first convolution.
        width: channels of the first stage.
        stem: taken for uniformity; there is none, large images and small ones run the same.
    """

    def __init__(self, depths: Sequence[int], width: int = PUBLISHED_WIDTH, stem: int = 32) -> None:
        super().__init__()
        self.depths = tuple(depths)
        self.channels = [scaled(c, width) for c in CHANNELS]
        modules: list[nn.Module] = []
        channels_in = 3
        for i, (depth, channels) in enumerate(zip(depths, self.channels, strict=True)):
            for j in range(depth):
                modules += [nn.MaxPool2d(2, 2)] if i > 0 and j == 0 else []
                modules += [
                    nn.Conv2d(channels_in, channels, 3, padding=1),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(inplace=True),
                ]
                channels_in = channels
        self.features = nn.Sequential(*modules)

    @property
    def stages(self) -> Sequence[Sequence[Block]]:
        modules = list(self.features)
        stages, at = [], 0
        for i, (depth, channels) in enumerate(zip(self.depths, self.channels, strict=True)):
            blocks = []
            for j in range(depth):
                until = at + (4 if i > 0 and j == 0 else 3)
                if until <= len(modules):
                    blocks.append(Block(tuple(modules[at:until]), channels))
                at = until
            stages.append(blocks)
        return stages

    def stem(self, x: Tensor) -> Tensor:
        return x
