"""Every family that torchvision publishes has its names and shapes, in its order."""

import hashlib

import pytest
import torch

from model.network import build

PUBLISHED = {
    "resnet18": (120, "05d62c7320b26c54"),
    "resnet34": (216, "adc7641db1c67d20"),
    "resnet50": (318, "569b8747885996c6"),
    "resnet101": (624, "ee737dbd57ccac53"),
    "resnet152": (930, "d12ee6d999c9f096"),
    "resnext50-32x4d": (318, "8cdc9b8f3e3b3b2c"),
    "resnext101-32x8d": (624, "2065aae22b752c36"),
    "wide-resnet50-2": (318, "a239e1d2a6f9974b"),
    "wide-resnet101-2": (624, "b0dfa58a3d4475d7"),
    "vgg19-bn": (112, "b1eddbbdc7194b53"),
    "mobilenetv2": (312, "475fe6242d149ee7"),
    "shufflenetv2": (336, "26d8d890053f97c1"),
}
"""How many tensors there are but the classifier's, and a digest of their names and shapes.

Computed from the networks that torchvision 0.29.1 builds, by `digest` below.
"""


def backbone(architecture):
    with torch.device("meta"):
        return build(architecture, 5, stem=224).backbone.state_dict()


def digest(state):
    lines = sorted(f"{name} {list(tensor.shape)}" for name, tensor in state.items())
    return len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_names_and_shapes_are_torchvisions(architecture):
    assert digest(backbone(architecture)) == PUBLISHED[architecture]


SOME_NAMES = {
    "resnet50": {
        "layer1.0.conv3.weight": (256, 64, 1, 1),
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "layer4.2.conv2.weight": (512, 512, 3, 3),
    },
    "resnext50-32x4d": {"layer1.0.conv2.weight": (128, 4, 3, 3)},
    "resnext101-32x8d": {"layer3.22.conv2.weight": (1024, 32, 3, 3)},
    "wide-resnet50-2": {"layer4.0.conv1.weight": (1024, 1024, 1, 1)},
    "vgg19-bn": {
        "features.0.bias": (64,),
        "features.3.weight": (64, 64, 3, 3),
        "features.7.weight": (128, 64, 3, 3),
        "features.50.running_mean": (512,),
    },
    "mobilenetv2": {
        "features.0.0.weight": (32, 3, 3, 3),
        "features.1.conv.0.0.weight": (32, 1, 3, 3),
        "features.2.conv.1.0.weight": (96, 1, 3, 3),
        "features.18.1.running_var": (1280,),
    },
    "shufflenetv2": {
        "conv1.0.weight": (24, 3, 3, 3),
        "stage2.0.branch1.2.weight": (58, 24, 1, 1),
        "stage4.3.branch2.5.weight": (232, 232, 1, 1),
        "conv5.0.weight": (1024, 464, 1, 1),
    },
    "se-resnet50": {  # timm's seresnet50
        "layer1.0.se.fc1.weight": (16, 256, 1, 1),
        "layer4.2.se.fc2.bias": (2048,),
    },
}


@pytest.mark.parametrize("architecture", SOME_NAMES)
def test_layers_are_where_they_are_published_to_be(architecture):
    state = backbone(architecture)
    for name, shape in SOME_NAMES[architecture].items():
        assert tuple(state[name].shape) == shape
