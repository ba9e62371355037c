"""Pretrained ResNets load by the names that their publishers gave."""

import pytest
import torch
from torch import nn

from model.network import build

BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def norm(name):
    return [f"{name}.{part}" for part in BN]


def published_resnet18():
    """The state-dict names of torchvision's resnet18, in its order, without `fc`."""
    names = ["conv1.weight", *norm("bn1")]
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            prefix = f"layer{layer}.{block}"
            names += [f"{prefix}.conv1.weight", *norm(f"{prefix}.bn1")]
            names += [f"{prefix}.conv2.weight", *norm(f"{prefix}.bn2")]
            if layer > 1 and block == 0:
                names += [f"{prefix}.downsample.0.weight", *norm(f"{prefix}.downsample.1")]
    return names


def backbone(architecture, **arguments):
    with torch.device("meta"):
        return build(architecture, 5, **arguments).backbone


def test_resnet18_has_the_published_names():
    assert list(backbone("resnet18").state_dict()) == published_resnet18()


def test_resnet18_has_the_published_shapes():
    shapes = {k: tuple(v.shape) for k, v in backbone("resnet18", stem=224).state_dict().items()}
    assert shapes["conv1.weight"] == (64, 3, 7, 7)
    assert shapes["layer1.1.conv2.weight"] == (64, 64, 3, 3)
    assert shapes["layer2.0.conv1.weight"] == (128, 64, 3, 3)
    assert shapes["layer4.0.downsample.0.weight"] == (512, 256, 1, 1)
    assert shapes["layer4.1.bn2.running_var"] == (512,)


def test_a_plain_pretrained_state_dict_loads_without_its_classifier():
    net = build("resnet18", 5, width=8)
    torch.manual_seed(1)
    state = {
        k: torch.rand_like(v.float()).to(v.dtype) for k, v in net.backbone.state_dict().items()
    }
    fc = nn.Linear(64, 1000)
    net.backbone.load_pretrained({**state, "fc.weight": fc.weight, "fc.bias": fc.bias})
    for name, tensor in net.backbone.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_a_pretrained_state_dict_of_another_network_is_refused():
    state = build("resnet34", 5, width=8).backbone.state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        build("resnet18", 5, width=8).backbone.load_pretrained(state)


def test_the_stem_for_small_images_keeps_their_resolution():
    x = torch.empty(1, 3, 32, 32, device="meta")
    assert backbone("resnet18").stem(x).shape == (1, 64, 32, 32)
    x = torch.empty(1, 3, 224, 224, device="meta")
    assert backbone("resnet18", stem=224).stem(x).shape == (1, 64, 56, 56)


def test_the_lite_variant_keeps_the_names_of_bundles_in_use():
    shapes = {k: tuple(v.shape) for k, v in backbone("resnet18-lite").state_dict().items()}
    assert list(shapes) == lite_names()
    assert shapes["conv1.weight"] == (32, 3, 3, 3)  # half of width: the stem runs on all pixels
    assert shapes["layer1.0.downsample.0.weight"] == (64, 32, 1, 1)
    assert shapes["layer4.0.conv1.weight"] == (256, 256, 3, 3)


def lite_names():
    first = ["layer1.0.downsample.0.weight", *norm("layer1.0.downsample.1")]
    names = [n for n in published_resnet18() if not n.startswith("layer4.0.downsample")]
    at = names.index("layer1.1.conv1.weight")
    return names[:at] + first + names[at:]
