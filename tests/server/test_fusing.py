"""Fused convolutions, by operations that a processor has too."""

import operator

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from model.policy import Calibration, Measure
from server.fusing import FusedConvolution, fuse
from server.units import Unit, example_inputs, make_units

CPU = torch.device("cpu")


def by_parts(convolution, x, other):
    out = convolution(x)
    return F.relu(out if other is None else out + other)


def calls(stage, kind):
    modules = dict(stage.named_modules())
    return sum(isinstance(modules.get(str(node.target)), kind) for node in stage.graph.nodes)


def test_every_block_of_a_resnet_is_fused_with_its_sum(bundle):
    units = make_units(bundle, CPU, torch.float32)
    for unit in units:
        before = unit.stage.code
        stage = fuse(unit, by_parts).stage
        assert calls(stage, FusedConvolution) >= 2
        assert calls(stage, nn.ReLU) == 0
        assert operator.add not in [node.target for node in stage.graph.nodes]
        assert unit.stage.code == before


@torch.inference_mode()
def test_a_convolution_that_the_card_cannot_fuse_is_tried_once_and_computed_in_parts(bundle):
    tried = []

    def some(convolution, x, other):
        tried.append(convolution)
        if convolution.in_channels == 3:
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        return by_parts(convolution, x, other)

    unit = make_units(bundle, CPU, torch.float32)[0]
    fused, (pixels,) = fuse(unit, some), example_inputs([unit], bundle, 3)[0]
    for _ in range(3):
        torch.testing.assert_close(fused(pixels)[1], unit(pixels)[1])
    assert sum(c.in_channels == 3 for c in tried) == 1
    assert len(tried) > 6


class Wanted(nn.Module):
    """What comes before a ReLU is wanted as it is too: a convolution's output, or its sum."""

    def __init__(self, what):
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)
        self.what = what

    def forward(self, x):
        out = self.convolution(x)
        summed = out if self.what == "alone" else out + x
        return out if self.what == "summand" else summed, F.relu(summed).mean((2, 3))


@pytest.mark.parametrize("what", ["alone", "sum", "summand"])
def test_nothing_is_computed_twice_for_being_wanted_before_its_relu_too(what):
    stage = fx.symbolic_trace(Wanted(what))
    unit = Unit(stage, Calibration(temperature=1.0), Measure.MARGIN, None, torch.float32)
    assert calls(fuse(unit, by_parts).stage, FusedConvolution) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_a_card_fuses_the_convolutions_of_a_resnet(bundle, dtype):
    card = torch.device("cuda")
    units = make_units(bundle, card, dtype)
    for unit, inputs in zip(units, example_inputs(units, bundle, 3), strict=True):
        said, expected = fuse(unit)(*inputs), unit(*inputs)
        assert said[0].is_contiguous(memory_format=torch.channels_last)
        np.testing.assert_allclose(said[1].cpu(), expected[1].cpu(), atol=0.1)
