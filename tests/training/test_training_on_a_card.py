"""What training promises holds on a CUDA card."""

import json
import math
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

from model.bundle import load_bundle, load_servable
from model.policy import Measure
from tests.conftest import ROOT
from tests.training.bundles import write_bundle, write_noisy_images
from tests.training.conftest import PREPROCESS, image_set, tiny_net, tiny_recipe, write_images
from tests.training.synced_run import fresh, step_of
from tests.training.test_augment import images, strengths
from tests.training.test_loop import told
from training import operations as do
from training import train as training_command
from training.__main__ import main
from training.accuracy import evaluate
from training.augment import augment
from training.bundling import device_name
from training.checkpoint import CHECKPOINT
from training.distort import AUTO, TRIVIAL
from training.distributed import Processes
from training.folder import Storage, open_folder
from training.log import Bar, read_log
from training.parts import find_parts
from training.seeds import generator_of
from training.teacher import Teacher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # torch warns of how it compiles and repeats
]

CARD = torch.device("cuda", 0)
CPU = torch.device("cpu")
TINY = ["--architecture", "resnet10", "--width", "8", "--size", "16", "--batch-size", "16"]
EVERYTHING = [
    *("--ema", 0.9, "--feature-weight", 0.03, "--equilibrium", "--distill-from", "ensemble"),
    *("--distort", "trivial", "--cutmix", 0.4, "--mixup", 0.4, "--erase", 0.3, "--cutout", 4),
    *("--schedule", "one-cycle", "--accumulate", 2, "--class-weights", "balanced"),
    *("--label-smoothing", 0.1),
]
CLOSE = 1e-2
"""Largest difference allowed between card and CPU, as a share of the largest value: convolutions
in fp32 round to TF32 there."""


@pytest.fixture(autouse=True, scope="module")
def kernels_are_not_tried_out():
    """cuDNN would try every way of each new shape, which takes longer than all steps of these runs
    together; tests in processes of their own let it."""
    settle = training_command._settle

    def settle_for_any(deterministic):
        settle(deterministic)
        torch.backends.cudnn.benchmark = False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_command, "_settle", settle_for_any)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six batches to train on, with test images."""
    root = tmp_path_factory.mktemp("data")
    write_images(root / "train", n=40)
    write_images(root / "test", n=4)
    return root


def train(data, out, *words):
    return main(["train", *map(str, ["--data", data, "--out", out, *TINY, *words])])


def checkpoint(out):
    return torch.load(out / CHECKPOINT, weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a, b):
    return (a.cpu().float() - b.cpu().float()).abs().max() <= CLOSE * b.abs().max()


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a run in the default precision, found by itself to be on the card."""
    out = tmp_path_factory.mktemp("runs") / "default"
    assert train(data, out, "--epochs", 4, "--ema", 0.9) == 0
    return out


def test_a_bundle_from_the_card_answers_on_the_cpu_as_there(trained):
    bundle = load_bundle(trained / "bundle")
    assert bundle.description.training["device"] == device_name(CARD)
    assert bundle.description.training["test_images"] == 12
    x = PREPROCESS.normalise(image_set(24).pixels)
    with torch.inference_mode():
        expected = bundle.net(x)
        answers = bundle.net.to(CARD)(x.to(CARD))
    assert all(close(a, e) for a, e in zip(answers, expected, strict=True))


def test_accuracy_is_the_same_on_the_card_wherever_images_are(trained):
    net = load_bundle(trained / "bundle").net
    expected = evaluate(net, image_set(24), PREPROCESS, Processes(CPU))
    net.to(CARD)
    for kept in (image_set(24), image_set(24).to(CARD)):
        found = evaluate(net, kept, PREPROCESS, Processes(CARD))
        assert found.images == 24
        assert found.exits == pytest.approx(expected.exits, abs=1.5 / 24)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_every_precision_learns(data, tmp_path, precision):
    assert train(data, tmp_path, "--epochs", 4, "--precision", precision) == 0
    first, *_, last = (sum(e["loss"].values()) for e in read_log(tmp_path))
    assert math.isfinite(last) and last < first
    state = checkpoint(tmp_path)
    assert all(v.dtype == torch.float32 for v in state["net"].values() if v.is_floating_point())
    assert bool(state["scaler"]) == (precision == "fp16")


