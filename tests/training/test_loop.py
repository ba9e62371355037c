"""What a run promises: it repeats, it goes on exactly, it stops when it must."""

import dataclasses
import errno
import io
import json
import math
import os
import resource
import shutil
import signal

import pytest
import torch

from model.files import PARTIAL
from tests.training.conftest import CPU, PREPROCESS, image_set, tiny_net, tiny_work
from training.checkpoint import CHECKPOINT, resume, save_checkpoint
from training.distributed import Processes
from training.interrupt import Interrupted
from training.log import LOG, Bar, read_log
from training.loop import fit, validate
from training.losses import total
from training.objective import objective
from training.run import TrainingError
from training.schedule import Pace, pace
from training.step import gradients_of, take_step
from training.tensor_file import write_tensor_file

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
ON_A_CARD = {"steps_at_once": 2, "record": lambda work: work}
"""As on a card, but that replaying is running again."""
ORIGIN = {"files": "a"}
SILENT = {"seconds", "images_per_second"}
"""What a log says about the clock."""


def weights(run):
    return {k: v.clone() for k, v in run.student.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def told(history):
    return [{k: v for k, v in entry.items() if k not in SILENT} for entry in history]


class Spy:
    """Images that tell how many are asked for at once."""

    def __init__(self):
        self.seen = []

    def __len__(self):
        return 24

    def batches(self, indices):
        self.seen.extend(len(batch) for batch in indices)
        return image_set(24).batches(indices)


def stop_at(step):
    return lambda done: signal.raise_signal(signal.SIGINT) if done == step else None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The checkpoint of a run that ended."""
    run, work = tiny_work(tmp_path_factory.mktemp("finished"), origin=ORIGIN)
    fit(run, work)
    return work.folder / CHECKPOINT


@pytest.fixture
def after_another(finished, make_work):
    """Makes a fresh run where another ended; recipe fields as keywords."""

    def make(origin=ORIGIN, **options):
        run, work = make_work(origin=origin, **options)
        shutil.copy(finished, work.folder / CHECKPOINT)
        return run, work

    return make


@pytest.mark.slow
def test_a_run_repeats_itself_bit_for_bit(make_work, tmp_path):
    runs = []
    for name in ("once", "again"):
        run, work = make_work(tmp_path / name, **EVERYTHING)
        fit(run, work)
        runs.append(run)
    assert same(weights(runs[0]), weights(runs[1]))
    assert told(runs[0].history) == told(runs[1].history)


@pytest.mark.slow
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
        pytest.param(4, EVERYTHING, marks=pytest.mark.slow),
        pytest.param(0, EVERYTHING | ON_A_CARD, marks=pytest.mark.slow),
        pytest.param(1, ON_A_CARD, marks=pytest.mark.slow),
    ],
    ids=[
        "plainly",
        "after an epoch",
        "everything",
        "in the second epoch",
        "captured, in a block",
        "captured, between blocks",
    ],
)
def test_a_resumed_run_equals_one_that_was_never_stopped(make_work, tmp_path, step, options):
    whole, work = make_work(tmp_path / "whole", **options)
    fit(whole, work)

    stopped, work = make_work(tmp_path / "parts", after_step=stop_at(step), **options)
    with pytest.raises(Interrupted):
        fit(stopped, work)
    resumed, work = make_work(tmp_path / "parts", net=tiny_net(seed=9), **options)
    resume(resumed, work.recipe, work.origin, work.folder)
    assert (resumed.epoch, resumed.step) == (step // 3, step % 3 + 1)  # not validated yet
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_finished_run_resumes_to_what_it_was(make_work):
    run, work = make_work()
    accuracy = fit(run, work)
    again, work = make_work()
    resume(again, work.recipe, work.origin, work.folder)
    assert fit(again, work) == accuracy
    assert same(weights(run), weights(again))


@pytest.mark.slow
def test_a_checkpoint_belongs_to_its_recipe(after_another):
    other, work = after_another(learning_rate=0.2)
    with pytest.raises(TrainingError, match=r"learning_rate 0\.1 and not 0\.2"):
        resume(other, work.recipe, work.origin, work.folder)


def test_a_checkpoint_belongs_to_its_data(after_another):
    other, work = after_another(origin={"files": "b"})
    with pytest.raises(TrainingError, match="files 'a' and not 'b'"):
        resume(other, work.recipe, work.origin, work.folder)


def test_a_checkpoint_from_before_images_were_named_still_resumes(after_another):
    run, work = after_another(origin=ORIGIN | {"training_files": "of these names"})
    resume(run, work.recipe, work.origin, work.folder)
    assert run.epoch == 2


@pytest.mark.slow
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


@pytest.mark.parametrize("content", [b"PK half a file", b"", b"\x80\x02]q\x00."])
def test_a_broken_checkpoint_is_said(make_work, content):
    run, work = make_work()
    (work.folder / CHECKPOINT).write_bytes(content)
    with pytest.raises(TrainingError, match="cannot be read"):
        resume(run, work.recipe, work.origin, work.folder)


@pytest.mark.parametrize(
    "change",
    [{"recipe": [1]}, {"origin": None}, {"epoch": "a"}, {"history": 3}, {"step": 0.5}, None],
    ids=str,
)
def test_a_checkpoint_of_something_else_is_said(after_another, change):
    run, work = after_another()
    file = work.folder / CHECKPOINT
    state = torch.load(file, weights_only=True)
    torch.save([1, 2] if change is None else {**state, **change}, file)
    with pytest.raises(TrainingError, match="was not written by a run"):
        resume(run, work.recipe, work.origin, work.folder)


def test_a_checkpoint_of_another_program_is_said(make_work):
    run, work = make_work()
    torch.save({"state_dict": {}}, work.folder / CHECKPOINT)
    with pytest.raises(TrainingError, match="was not written by a run"):
        resume(run, work.recipe, work.origin, work.folder)


@pytest.mark.parametrize("part", ["net", "adapters", "optimizer"])
def test_a_damaged_checkpoint_is_said(after_another, part):
    run, work = after_another()
    file = work.folder / CHECKPOINT
    state = torch.load(file, weights_only=True)
    state[part].popitem()
    torch.save(state, file)
    with pytest.raises(TrainingError, match=r"is damaged: .*; start again in another folder"):
        resume(run, work.recipe, work.origin, work.folder)


@pytest.mark.slow
def test_a_resumed_epoch_took_the_time_of_both_its_parts(make_work):
    stopped, work = make_work(after_step=stop_at(1))
    with pytest.raises(Interrupted):
        fit(stopped, work)
    resumed, work = make_work(epochs=2)
    resume(resumed, work.recipe, work.origin, work.folder)
    assert resumed.seconds == stopped.seconds > 0
    resumed.seconds = 100.0
    fit(resumed, work)
    assert 100 <= resumed.history[0]["seconds"] < 160
    assert resumed.history[0]["images_per_second"] > 16 / 60 and resumed.history[1]["seconds"] < 60


def test_a_crash_while_saving_leaves_the_old_checkpoint(after_another, monkeypatch):
    run, work = after_another()
    before = (work.folder / CHECKPOINT).read_bytes()

    def half(state, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        fit(run, work)
    assert (work.folder / CHECKPOINT).read_bytes() == before


def test_a_full_disk_is_said_of_the_checkpoint_and_leaves_the_old_one(after_another):
    run, work = after_another()
    before = (work.folder / CHECKPOINT).read_bytes()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, unlimited[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as full:
            save_checkpoint(run, work.recipe, work.origin, work.folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert full.value.filename == str(work.folder / CHECKPOINT)
    assert [f.read_bytes() for f in work.folder.iterdir()] == [before]


def test_ctrl_c_as_a_checkpoint_is_written_stays_ctrl_c():
    class Written(io.BytesIO):
        def write(self, data):
            if self.tell() > 1000:
                raise KeyboardInterrupt  # as Python does from a signal, within torch's own code
            return super().write(data)

    class File:
        def open(self, mode):
            return Written()

    with pytest.raises(KeyboardInterrupt):
        write_tensor_file(File(), {"weights": torch.zeros(10_000)})


def test_what_a_run_left_that_was_killed_as_it_saved_is_removed(after_another):
    run, work = after_another()
    left = work.folder / f".{CHECKPOINT}.1234{PARTIAL}"
    left.write_bytes(b"half")
    fit(run, work)
    assert not left.exists()


@pytest.mark.slow
def test_a_checkpoint_that_was_just_written_is_not_replaced_before_the_end(make_work, monkeypatch):
    saved, logged = [], []
    monkeypatch.setattr("training.loop.save_checkpoint", lambda run, *_: saved.append(run.epoch))
    run, work = make_work(epochs=4, save_seconds=1000.0)
    monkeypatch.setattr(Bar, "epoch", lambda *_: logged.append(len(read_log(work.folder))))
    fit(run, work)
    assert saved == [0, 4]  # the first before its epoch was validated
    assert logged == [1, 2, 3, 4]


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


def test_weights_that_the_last_step_broke_are_not_saved(make_work):
    def poison(step):
        if step == 5:
            with torch.no_grad():
                run.net.head(2).fc.weight[0, 0] = math.nan

    run, work = make_work(after_step=poison)
    with pytest.raises(TrainingError, match="weights are not finite after the last step"):
        fit(run, work)
    saved = torch.load(work.folder / CHECKPOINT, weights_only=True)
    assert (saved["epoch"], saved["step"]) == (0, 3)
    assert saved["net"]["heads.1.fc.weight"].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("save_seconds", [0.0, 1000.0])
@pytest.mark.parametrize("name", ["adapters.0.bias", "net.backbone.bn1.running_var"])
def test_whatever_is_broken_is_not_saved_over_what_was_whole(make_work, name, save_seconds):
    def poison(step):
        if step == 5:
            run.student.state_dict()[name][0] = math.inf

    run, work = make_work(after_step=poison, epochs=3, save_seconds=save_seconds)
    with pytest.raises(TrainingError, match="weights are not finite"):
        fit(run, work)
    assert (run.epoch, run.step) == (1, 3)
    saved = torch.load(work.folder / CHECKPOINT, weights_only=True)
    assert (saved["epoch"], saved["step"]) == (0, 3)


@pytest.mark.parametrize(
    "options", [{}, pytest.param(EVERYTHING | ON_A_CARD, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("killed_in", [1, 2])
def test_a_run_that_is_killed_as_it_validates_has_lost_no_step(
    make_work, tmp_path, monkeypatch, options, killed_in
):
    whole, work = make_work(tmp_path / "whole", epochs=2, **options)
    fit(whole, work)
    killed, work = make_work(tmp_path / "killed", epochs=2, save_seconds=0.0, **options)
    validated = []

    def die(*_):
        validated.append(killed.epoch)
        if len(validated) == killed_in:
            raise KeyboardInterrupt
        return validate(killed, work, work.validation)

    with monkeypatch.context() as patch:
        patch.setattr("training.loop.validate", die)
        with pytest.raises(KeyboardInterrupt):
            fit(killed, work)
    resumed, work = make_work(tmp_path / "killed", epochs=2, **options)
    taken = []
    resume(resumed, work.recipe, work.origin, work.folder)
    assert (resumed.epoch, resumed.step) == (killed_in - 1, work.steps_an_epoch)
    fit(resumed, dataclasses.replace(work, after_step=taken.append))
    assert len(taken) == (2 - killed_in) * work.steps_an_epoch
    assert same(weights(resumed), weights(whole))
    assert told(resumed.history) == told(whole.history)
    assert all(entry["images_per_second"] > 0 for entry in resumed.history)


def test_no_more_images_are_validated_at_once_than_trained_on(make_work):
    run, work = make_work(batch_size=10)
    spy = Spy()
    validate(run, work, spy)
    assert spy.seen == [10, 10, 4]


def test_no_more_are_validated_at_once_than_a_part_of_a_batch(make_work):
    run, work = make_work(batch_size=10, accumulate=2)
    spy = Spy()
    validate(run, work, spy)
    assert spy.seen == [5, 5, 5, 5, 4]


class OneOfSeveral(Processes):
    """A process whose others are not there."""

    def sum(self, values):
        return values

    def align(self, net):
        pass


@pytest.mark.parametrize(
    ("count", "accumulate", "seen"), [(2, 1, [5, 5, 2]), (2, 2, [2] * 6), (4, 5, [1] * 6)]
)
def test_no_more_are_validated_at_once_than_a_process_trains_on(make_work, count, accumulate, seen):
    run, work = make_work(batch_size=10, accumulate=accumulate)
    spy = Spy()
    shared = dataclasses.replace(work, processes=OneOfSeveral(CPU.device, count=count))
    validate(run, shared, spy)
    assert spy.seen == seen


def test_images_augmented_together_are_validated_together(make_work):
    run, work = make_work(batch_size=10, steps_at_once=2)
    spy = Spy()
    validate(run, work, spy)
    assert spy.seen == [20, 4]


@pytest.mark.slow
def test_every_step_is_taken_at_the_schedules_pace(make_work):
    paces = []

    def note(step):
        group = run.optimizer.param_groups[0]
        paces.append(Pace(group["lr"], group["momentum"]))

    run, work = make_work(after_step=note, schedule="one-cycle", warmup=0.5)
    fit(run, work)
    assert paces == [pace(work.recipe, step, 6) for step in range(6)]
    assert len(set(paces)) > 3


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


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4])
def test_a_step_in_parts_is_the_step_in_one(make_work, parts):
    """Uneven parts, whose statistics are frozen so that they do not differ by them."""
    images, same_all = image_set(15), {"pad": 0, "mirror": False, "batch_size": 15}
    moved = []
    for accumulate in (1, parts):
        run, work = make_work(net=tiny_net(), accumulate=accumulate, **same_all)
        run.student.eval()
        values = take_step(run, gradients_of(run, work), images.pixels, images.class_ids)
        moved.append((values, weights(run)))
    (whole, expected), (summed, found) = moved
    torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-6)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-5)


def test_a_step_tells_the_terms_that_it_went_down(make_work):
    images = image_set(16)
    run, work = make_work(pad=0, mirror=False, feature_weight=0.1)
    run.student.eval()
    outputs = run.student(PREPROCESS.normalise(images.pixels))
    expected = objective(work.recipe, outputs, images.class_ids)
    values = take_step(run, gradients_of(run, work), images.pixels, images.class_ids)
    assert run.names == list(expected)
    torch.testing.assert_close(values, torch.stack([t.detach() for t in expected.values()]))


def test_a_step_weighs_classes(make_work):
    images = image_set(16)
    told = []
    for counts in (None, torch.tensor([1.0, 1.0, 1.0]), torch.tensor([5.0, 1.0, 1.0])):
        run, work = make_work(net=tiny_net())
        work = dataclasses.replace(work, class_weights=counts)
        told.append(take_step(run, gradients_of(run, work), images.pixels, images.class_ids))
    assert torch.equal(told[0], told[1]) and not torch.equal(told[0], told[2])


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
