"""Stages changed for a card, as a processor computes them."""

import os

import pytest
import torch
from torch import fx, nn

from model.exits import DepthwiseConv2d
from model.fold import fold_stages
from model.network import build
from model.policy import Calibration, Measure
from server.dense import densify
from server.fusing import fuse
from server.merging import KERNELS, keep_kernels, merge
from server.units import Unit, example_inputs, make_units
from tests.conftest import PREPROCESS
from tests.server.test_fusing import by_parts

CPU = torch.device("cpu")


def as_it_is(function):
    return function


def traced(function):
    """Compiled as for a card, but for the kernels."""
    return torch.compile(function, dynamic=True, fullgraph=True, backend="aot_eager")


def everything(unit, compile=as_it_is):
    return merge(fuse(densify(unit), by_parts), compile)


WAYS = {
    "fused": lambda unit: fuse(unit, by_parts),
    "merged": lambda unit: merge(unit, as_it_is),
    "dense": densify,
    "everything": everything,
}


def units_of(architecture):
    """Units whose exits hear what those before them said."""
    torch.manual_seed(0)
    net = build(architecture, 10, width=8).eval()
    return [
        Unit(
            stage,
            Calibration(temperature=1.5 + k, carry=0.3 * k, slope=0.9, offset=0.1 * k),
            Measure.MARGIN,
            None if k else PREPROCESS,
            torch.float32,
        ).eval()
        for k, stage in enumerate(fold_stages(net))
    ]


def assert_alike(units, changed, n):
    inputs = (torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8),)
    for unit, other in zip(units, changed, strict=True):
        whole, expected = other(*inputs), unit(*inputs)
        for said, wanted in zip(whole, expected, strict=True):
            torch.testing.assert_close(said, wanted)
            assert said.stride() == wanted.stride()
        inputs = expected[::2]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "architecture",
    [
        "resnet10",
        "shufflenetv2",
        *(pytest.param(a, marks=pytest.mark.slow) for a in ("resnet50", "mobilenetv2", "vgg19-bn")),
    ],
)
@torch.inference_mode()
def test_a_changed_unit_says_what_the_unit_says(architecture, way):
    units = units_of(architecture)
    assert_alike(units, map(WAYS[way], units), 3)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@torch.inference_mode()
def test_the_unit_itself_stays_as_it_was(bundle, way):
    for unit in make_units(bundle, CPU, torch.float32):
        code, weights = unit.stage.code, {n: p.clone() for n, p in unit.named_parameters()}
        changed = WAYS[way](unit)
        assert unit.stage.code == code != changed.stage.code
        assert not changed.training
        for name, weight in unit.named_parameters():
            assert torch.equal(weight, weights[name])


@pytest.mark.parametrize("way", ["fused", "merged"])
def test_weights_are_shared(bundle, way):
    for unit in make_units(bundle, CPU, torch.float32):
        shared = {p.data_ptr() for p in unit.parameters()}
        assert {p.data_ptr() for p in WAYS[way](unit).parameters()} <= shared


def kinds(stage):
    modules = dict(stage.named_modules())
    called = [modules.get(str(node.target)) for node in stage.graph.nodes]
    return [type(m).__name__ if m else n.op for m, n in zip(called, stage.graph.nodes, strict=True)]


def test_a_head_is_left_with_one_convolution_for_two_and_one_gate(bundle):
    unit = make_units(bundle, CPU, torch.float32)[0]
    depthwise = [n for n in unit.stage.graph.nodes if n.target is torch.conv2d]
    assert len(depthwise) == 8
    changed = everything(unit).stage
    assert not [n for n in changed.graph.nodes if n.target is torch.conv2d]
    assert kinds(changed).count("FusedConvolution") == 3 + 8  # of the stage and of its head
    assert kinds(changed).count("_Gate") == 1
    assert not {"BatchNorm2d", "ReLU", "call_function"} & set(kinds(changed))


@pytest.mark.slow
def test_a_gate_whose_normalisation_is_folded_is_one_kernel_too():
    for unit in units_of("resnet50")[:-1]:
        changed = everything(unit)
        assert kinds(changed.stage).count("_Gate") == 1
        assert "call_function" not in kinds(changed.stage)


class Pair(nn.Module):
    """A depthwise convolution and one that mixes its outputs, which cannot always be one."""

    def __init__(self, what):
        super().__init__()
        self.depthwise = DepthwiseConv2d(4, 1)
        self.mixing = nn.Conv2d(4, 4, 3 if what == "wide" else 1, 2 if what == "strided" else 1)
        self.what = what

    def forward(self, x):
        between = self.depthwise(x)
        out = self.mixing(between.relu() if self.what == "with a ReLU" else between)
        return between if self.what == "wanted" else out, out.mean((2, 3))


@pytest.mark.parametrize(
    ("what", "left"),
    [("plain", 0), ("wanted", 1), ("with a ReLU", 1), ("wide", 1), ("strided", 1)],
)
@torch.inference_mode()
def test_only_what_is_between_no_others_becomes_one_convolution(what, left):
    stage = fx.symbolic_trace(Pair(what).eval())
    unit = Unit(stage, Calibration(temperature=1.0), Measure.MARGIN, None, torch.float32)
    dense = densify(unit)
    assert sum(node.target is torch.conv2d for node in dense.stage.graph.nodes) == left
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(dense(x), unit(x))


@pytest.mark.slow
@torch.inference_mode()
def test_a_compiler_sees_all_elementwise_work_whole_at_every_batch_size():
    torch._dynamo.reset()
    units = units_of("resnet10")
    changed = [everything(unit, traced) for unit in units]
    for n in (3, 1, 8):
        assert_alike(units, changed, n)


class Classifier(nn.Module):
    """A stage of one layer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(10, 10)

    def forward(self, x):
        return x, self.fc(x)


@pytest.mark.slow
@pytest.mark.parametrize("measure", Measure)
@torch.inference_mode()
def test_a_compiler_sees_every_measure_whole(measure):
    torch._dynamo.reset()
    calibration = Calibration(temperature=1.5, carry=0.3, slope=0.9, offset=0.1)
    unit = Unit(fx.symbolic_trace(Classifier()), calibration, measure, None, torch.float32)
    x, passed = torch.randn(2, 3, 10).log_softmax(2).unbind()
    for said, expected in zip(merge(unit, traced)(x, passed), unit(x, passed), strict=True):
        torch.testing.assert_close(said, expected)


def test_kernels_are_kept_in_a_folder_that_only_this_user_can_write(tmp_path, monkeypatch):
    monkeypatch.setenv(KERNELS, "")  # to be set back
    monkeypatch.delenv(KERNELS)
    (tmp_path / "file").touch()
    keep_kernels(tmp_path / "file/kernels")
    assert KERNELS not in os.environ
    keep_kernels(tmp_path / "kernels")
    assert (tmp_path / "kernels").stat().st_mode & 0o777 == 0o700
    assert os.environ[KERNELS] == str(tmp_path / "kernels")
    keep_kernels(tmp_path / "others")
    assert os.environ[KERNELS] == str(tmp_path / "kernels")  # as the user wants it


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_a_card_says_the_same_in_fewer_kernels(bundle, dtype):
    torch._dynamo.reset()
    card = torch.device("cuda")
    units = make_units(bundle, card, dtype)
    changed = [merge(fuse(densify(unit))) for unit in units]
    for n in (1, 3, 8):
        for unit, other, given in zip(
            units, changed, example_inputs(units, bundle, n), strict=True
        ):
            said, expected = other(*given), unit(*given)
            assert said[0].is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(said[1], expected[1], atol=0.1, rtol=0)
