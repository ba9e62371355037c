"""Costs are counted from the modules and agree with counts by hand."""

import pytest
import torch

from model.architectures import ARCHITECTURES
from model.macs import count_stages, cumulative_macs, cumulative_parameters
from model.network import build
from tests.model.networks import quick_or_slow


def counted(architecture, size, classes=100, **arguments):
    with torch.device("meta"):
        net = build(architecture, classes, **arguments)
    return count_stages(net, size)


def conv(pixels, channels_in, channels_out, kernel=3):
    return pixels * channels_in * channels_out * kernel * kernel


def resnet18_trunk():
    """MACs of each stage at 32x32, worked out from the paper's table."""
    first = conv(32 * 32, 3, 64) + 4 * conv(32 * 32, 64, 64)
    later = []
    for channels, side in ((128, 16), (256, 8), (512, 4)):
        pixels = side * side
        halving = conv(pixels, channels // 2, channels) + conv(pixels, channels // 2, channels, 1)
        later.append(halving + 3 * conv(pixels, channels, channels))
    return [first, *later]


def test_the_trunk_of_resnet18_costs_what_its_table_says():
    costs = counted("resnet18", 32)
    assert [c.trunk_macs for c in costs] == resnet18_trunk()
    assert sum(c.trunk_macs for c in costs) + 512 * 100 == pytest.approx(555e6, rel=2e-3)


def test_the_papers_heads_make_resnet18_cost_this_much_at_each_exit():
    macs = cumulative_macs(counted("resnet18", 32))
    assert [round(m / 1e6) for m in macs] == [165, 308, 448, 582]


def separable(pixels, channels_in, channels_out):
    """Depthwise, pointwise, depthwise, pointwise; all at the halved resolution."""
    return pixels * (2 * 9 * channels_in + channels_in * channels_in + channels_in * channels_out)


def test_a_head_costs_what_its_layers_cost():
    costs = counted("resnet18", 32)
    gate = separable(16 * 16, 64, 64)
    align = separable(16 * 16, 64, 128) + separable(8 * 8, 128, 256) + separable(4 * 4, 256, 512)
    assert costs[0].head_macs == gate + align + 512 * 100
    assert costs[3].head_macs == 512 * 100


@pytest.mark.slow
def test_attention_gates_cost_what_they_add():
    with_gates = cumulative_macs(counted("resnet18", 32))[-1]
    without = cumulative_macs(counted("resnet18", 32, attention=False))[-1]
    gates = [separable(side**2, c, c) for side, c in ((16, 64), (8, 128), (4, 256))]
    assert with_gates - without == sum(gates)


PUBLISHED = {  # multiply-accumulates in 1e9 and parameters, the classifier's of 1000 included
    "resnet18": (1.814, 11_689_512, 512),
    "resnet34": (3.664, 21_797_672, 512),
    "resnet50": (4.089, 25_557_032, 2048),
    "resnet101": (7.801, 44_549_160, 2048),
    "resnet152": (11.514, 60_192_808, 2048),
    "resnext50-32x4d": (4.230, 25_028_904, 2048),
    "resnext101-32x8d": (16.414, 88_791_336, 2048),
    "wide-resnet50-2": (11.398, 68_883_240, 2048),
    "wide-resnet101-2": (22.753, 126_886_696, 2048),
    "mobilenetv2": (0.301, 3_504_872, 1280),
    "shufflenetv2": (0.145, 2_278_604, 1024),
}
"""As torchvision's documentation gives them, with the features that its classifier takes."""


@pytest.mark.parametrize("architecture", quick_or_slow(PUBLISHED))
def test_images_of_224_cost_what_is_published(architecture):
    macs, parameters, features = PUBLISHED[architecture]
    costs = counted(architecture, 224, stem=224)
    trunk = sum(c.trunk_macs for c in costs)
    assert trunk + features * 1000 == pytest.approx(macs * 1e9, rel=5e-3)
    own = sum(c.trunk_parameters for c in costs)
    assert own + features * 1000 + 1000 == parameters


CIFAR = {"resnext29-8x64d": 34.4e6, "wide-resnet16-4": 2.7e6, "wide-resnet28-12": 52.5e6}


@pytest.mark.parametrize("architecture", CIFAR)
def test_networks_for_small_images_have_the_published_parameters(architecture):
    own = sum(c.trunk_parameters for c in counted(architecture, 32))
    assert own == pytest.approx(CIFAR[architecture], rel=0.02)


BOTTLENECKS = [
    *("resnet50", "resnet101", "resnet152", "resnext29-8x64d", "resnext50-32x4d"),
    *("resnext101-32x8d", "wide-resnet50-2", "wide-resnet101-2", "pyramidnet101-240"),
    *("se-resnet50", "mobilenetv2"),
]
LIGHT = "shufflenetv2"
"""So light that even compact heads cost a tenth of it."""


@pytest.mark.slow
def test_every_backbone_with_compact_heads_is_known_here():
    with torch.device("meta"):
        compact = [a for a, make in ARCHITECTURES.items() if make().default_head == "compact"]
    assert sorted(compact) == sorted([*BOTTLENECKS, LIGHT])


@pytest.mark.parametrize("stem", [32, pytest.param(224, marks=pytest.mark.slow)])
@pytest.mark.parametrize("architecture", quick_or_slow(BOTTLENECKS))
def test_all_heads_of_a_bottleneck_backbone_cost_less_than_8_percent_of_it(architecture, stem):
    costs = counted(architecture, stem, classes=1000 if stem == 224 else 100, stem=stem)
    assert head_share(costs) < 0.08


def test_the_share_of_compact_heads_hardly_depends_on_the_width():
    assert head_share(counted("resnet50", 32, width=16)) == pytest.approx(0.076, abs=5e-4)


def test_the_papers_heads_are_dear_on_bottlenecks():
    assert head_share(counted("resnet50", 32, head="paper")) > 0.3


def head_share(costs):
    """What all heads cost together, as a share of the backbone."""
    return sum(c.head_macs for c in costs) / sum(c.trunk_macs for c in costs)


def test_parameters_at_the_last_exit_are_all_of_the_networks():
    net = build("resnet10", 10, width=8)
    whole = sum(p.numel() for p in net.parameters())
    assert cumulative_parameters(count_stages(net, 32))[-1] == whole


def test_a_cut_network_pays_for_one_head_alone():
    whole, cut = counted("resnet18", 32), counted("resnet18", 32, keep=[3])
    assert len(cut) == 1
    assert cut[0].trunk_macs == sum(c.trunk_macs for c in whole[:3])
    assert cut[0].head_macs == whole[2].head_macs
    assert cut[0].trunk_parameters == sum(c.trunk_parameters for c in whole[:3])


def test_counting_leaves_the_network_as_it_was():
    net = build("resnet10", 10, width=8)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    count_stages(net, 32)
    assert net.training
    assert not any(m._forward_hooks for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
