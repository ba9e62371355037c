"""Tiny networks with weights that tell images apart, each made once."""

import copy
from functools import cache

import pytest
import torch

from model.architectures import ARCHITECTURES
from model.network import build

CLASSES = 5
SIZES = {32: 32, 224: 64}
"""The side of the images that each stem is tested with."""

FAMILIES = [
    "resnet18-lite",
    "resnet50",
    "resnext50-32x4d",
    "wide-resnet16-4",
    "pyramidnet101-240",
    "se-resnet18",
    "vgg19-bn",
    "mobilenetv2",
    "shufflenetv2",
]
"""At least one architecture for each kind of block."""
QUICK = (*FAMILIES, "resnet10", "resnet18")
"""The others only repeat the same blocks more often or wider; they run with the slow tests."""


def quick_or_slow(architectures):
    """Parameters, those that repeat others marked as slow."""
    slow = [pytest.mark.slow]
    return [pytest.param(a, marks=[] if a in QUICK else slow) for a in architectures]


def rows(quick=QUICK, quick_stems=(32,)):
    """Every architecture with every stem, most of them marked as slow."""
    slow = [pytest.mark.slow]
    return [
        pytest.param(a, stem, marks=[] if a in quick and stem in quick_stems else slow)
        for a in ARCHITECTURES
        for stem in SIZES
    ]


@cache
@torch.inference_mode(False)
def tiny(architecture, stem=32, **arguments):
    """A network in eval mode whose running statistics are of real activations; do not change it."""
    torch.manual_seed(0)
    net = build(architecture, CLASSES, width=8, stem=stem, **arguments)
    for norm in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.momentum = 1.0
    with torch.no_grad():
        net(images(stem, 8, seed=1))
    return net.eval()


@cache
@torch.inference_mode(False)
def exact(architecture, stem=32, **arguments):
    """The same in double precision, in which rounding hides no mistake."""
    return copy.deepcopy(tiny(architecture, stem, **arguments)).double()


def rounded(net, dtype):
    """A copy that computes in float32 and rounds its weights and all between layers to `dtype`."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for tensor in (t for t in net.state_dict().values() if t.is_floating_point()):
            tensor.copy_(tensor.to(dtype))
    for layer in (m for m in net.modules() if not list(m.children())):
        layer.register_forward_hook(lambda layer, inputs, out: out.to(dtype).float())
    return net


def images(stem, count, seed=0):
    """Random normalised images `[count, 3, H, W]`."""
    shape = (count, 3, SIZES[stem], SIZES[stem])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
