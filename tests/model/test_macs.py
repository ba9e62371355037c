"""Costs are counted from the modules and agree with counts by hand."""

import pytest
import torch

from model.macs import count_stages, cumulative_macs, cumulative_parameters
from model.network import build


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


def test_attention_gates_cost_what_they_add():
    with_gates = cumulative_macs(counted("resnet18", 32))[-1]
    without = cumulative_macs(counted("resnet18", 32, attention=False))[-1]
    gates = [separable(side**2, c, c) for side, c in ((16, 64), (8, 128), (4, 256))]
    assert with_gates - without == sum(gates)


@pytest.mark.parametrize(("architecture", "macs"), [("resnet18", 1.814e9), ("resnet34", 3.664e9)])
def test_images_of_224_cost_the_published_macs(architecture, macs):
    trunk = sum(c.trunk_macs for c in counted(architecture, 224, stem=224))
    assert trunk + 512 * 1000 == pytest.approx(macs, rel=1e-3)


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
