"""What a run promises: it repeats, it goes on exactly, it stops when it must."""

import json
import math
import signal

import pytest
import torch

from tests.training.conftest import PREPROCESS, image_set, tiny_net
from training.checkpoint import CHECKPOINT, resume
from training.interrupt import Interrupted
from training.log import LOG, read_log
from training.loop import fit
from training.losses import total
from training.objective import objective
from training.run import TrainingError

EVERYTHING = {
    "ema": 0.9,
    "feature_weight": 0.03,
    "equilibrium": True,
    "distill_from": "ensemble",
    "distort": "trivial",
    "cutmix": 0.4,
    "mixup": 0.4,
    "erase": 0.3,
    "cutout": 4,
    "schedule": "one-cycle",
    "accumulate": 2,
}
SILENT = {"seconds", "images_per_second"}
"""What a log says about the clock."""


def weights(run):
    return {k: v.clone() for k, v in run.student.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def told(history):
    return [{k: v for k, v in entry.items() if k not in SILENT} for entry in history]


def stop_at(step):
    return lambda done: signal.raise_signal(signal.SIGINT) if done == step else None


def test_a_run_repeats_itself_bit_for_bit(make_work, tmp_path):
    runs = []
    for name in ("once", "again"):
        run, work = make_work(tmp_path / name, **EVERYTHING)
        fit(run, work)
        runs.append(run)
    assert same(weights(runs[0]), weights(runs[1]))
    assert told(runs[0].history) == told(runs[1].history)


def test_another_seed_is_another_run(make_work, tmp_path):
    first, work = make_work(tmp_path / "a", net=tiny_net())
    fit(first, work)
    second, work = make_work(tmp_path / "b", net=tiny_net(), seed=1)
    fit(second, work)
    assert not same(weights(first), weights(second))


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (1, {}),
        pytest.param(2, {}, marks=pytest.mark.slow),
        pytest.param(0, EVERYTHING, marks=pytest.mark.slow),
        (4, EVERYTHING),
    ],
    ids=["plainly", "after an epoch", "everything", "in the second epoch"],
)
def test_a_resumed_run_equals_one_that_was_never_stopped(make_work, tmp_path, step, options):
    whole, work = make_work(tmp_path / "whole", **options)
    fit(whole, work)

    stopped, work = make_work(tmp_path / "parts", after_step=stop_at(step), **options)
    with pytest.raises(Interrupted):
        fit(stopped, work)
    resumed, work = make_work(tmp_path / "parts", net=tiny_net(seed=9), **options)
    resume(resumed, work.recipe, work.origin, work.folder)
    assert (resumed.epoch, resumed.step) == ((0, step + 1) if step < 2 else divmod(step + 1, 3))
    fit(resumed, work)

    assert same(weights(whole), weights(resumed))
    assert told(whole.history) == told(resumed.history)
    if whole.average:
        assert same(whole.average.state, resumed.average.state)
    momenta = [
        [s["momentum_buffer"] for s in r.optimizer.state_dict()["state"].values()]
        for r in (whole, resumed)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(make_work, number, status):
    run, work = make_work(after_step=lambda step: step == 1 and signal.raise_signal(number))
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"{number.name} in epoch 1 after 2 of 3 steps.*--resume"):
        fit(run, work)
    assert (work.folder / CHECKPOINT).exists()
    assert signal.getsignal(number) is before
    try:
        fit(*make_work(after_step=lambda step: step == 1 and signal.raise_signal(number)))
    except Interrupted as left:
        assert left.status == status


def test_a_signal_in_the_last_step_lets_the_run_finish(make_work):
    run, work = make_work(after_step=stop_at(5))
    fit(run, work)
    assert run.epoch == 2


def test_a_second_signal_is_not_held_back(make_work):
    def twice(step):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(*make_work(after_step=twice))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_finished_run_resumes_to_what_it_was(make_work):
    run, work = make_work()
    accuracy = fit(run, work)
    again, work = make_work()
    resume(again, work.recipe, work.origin, work.folder)
    assert fit(again, work) == accuracy
    assert same(weights(run), weights(again))


def test_a_checkpoint_belongs_to_its_recipe(make_work):
    fit(*make_work(origin={"files": "a"}))
    other, work = make_work(learning_rate=0.2, origin={"files": "a"})
    with pytest.raises(TrainingError, match=r"learning_rate 0\.1 and not 0\.2"):
        resume(other, work.recipe, work.origin, work.folder)


