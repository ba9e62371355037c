"""The shape every backbone family has: a stem and stages of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

STEMS = (32, 224)
PUBLISHED_WIDTH = 64


class Block(NamedTuple):
    """What runs in one piece; an exit may follow."""

    modules: tuple[nn.Module, ...]
    """Run in turn; all but the family's own names, so that nothing is registered twice."""
    channels: int
    """Of the features that it hands on."""


class Backbone(nn.Module):
    """A stem followed by stages; each stage is an ordered list of blocks.

    A family sets its own submodules (with the names its published weights use) and describes
    them once through `stages`. Nothing here is registered twice: `stages` returns references, so
    `state_dict()` holds only the family's own names.
    """

    default_head = "paper"
    """The kind of head that exits have unless told otherwise; bundles rely on it."""

    classifier_prefixes: tuple[str, ...] = ("fc.", "classifier.")
    """State-dict names of the published classifier, which exits replace."""

    dropped: tuple[str, ...] = ()
    """State-dict names, up to a dot, of what has been dropped."""

    @property
    def stages(self) -> Sequence[Sequence[Block]]:
        """The blocks of each stage, shallow to deep; none where they have been dropped."""
        raise NotImplementedError

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels of the features that each stage hands on, shallow to deep."""
        return tuple(stage[-1].channels for stage in self.stages if stage)

    def drop(self, blocks: Iterable[Block]) -> None:
        """Delete these blocks; other names stay."""
        unwanted = {id(module) for block in blocks for module in block.modules}
        names = [name for name, module in self.named_modules() if id(module) in unwanted]
        for name in names:
            parent, _, own = name.rpartition(".")
            delattr(self.get_submodule(parent), own)
        self.dropped = tuple(f"{name}." for name in names)

    def stem(self, x: Tensor) -> Tensor:
        """Normalised images `[N, 3, H, W]` to the first stage's input."""
        raise NotImplementedError

    def load_pretrained(self, state: Mapping[str, Tensor]) -> None:
        """Load a plain pretrained backbone, leaving out its classifier and what was dropped.

        Raises:
            RuntimeError: names or shapes differ from this backbone's.
        """
        unwanted = self.classifier_prefixes + self.dropped
        self.load_state_dict({k: v for k, v in state.items() if not k.startswith(unwanted)})


def conv3x3(channels_in: int, channels_out: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the resolution at stride 1."""
    return nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """A convolution of each pixel by itself."""
    return nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)


def projected(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """Features through a shortcut's 1x1 convolution, in the one way that trains on any processor.

    oneDNN's fp32 backward pass of such a convolution with a stride writes past its memory where few
    channels come in: fewer than 16 with AVX-512, at sides of 46, 48, 56, 64 and more; fewer than 8
    with AVX2 (torch 2.13). Without a stride it does not, and pooling one pixel of each square gives
    exactly the pixels that a stride would look at, no slower.
    """
    if convolution.stride == (1, 1) or not (convolution.training and x.device.type == "cpu"):
        return convolution(x)
    pixels = F.avg_pool2d(x, 1, convolution.stride)
    return F.conv2d(pixels, convolution.weight, convolution.bias)


def stem_conv(channels: int, stem: int) -> nn.Conv2d:
    """The first convolution: 3x3 for small images, 7x7 that halves them for large ones."""
    if stem == 32:
        return conv3x3(3, channels)
    return nn.Conv2d(3, channels, 7, 2, padding=3, bias=False)


def stem_pool(stem: int) -> nn.MaxPool2d | None:
    """The pooling after it: none for small images, halving for large ones."""
    return None if stem == 32 else nn.MaxPool2d(3, 2, padding=1)


def scaled(channels: int, width: int, multiple: int = 1) -> int:
    """Published channels for a network of this width, to the nearest multiple."""
    steps = (2 * channels * width + multiple * PUBLISHED_WIDTH) // (2 * multiple * PUBLISHED_WIDTH)
    return max(1, steps) * multiple


def blocks_of(layers: Iterable[Iterable[Any]]) -> list[list[Block]]:
    """The blocks of stages whose modules are one block each and know their `channels`."""
    return [[Block((module,), module.channels) for module in layer] for layer in layers]


def ending(
    blocks: list[Block], *tail: nn.Module | None, channels: int | None = None
) -> list[Block]:
    """The blocks of the last stage, the last of which ends with `tail` where that is still there.

    Pre-activation networks normalise once more at the end, light ones widen; that belongs to the
    last block, and goes with it when it is dropped.

    Args:
        blocks: of the last stage.
        tail: what follows them; None for what was dropped.
        channels: that the tail hands on, where they differ from the last block's.
    """
    present = tuple(module for module in tail if module is not None)
    if not blocks or not present:
        return blocks
    *others, last = blocks
    return [*others, Block((*last.modules, *present), channels or last.channels)]
