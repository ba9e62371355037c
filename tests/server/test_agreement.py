"""The served default bundle says what its offline evaluation says, image by image."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from model.bundle import load_bundle
from model.confidence import judge
from model.image import decode
from model.numerics import DTYPES, suits_cpu
from server.served import Served
from server.settings import Settings
from tests.conftest import ROOT, running

DEFAULT = ROOT / "model/default"
BOUNDS = (0.01, 0.0)
"""Operating points asked for in turn: the default, and one that takes images to the last exit."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
AGREEING = {"float32": 1.0, "bfloat16": 0.97}
"""Rounded to bfloat16, what an image is answered depends a little on the batch it is run in."""


@torch.inference_mode()
def offline(bundle, images, dtype):
    """For every image, the label and confidence at every exit, from whole forward passes."""
    preprocess, policy = bundle.description.preprocess, bundle.policy
    pixels = [preprocess.pixels(decode(data, preprocess.size, 10**6)) for data in images]
    stacked = torch.stack([torch.from_numpy(p.copy()) for p in pixels])
    x, net = preprocess.normalise(stacked, dtype), bundle.net.to(dtype)
    said, passed = [], None
    for logits, calibration in zip(net(x), policy.calibrations, strict=True):
        judgement = judge(logits.float(), passed, calibration, policy.measure)
        passed = judgement.log_probabilities
        classes = judgement.probabilities.argmax(1).tolist()
        said.append(list(zip(classes, judgement.confidence.tolist(), strict=True)))
    return list(zip(*said, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "every"),
    [
        ("float32", 5),
        ("float32", 1),
        ("bfloat16", 1),
    ],
)
def test_answers_agree_with_the_offline_evaluation_exit_by_exit(cifar, dtype, every):
    if not suits_cpu(DTYPES[dtype]):
        pytest.skip(f"this processor has no {dtype}")
    bundle = load_bundle(DEFAULT)
    images = [data for _, data in cifar[::every]]
    losses = [BOUNDS[i % len(BOUNDS)] for i in range(len(images))]
    rules = [bundle.policy.rule(bundle.policy.point_for(loss)) for loss in losses]
    expected = offline(bundle, images, DTYPES[dtype])
    settings = Settings(bundle=DEFAULT, threads=1, default_deadline_ms=None, dtype=dtype)
    with running(Served(settings)) as server, ThreadPoolExecutor(8) as clients:

        def ask(data, loss):
            return server.post(data, explain="true", max_accuracy_loss=loss).json()

        answers = list(clients.map(ask, images, losses))
        counted = [
            sum(
                server.metric("answers_total", model="default", exit=str(exit), reason=reason)
                for reason in ("confident", "final")
            )
            for exit in range(1, bundle.net.exits + 1)
        ]
    assert max(len(a["seen"]) for a in answers) == bundle.net.exits
    agreeing = 0
    for answer, exits, rule in zip(answers, expected, rules, strict=True):
        leaves = next(k for k, (_, c) in enumerate(exits, 1) if rule.verdict(k, c))
        agreeing += (answer["exit"], answer["class_id"]) == (leaves, exits[leaves - 1][0])
        for seen, (_, confidence) in zip(answer["seen"], exits, strict=False):
            assert seen["confidence"] == pytest.approx(confidence, abs=TOLERANCE[dtype])
    assert agreeing >= AGREEING[dtype] * len(images)
    mix = [sum(a["exit"] == k for a in answers) for k in range(1, bundle.net.exits + 1)]
    assert counted == mix