def test_a_checkpoint_belongs_to_its_data(make_work):
    fit(*make_work(origin={"files": "a"}))
    other, work = make_work(origin={"files": "b"})
    with pytest.raises(TrainingError, match="files 'a' and not 'b'"):
        resume(other, work.recipe, work.origin, work.folder)


def test_an_older_checkpoint_without_newer_options_still_resumes(make_work):
    run, work = make_work()
    fit(run, work)
    file = work.folder / CHECKPOINT
    state = torch.load(file, weights_only=True)
    for name in ("method", "ema", "schedule", "distort"):
        del state["recipe"][name]
    for name in ("step", "names", "sums", "history", "scaler", "average", "origin"):
        del state[name]
    torch.save(state, file)
    again, work = make_work()
    resume(again, work.recipe, work.origin, work.folder)
    assert again.epoch == 2 and same(weights(run), weights(again))


def test_nothing_to_resume_is_said(make_work):
    run, work = make_work()
    with pytest.raises(TrainingError, match="leave --resume out"):
        resume(run, work.recipe, work.origin, work.folder)


def test_a_broken_checkpoint_is_said(make_work):
    run, work = make_work()
    (work.folder / CHECKPOINT).write_bytes(b"PK half a file")
    with pytest.raises(TrainingError, match="cannot be read"):
        resume(run, work.recipe, work.origin, work.folder)


def test_a_crash_while_saving_leaves_the_old_checkpoint(make_work, monkeypatch):
    run, work = make_work()
    fit(run, work)
    before = (work.folder / CHECKPOINT).read_bytes()

    def half(state, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", half)
    again, work = make_work()
    with pytest.raises(OSError, match="no space"):
        fit(again, work)
    assert (work.folder / CHECKPOINT).read_bytes() == before


def test_a_loss_that_is_not_finite_stops_with_its_step_and_terms(make_work):
    run, work = make_work()

    def poison(step):
        if step == 1:
            with torch.no_grad():
                run.net.head(2).fc.weight.fill_(math.nan)

    run, work = make_work(after_step=poison)
    with pytest.raises(TrainingError, match=r"not finite at step 2: label/1 [\d.]+, label/2 nan"):
        fit(run, work)
    assert not (work.folder / CHECKPOINT).exists()


def test_less_than_a_batch_of_images_is_said(make_work):
    with pytest.raises(TrainingError, match="48 images are fewer than one batch of 64"):
        fit(*make_work(batch_size=64))


def test_parts_of_a_batch_add_up_to_its_gradient(make_work, make_student):
    pixels, ids = image_set(15).pixels, image_set(15).class_ids
    _, work = make_work(feature_weight=0.1)
    gradients = []
    for parts in (1, 4):
        student = make_student(adapt=True)
        for some, targets in zip(pixels.chunk(parts), ids.chunk(parts), strict=True):
            outputs = student(PREPROCESS.normalise(some))
            loss = total(objective(work.recipe, outputs, targets)) * len(some) / len(pixels)
            loss.backward()
        gradients.append([p.grad for p in student.parameters() if p.grad is not None])
    for whole, summed in zip(*gradients, strict=True):
        torch.testing.assert_close(summed, whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_a_short_precision_trains_weights_in_fp32(make_work, precision):
    run, work = make_work(epochs=1, precision=precision)
    fit(run, work)
    assert run.net.backbone.conv1.weight.dtype == torch.float32
    assert all(math.isfinite(v) for v in run.history[0]["loss"].values())


def test_a_fp16_step_that_overflows_is_left_out_and_scaled_down(make_work):
    run, work = make_work(epochs=1, precision="fp16")
    run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": 2.0**40})
    before = weights(run)
    fit(run, work)
    assert run.scaler.get_scale() < 2.0**40
    kept = {k for k, v in weights(run).items() if torch.equal(v, before[k])}
    assert "net.heads.0.fc.weight" in kept  # three steps are too few to come down from 2**40


def test_the_log_has_a_line_an_epoch_for_machines_and_scalars_for_people(make_work):
    run, work = make_work()
    fit(run, work)
    lines = read_log(work.folder)
    assert [entry["epoch"] for entry in lines] == [1, 2]
    assert lines == json.loads(json.dumps(run.history))
    assert {"loss", "validation_accuracy", "ensemble_accuracy", "learning_rate"} <= set(lines[0])
    assert len(lines[0]["validation_accuracy"]) == 4
    assert list((work.folder / "tensorboard").glob("events.*"))
    assert (work.folder / LOG).read_text().endswith("}\n")


@pytest.mark.slow
def test_training_learns_what_can_be_learnt(make_work):
    accuracy = fit(*make_work(epochs=8))
    assert min(accuracy.exits[1:]) > 0.6
