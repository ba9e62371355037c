"""Every backbone by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from model.backbone import Backbone
from model.mobilenet import MobileNetV2
from model.pyramidnet import PyramidNet
from model.resnet import Bottleneck, ResNet
from model.senet import SEBasicBlock, SEBottleneck
from model.shufflenet import ShuffleNetV2
from model.vgg import VGG
from model.wideresnet import WideResNet

ARCHITECTURES: dict[str, Callable[..., Backbone]] = {
    "resnet10": partial(ResNet, depths=(1, 1, 1, 1)),
    "resnet18": partial(ResNet, depths=(2, 2, 2, 2)),
    "resnet18-lite": partial(
        ResNet, depths=(2, 2, 2, 2), growth=(1, 2, 4, 4), strides=(2, 2, 2, 1)
    ),
    "resnet34": partial(ResNet, depths=(3, 4, 6, 3)),
    "resnet50": partial(ResNet, depths=(3, 4, 6, 3), block=Bottleneck),
    "resnet101": partial(ResNet, depths=(3, 4, 23, 3), block=Bottleneck),
    "resnet152": partial(ResNet, depths=(3, 8, 36, 3), block=Bottleneck),
    "resnext29-8x64d": partial(
        ResNet,
        depths=(3, 3, 3),
        growth=(1, 2, 4),
        strides=(1, 2, 2),
        block=partial(Bottleneck, groups=8, base_width=64),
    ),
    "resnext50-32x4d": partial(
        ResNet, depths=(3, 4, 6, 3), block=partial(Bottleneck, groups=32, base_width=4)
    ),
    "resnext101-32x8d": partial(
        ResNet, depths=(3, 4, 23, 3), block=partial(Bottleneck, groups=32, base_width=8)
    ),
    "wide-resnet50-2": partial(
        ResNet, depths=(3, 4, 6, 3), block=partial(Bottleneck, base_width=128)
    ),
    "wide-resnet101-2": partial(
        ResNet, depths=(3, 4, 23, 3), block=partial(Bottleneck, base_width=128)
    ),
    # These names count convolutions: 6n+4 where shortcuts' are counted, 6n+2 where they are not
    # (20 and 44, as in the paper on self-distillation).
    "wide-resnet16-4": partial(WideResNet, depth=2, factor=4),
    "wide-resnet20-8": partial(WideResNet, depth=3, factor=8),
    "wide-resnet28-12": partial(WideResNet, depth=4, factor=12),
    "wide-resnet44-8": partial(WideResNet, depth=7, factor=8),
    "pyramidnet101-240": partial(PyramidNet, depth=11, widening=240),
    "se-resnet18": partial(ResNet, depths=(2, 2, 2, 2), block=SEBasicBlock),
    "se-resnet50": partial(ResNet, depths=(3, 4, 6, 3), block=SEBottleneck),
    "vgg19-bn": partial(VGG, depths=(2, 2, 4, 4, 4)),
    "mobilenetv2": MobileNetV2,
    "shufflenetv2": ShuffleNetV2,
}
"""A variant states only what differs from its family.

All take `width`, with which all channels scale (64 is the network as published), and `stem` (32 or
224, the size of images it is for).
"""
