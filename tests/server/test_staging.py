"""What batches pass through on their way to a card and back, with memory of this machine."""

import numpy as np
import pytest
import torch

from server.card import CardMemory
from server.runner import Runner
from server.staging import Staging

CPU = torch.device("cpu")
IMAGES = list(np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8))


class Host:
    """Memory that is counted, and a card that is done at once."""

    def __init__(self):
        self.locked, self.waits = [], 0

    def lock(self, shape, dtype):
        self.locked.append((shape, dtype))
        return torch.empty(shape, dtype=dtype)

    def wait(self):
        self.waits += 1


@pytest.fixture
def host():
    return Host()


@pytest.fixture
def staging(host):
    return Staging(host.lock, host.wait)


def on_card(bundle, staging):
    return Runner(bundle, CPU, torch.float32, CardMemory(CPU, staging))


def test_batches_up_to_the_largest_share_memory(staging, host):
    for n in (4, 1, 3, 4):
        assert np.array_equal(staging.images(IMAGES[:n]).numpy(), IMAGES[:n])
        staging.said(torch.zeros(n, 11))
    assert host.locked == [((4, 32, 32, 3), torch.uint8), ((4, 11), torch.float32)]


def test_what_was_said_is_waited_for_and_outlives_the_next_batch(staging, host):
    first = staging.said(torch.ones(2, 11))
    assert host.waits == 1
    staging.said(torch.zeros(2, 11))
    assert first.all()


def test_images_of_another_size_have_memory_of_their_own(staging):
    staging.images(IMAGES[:2])
    assert staging.images([np.ones((8, 8, 3), np.uint8)]).shape == (1, 8, 8, 3)


@pytest.mark.slow
def test_a_runner_says_the_same_through_it_and_waits_once_a_batch(bundle, staging, host):
    plain, staged = Runner(bundle, CPU, torch.float32), on_card(bundle, staging)
    rows = [IMAGES, IMAGES]
    for stage, n in ((1, 6), (2, 6), (3, 2), (4, 2)):
        expected, said = plain.run(stage, rows[0][:n]), staged.run(stage, rows[1][:n])
        assert said.confidences == expected.confidences
        np.testing.assert_array_equal(said.probabilities, expected.probabilities)
        rows = [plain.keep(expected, range(n)), staged.keep(said, range(n))]
    assert host.waits == 4


@pytest.mark.gpu
def test_a_cards_memory_is_locked_once(bundle):
    runner = Runner(bundle, torch.device("cuda"), torch.float32)
    runner.run(1, IMAGES)
    before = torch.cuda.host_memory_stats()["num_host_alloc"]
    said = [runner.run(1, IMAGES[:n]).confidences for n in (6, 1, 6)]
    assert torch.cuda.host_memory_stats()["num_host_alloc"] == before
    assert said[0] == said[2]
