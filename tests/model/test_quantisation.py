"""Eight-bit convolutions, simulated."""

import pytest
import torch
from torch import fx, nn

from model.fold import fold_stages
from model.quantisation import observe, quantise, quantised_stages
from tests.model.networks import FAMILIES, images, tiny

QUICK = ("resnet18-lite",)


class OneConvolution(nn.Module):
    """A stage of two channels in and two out."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(2, 2, 1, bias=False)
        weight = torch.tensor([[63.0, 0.4], [-0.63, 0.013]])
        self.convolution.weight = nn.Parameter(weight[:, :, None, None])

    def forward(self, x):
        y = self.convolution(x)
        return y, y.mean((2, 3))


def through(stages, x):
    every = []
    for stage in stages:
        x, logits = stage(x)
        every.append(logits)
    return torch.stack(every)


@torch.inference_mode()
def test_weights_are_rounded_by_channel_and_activations_by_tensor():
    stage = fx.symbolic_trace(OneConvolution())
    (rounded,) = quantise([stage], [{"convolution": (-1.0, 254.0)}])  # steps of one, from -1
    x = torch.tensor([[2.4, 254.9], [-3.0, 10.0]])[:, :, None, None]
    said, _ = rounded(x)
    taken = torch.tensor([[2.0, 254.0], [-1.0, 10.0]])
    weight = torch.tensor([[63.0, 0.0], [-0.63, 0.01]])  # steps of 1 and of 0.01
    torch.testing.assert_close(said[:, :, 0, 0], taken @ weight.T)


@torch.inference_mode()
@pytest.mark.parametrize(
    "architecture",
    [a if a in QUICK else pytest.param(a, marks=pytest.mark.slow) for a in FAMILIES],
)
def test_a_network_in_eight_bits_says_nearly_what_it_says_in_full(architecture):
    stages = fold_stages(tiny(architecture))
    x = images(32, 16, seed=1)
    expected = through(stages, x)
    ranges = observe(stages, [x[:8], x[8:]])
    said = through(quantise(stages, ranges), x)
    assert 0 < (said - expected).std() < 0.4 * expected.std()
    torch.testing.assert_close(through(stages, x), expected)  # which stay as they were


def test_ranges_are_of_all_images_and_hold_zero():
    stage = fx.symbolic_trace(OneConvolution())
    low, high = torch.full((1, 2, 4, 4), 0.5), torch.full((1, 2, 4, 4), 3.0)
    assert observe([stage], [low, high]) == ({"convolution": (0.0, 3.0)},)


@pytest.mark.slow
def test_ranges_of_another_network_are_refused():
    other = fold_stages(tiny("resnet10"))
    ranges = observe(other, [images(32, 2, seed=1)])
    with pytest.raises(ValueError, match="the ranges are of another network: they differ in "):
        quantised_stages(tiny("vgg19-bn", exits="stages"), ranges[:1] * 5)
    with pytest.raises(ValueError, match="ranges of 3 stages, and there are 4"):
        quantised_stages(tiny("resnet10"), ranges[:3])


def test_ranges_are_named_as_the_weights_are():
    """So that a policy outlasts changes of the code around them."""
    net = tiny("resnet50")
    (ranges, *_) = observe(fold_stages(net), [images(32, 2)])
    weights = {f"net.{name}" for name in net.state_dict()}
    assert {f"{name}.weight" for name in ranges} <= weights
