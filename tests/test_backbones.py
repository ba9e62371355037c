"""Every backbone is built, trained two steps, exported, loaded and served."""

import logging

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from model.bundle import load_bundle, load_servable, save_bundle, save_policy
from model.network import build
from model.policy import NEVER, Calibration, OperatingPoint, Policy
from model.preprocess import Preprocess
from server.runner import Runner
from tests.model.networks import SIZES, rows
from training.export import cut, save_cut
from training.programs import FORMATS, write_programs

CLASSES = ("a", "b", "c")
BATCH = 4
QUICK = ("resnet18-lite",)


def train_two_steps(net, size):
    """Two steps of gradient descent on the labels; the loss of each."""
    torch.manual_seed(0)
    x, class_ids = torch.randn(BATCH, 3, size, size), torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = sum(F.cross_entropy(logits, class_ids) for logits in net.train()(x))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def policy_for(description):
    exits = len(description.exits)
    point = OperatingPoint(
        max_accuracy_loss=0.0,
        thresholds=(NEVER,) * (exits - 1),
        certified=True,
        measured_accuracy_loss=0.0,
        mean_macs=1.0,
        exit_shares=(0.0,) * (exits - 1) + (1.0,),
    )
    return Policy(
        weights_sha256=description.weights_sha256,
        method="by hand",
        delta=0.1,
        calibration_images=100,
        calibrations=(Calibration(temperature=1.0),) * exits,
        operating_points=(point,),
    )


def make_bundle(path, net, architecture, arguments):
    size = SIZES[arguments["stem"]]
    description = save_bundle(
        path,
        net.eval(),
        name=architecture,
        version="1",
        architecture=architecture,
        arguments=arguments,
        classes=CLASSES,
        preprocess=Preprocess(size=size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
        training={},
    )
    save_policy(path, policy_for(description))
    return load_servable(path)


def serve(bundle):
    """What a server says of two images at every exit, float32 `[exits, 2, classes]`."""
    runner = Runner(bundle, torch.device("cpu"), torch.float32)
    size = bundle.description.preprocess.size
    pixels = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    inputs, said = list(pixels), []
    for stage in range(1, runner.exits + 1):
        output = runner.run(stage, inputs)
        said.append(output.probabilities)
        inputs = runner.keep(output, (0, 1))
    return np.stack(said)


@pytest.mark.parametrize(("architecture", "stem"), rows(QUICK))
def test_a_backbone_is_trained_exported_loaded_and_served(architecture, stem, tmp_path):
    arguments = {"width": 8, "stem": stem}
    net = build(architecture, len(CLASSES), **arguments)
    first, second = train_two_steps(net, SIZES[stem])
    assert np.isfinite([first, second]).all()
    assert second != first
    unused = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not unused, f"training never reaches {unused}"
    bundle = make_bundle(tmp_path / "whole", net, architecture, arguments)
    whole = serve(bundle)
    assert np.isfinite(whole).all()
    save_cut(bundle, 2, cut(load_bundle(bundle.path), 2), tmp_path / "cut")
    np.testing.assert_allclose(serve(load_servable(tmp_path / "cut"))[0], whole[1], atol=1e-4)


@pytest.mark.slow
def test_a_network_with_an_exit_after_every_block_is_served(tmp_path):
    arguments = {"width": 8, "stem": 32, "exits": "blocks"}
    net = build("resnet18", len(CLASSES), **arguments)
    train_two_steps(net, SIZES[32])
    said = serve(make_bundle(tmp_path, net, "resnet18", arguments))
    assert len(said) == net.exits == 8
    assert np.isfinite(said).all()


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "architecture",
    ["resnet50", "wide-resnet16-4", "se-resnet18", "vgg19-bn", "mobilenetv2", "shufflenetv2"],
)
@pytest.mark.filterwarnings("ignore")  # the exporters warn of their own dependencies
def test_a_backbone_runs_in_other_runtimes(architecture, format, tmp_path):
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    net = build(architecture, len(CLASSES), width=8)
    train_two_steps(net, 32)
    written = list(write_programs(net.eval(), 32, format, False, tmp_path))
    assert [file.name for file, _ in written] == [f"network.{format}"]