@pytest.fixture(scope="module")
def repeatable(data, tmp_path_factory):
    """The folder of a run with everything, never stopped, that may be repeated."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train(data, out, "--epochs", 2, "--deterministic", *EVERYTHING) == 0
    return out


def check_equal(first, second):
    a, b = checkpoint(first), checkpoint(second)
    assert same(a["net"], b["net"])
    assert same(a["average"]["state"], b["average"]["state"])
    momenta = [
        {str(i): s["momentum_buffer"] for i, s in state["optimizer"]["state"].items()}
        for state in (a, b)
    ]
    assert same(*momenta)
    assert told(read_log(first)) == told(read_log(second))


def test_a_deterministic_run_repeats_itself_exactly(data, repeatable, tmp_path):
    assert train(data, tmp_path / "again", "--epochs", 2, "--deterministic", *EVERYTHING) == 0
    check_equal(repeatable, tmp_path / "again")


@pytest.mark.parametrize("stop_after", [2, 9], ids=["first epoch", "second epoch"])
def test_a_resumed_run_equals_one_that_was_never_stopped(
    data, repeatable, tmp_path, monkeypatch, stop_after
):
    step, taken = Bar.step, []
    words = ["--epochs", 2, "--deterministic", *EVERYTHING]

    def stop(bar, *some):
        step(bar, *some)
        taken.append(some)
        if len(taken) == stop_after:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Bar, "step", stop)
    assert train(data, tmp_path / "parts", *words) == 130
    monkeypatch.undo()
    state = checkpoint(tmp_path / "parts")
    assert 0 < 6 * state["epoch"] + state["step"] < 12
    assert train(data, tmp_path / "parts", *words, "--resume") == 0
    check_equal(repeatable, tmp_path / "parts")


def test_a_run_with_scaled_losses_goes_on_with_its_scale(data, tmp_path):
    words = ["--precision", "fp16", "--schedule", "constant"]
    assert train(data, tmp_path / "a", "--epochs", 2, *words) == 0
    before = checkpoint(tmp_path / "a")
    assert train(data, tmp_path / "a", "--epochs", 2, *words, "--resume") == 0
    assert checkpoint(tmp_path / "a")["scaler"] == before["scaler"]


def test_images_live_on_the_card_while_it_has_room(data, monkeypatch):
    kept = open_folder(find_parts(data), 16, 1.0, tiny_recipe(), Processes(CARD))
    assert kept.training.pixels.device == kept.validation.pixels.device == CARD
    assert kept.training.class_ids.device == CARD
    assert kept.class_weights("balanced", CARD).device == CARD
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    kept = open_folder(find_parts(data), 16, 1.0, tiny_recipe(), Processes(CARD))
    assert kept.training.pixels.device == CPU


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_images_that_are_not_on_the_card_are_trained_on_all_the_same(
    data, tmp_path, monkeypatch, place
):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    words = ["--storage", place, "--workers", 0, "--epochs", 1]
    assert train(data, tmp_path, *words) == 0
    assert read_log(tmp_path)[0]["images_per_second"] > 0


def test_images_from_disk_come_in_pinned_memory(data):
    kept = open_folder(
        find_parts(data), 16, 1.0, tiny_recipe(), Processes(CARD), Storage.DISK, workers=0
    )
    for pixels, class_ids in kept.training.batches([torch.arange(4)], draw=0):
        assert pixels.is_pinned() and class_ids.is_pinned()


def test_a_bundle_teaches_on_the_card(data, trained, tmp_path):
    words = ["--teacher", trained / "bundle", "--size", 24, "--epochs", 1]
    assert train(data, tmp_path, *words) == 0
    assert {"teacher/1", "teacher/4"} <= read_log(tmp_path)[0]["loss"].keys()


def test_a_teacher_says_the_same_on_the_card():
    pixels = image_set(8).pixels
    expected = Teacher(tiny_net(), PREPROCESS, CPU)(pixels)
    teacher = Teacher(tiny_net(), PREPROCESS, CARD)
    assert close(teacher(pixels.to(CARD)), expected)
    with torch.autocast(CARD.type, torch.bfloat16):
        said = teacher(pixels.to(CARD))
    assert said.device == CARD and said.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"pad": 4},
        {"distort": "trivial"},
        {"distort": "auto"},
        {"cutout": 8},
        {"erase": 0.5},
        {"mixup": 0.5},
        {"cutmix": 0.5},
    ],
    ids=str,
)
def test_an_augmentation_on_the_card_gives_what_it_gives_on_the_cpu(options):
    recipe, pixels = tiny_recipe(**options), images(64).to(CARD)
    ids = torch.arange(64, device=CARD) % 10
    made = [augment(pixels, ids, 10, recipe, generator_of(CARD, seed)) for seed in (1, 1, 2)]
    (once, target), (again, _), (other, _) = made
    assert once.device == target.device == CARD
    assert once.shape == pixels.shape and once.dtype == torch.uint8
    assert torch.equal(once, again) and not torch.equal(once, other)
    there, here = augment(images(64), ids.cpu(), 10, recipe, generator_of(CPU, 1))
    assert there.dtype == once.dtype and here.dtype == target.dtype and here.shape == target.shape
    assert abs(there.float().mean() - once.float().mean()) < 25
    if target.is_floating_point():
        torch.testing.assert_close(target.sum(1), torch.ones(64, device=CARD))


@pytest.mark.parametrize("operation", {**TRIVIAL, **AUTO}, ids=lambda operation: operation.__name__)
def test_an_operation_on_the_card_is_that_on_the_cpu(operation):
    pixels = images(16)
    weakest, strongest, _ = TRIVIAL.get(operation) or AUTO[operation]
    if operation in (do.translate_x, do.translate_y):
        strongest /= 32
    strength = strengths(weakest + (strongest - weakest) / 3)
    expected = operation(pixels, strength)
    difference = (operation(pixels.to(CARD), strength.to(CARD)).cpu().int() - expected.int()).abs()
    assert difference.max() <= 2
    assert (difference > 0).float().mean() < 0.02


def test_a_bundle_is_calibrated_and_measured_on_the_card(tmp_path, capsys):
    path = write_bundle(tmp_path / "bundle")
    held = write_noisy_images(tmp_path / "held", 100)
    test = write_noisy_images(tmp_path / "test", 40, seed=1)
    assert main(["calibrate", str(path), "--data", str(held), "--cost", "measured"]) == 0
    bundle = load_servable(path)
    assert bundle.policy.dtypes == ("float16",) and bundle.policy.measure is Measure.MARGIN
    assert main(["evaluate", str(path), "--data", str(test)]) == 0
    report = json.loads((path / "report/report.json").read_text())
    assert (report["device"], report["dtype"]) == (device_name(CARD), "float16")
    assert all(e["accuracy"] > 0.6 for e in report["exits"])
    times = [e["milliseconds"] for e in report["exits"]]
    assert times == sorted(times) and times[0] > 0
    assert main(["export", str(path), "--out", str(tmp_path / "cut"), "--exit", "2"]) == 0


def test_eight_bits_are_calibrated_on_the_card(tmp_path):
    path = write_bundle(tmp_path / "bundle")
    held = write_noisy_images(tmp_path / "held", 100)
    assert main(["calibrate", str(path), "--data", str(held), "--dtype", "auto", "int8"]) == 0
    assert load_servable(path).policy.quantisation is not None


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["fast", "best"])
def test_a_compiled_network_trains(data, tmp_path, preset):
    assert train(data, tmp_path, "--preset", preset, "--epochs", 2, "--compile") == 0
    assert all(math.isfinite(sum(e["loss"].values())) for e in read_log(tmp_path))
    assert load_bundle(tmp_path / "bundle").net.exits == 4


@pytest.mark.slow
def test_torchrun_trains_one_process_on_the_card(data, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    command += ["-m", "training", "train", "--data", str(data), "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, *TINY, "--epochs", "1"], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts = load_bundle(tmp_path / "run/bundle").description.training
    assert (facts["device"], facts["processes"]) == (device_name(CARD), 1)


def run_ranks(backend, count, folder):
    """What each of several processes on the one card computed in a step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.synced_run", backend, str(CARD), str(folder)],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "count"), [("nccl", 1), ("gloo", 2)])
def test_processes_normalise_by_the_whole_batch(backend, count, tmp_path):
    student = fresh(CARD)
    expected = step_of(Processes(CARD), student, student)
    for found in run_ranks(backend, count, tmp_path):
        assert found["synchronised"]
        for name, value in expected["state"].items():
            torch.testing.assert_close(found["state"][name], value, rtol=1e-3, atol=1e-4)
        for name, value in expected["gradients"].items():
            scale = value.abs().max().item()
            torch.testing.assert_close(
                found["gradients"][name], value, rtol=CLOSE, atol=CLOSE * scale + 1e-5
            )
