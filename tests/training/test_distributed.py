"""Several processes compute what one does."""

import os
import re
import socket
import subprocess
import sys

import pytest
import torch

from model.bundle import load_bundle
from tests.conftest import ROOT
from tests.training.conftest import CPU, PREPROCESS, image_set, tiny_net
from tests.training.distributed_run import gradients
from tests.training.test_loop import told
from training.accuracy import evaluate
from training.checkpoint import CHECKPOINT
from training.log import read_log
from training.parts import find_parts
from training.seen import TRAINED, digests_of, load_digests

pytestmark = pytest.mark.slow  # each process imports torch anew


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes, told of each other as torchrun does, computed, with their folder."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.distributed_run", str(folder)],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(r), "LOCAL_RANK": str(r)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in (0, 1)
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
        assert "Warning" not in errors
    return folder, [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in (0, 1)]


def test_gradients_of_two_processes_are_those_of_one(ranks):
    expected = gradients(CPU)
    for rank in ranks[1]:
        assert rank["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(rank["gradients"][name], gradient, rtol=1e-3, atol=1e-6)


def test_both_processes_know_the_accuracy_over_all_images(ranks):
    expected = evaluate(tiny_net(), image_set(25), PREPROCESS, CPU)
    for rank in ranks[1]:
        assert rank["images"] == 25
        assert tuple(rank["accuracy"]) == expected.exits


def test_both_processes_end_with_the_same_weights(ranks):
    first, second = (rank["weights"] for rank in ranks[1])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_all_processes_validate_the_network_that_is_saved(ranks):
    folder, states = ranks
    saved = torch.load(folder / "whole" / CHECKPOINT, weights_only=True)["average"]["state"]
    for state in states:
        assert torch.equal(state["validated"][-1], saved["backbone.bn1.running_mean"])


def test_processes_that_were_stopped_go_on_exactly(ranks):
    for state in ranks[1]:
        assert re.search("stopped by .* in epoch 1 after 1 of 3 steps", state["said"])
        for name, weight in state["weights"].items():
            assert torch.equal(state["resumed"][name], weight)
        assert told(state["resumed_history"]) == told(state["history"])


def test_every_process_knows_the_lines_of_all_once(ranks):
    for state in ranks[1]:
        assert state["lines"] == ["of 0", "of both", "of 1"]


def test_a_flag_of_one_process_is_up_in_all(ranks):
    assert [rank["flags"] for rank in ranks[1]] == [[False, True]] * 2


def test_one_process_writes_for_both(ranks):
    folder, _ = ranks
    assert [entry["epoch"] for entry in read_log(folder / "whole")] == [1, 2]
    assert len(list((folder / "whole/tensorboard").iterdir())) == 1


def test_torchrun_trains_one_bundle(folder, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "training", "train", "--data", str(folder), "--out", str(tmp_path / "run")]
    command += [
        "--architecture",
        "resnet10",
        "--width",
        "8",
        "--size",
        "16",
        "--batch-size",
        "16",
        "--epochs",
        "1",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wrote ") == 1
    trained = load_bundle(tmp_path / "run/bundle").description.training
    assert trained["processes"] == 2 and trained["test_images"] == 12
    files = find_parts(folder).training.files
    recorded = load_digests(tmp_path / "run/bundle", TRAINED)
    assert set(recorded.tolist()) == set(digests_of(files).tolist())
