"""The served default bundle says what its offline evaluation says, image by image."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from model.bundle import load_bundle
from model.confidence import judge
from model.image import decode
from server.repository import Served
from server.settings import Settings
from tests.conftest import ROOT, running

DEFAULT = ROOT / "model/default"
BOUNDS = (0.01, 0.0)
"""Operating points asked for in turn: the default, and one that takes images to the last exit."""


@torch.inference_mode()
def offline(bundle, images):
    """For every image, the label and confidence at every exit, from whole forward passes."""
    preprocess, policy = bundle.description.preprocess, bundle.policy
    pixels = [preprocess.pixels(decode(data, preprocess.size, 10**6)) for data in images]
    x = preprocess.normalise(torch.stack([torch.from_numpy(p.copy()) for p in pixels]))
    said, passed = [], None
    for logits, calibration in zip(bundle.net(x), policy.calibrations, strict=True):
        judgement = judge(logits, passed, calibration, policy.measure)
        passed = judgement.state
        classes = judgement.probabilities.argmax(1).tolist()
        said.append(list(zip(classes, judgement.confidence.tolist(), strict=True)))
    return list(zip(*said, strict=True))


def test_answers_agree_with_the_offline_evaluation_exit_by_exit(cifar):
    bundle = load_bundle(DEFAULT)
    images = [data for _, data in cifar]
    losses = [BOUNDS[i % len(BOUNDS)] for i in range(len(images))]
    rules = [bundle.policy.rule(bundle.policy.point_for(loss)) for loss in losses]
    expected = offline(bundle, images)
    settings = Settings(bundle=DEFAULT, threads=1, default_deadline_ms=None)
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
    for answer, exits, rule in zip(answers, expected, rules, strict=True):
        leaves = next(k for k, (_, c) in enumerate(exits, 1) if rule.verdict(k, c))
        assert answer["exit"] == leaves
        assert answer["class_id"] == exits[leaves - 1][0]
        for seen, (class_id, confidence) in zip(answer["seen"], exits, strict=False):
            assert seen["class_id"] == class_id
            assert seen["confidence"] == pytest.approx(confidence, abs=1e-4)
    mix = [sum(a["exit"] == k for a in answers) for k in range(1, bundle.net.exits + 1)]
    assert counted == mix
