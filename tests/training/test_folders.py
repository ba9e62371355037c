"""Data folders: their parts, what cannot be read, what does not fit."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.preprocess import Preprocess
from tests.conftest import until
from tests.training.conftest import CLASSES, CPU, tiny_net, tiny_recipe, write_images
from training import room
from training.accuracy import evaluate
from training.checkpoint import CHECKPOINT
from training.data import DataError, list_folder, load, split_by_hash
from training.distributed import Processes
from training.folder import Storage, natural_size, open_folder
from training.normalisation import CIFAR10, CIFAR10_CLASSES, CIFAR100, measure, normalisation
from training.parts import HELD_OUT, check_apart, find_parts
from training.seeds import generator_of, seed_of
from training.stream import Stream, random_box

PLAIN = Preprocess(size=16, mean=(0.5,) * 3, std=(0.25,) * 3)


def names(listing):
    return {f"{f.parent.name}/{f.name}" for f in listing.files}


def test_training_held_out_and_test_are_disjoint(folder):
    parts = find_parts(folder)
    assert not names(parts.training) & names(parts.held_out)
    assert len(parts.training) + len(parts.held_out) == 36
    assert len(parts.held_out) == 3 and len(parts.test) == 12


def test_the_held_out_images_are_those_of_smallest_digest_as_ever(tmp_path):
    write_images(tmp_path, n=20)
    held = split_by_hash(list_folder(tmp_path), HELD_OUT)[1]
    assert names(held) == {
        *("dark/017.png", "dark/019.png"),
        *("light/011.png", "light/012.png"),
        *("middle/007.png", "middle/017.png"),
    }


def test_a_single_folder_is_cut_in_three_with_the_same_images_held_out(tmp_path):
    write_images(tmp_path, n=30)
    parts = find_parts(tmp_path)
    sizes = [len(p) for p in (parts.training, parts.held_out, parts.test)]
    assert sizes == [72, 9, 9]
    assert len(names(parts.training) | names(parts.held_out) | names(parts.test)) == 90
    assert names(parts.held_out) == names(split_by_hash(list_folder(tmp_path), HELD_OUT)[1])


def test_a_single_folder_too_small_for_a_test_part_has_none(tmp_path):
    parts = find_parts(write_images(tmp_path, n=6))
    assert (len(parts.training), len(parts.held_out), parts.test) == (15, 3, None)


def test_a_class_may_be_called_as_a_part_is(tmp_path):
    classes = ("bus", "test", "train")
    parts = find_parts(write_images(tmp_path, classes, n=20))
    assert parts.training.classes == classes
    assert len(parts.training) + len(parts.held_out) + len(parts.test) == 60


def test_a_part_without_class_folders_is_no_class(tmp_path):
    write_images(tmp_path, ("train", "test", "dev"))
    with pytest.raises(DataError, match="train has no class folders"):
        find_parts(tmp_path)


def test_a_test_part_without_class_folders_is_an_error_whatever_is_beside_it(folder):
    for name in ("dark", "light", "middle"):
        (folder / "test" / name / "000.png").rename(folder / "test" / f"{name}.png")
        shutil.rmtree(folder / "test" / name)
    (folder / "annotations").mkdir()
    with pytest.raises(DataError, match="test has no class folders"):
        find_parts(folder)


def test_fewer_images_a_class_leave_the_other_parts_whole(folder):
    few, many = find_parts(folder, per_class=5), find_parts(folder)
    assert len(few.training) == 15 and names(few.training) < names(many.training)
    assert names(few.held_out) == names(many.held_out)
    assert few.digest == many.digest


@pytest.mark.parametrize("apart", [True, False])
def test_less_held_out_is_trained_on_and_the_test_part_stays(tmp_path, apart):
    write_images(tmp_path / "train" if apart else tmp_path, n=40)
    if apart:
        write_images(tmp_path / "test", n=5)
    usual, less = find_parts(tmp_path), find_parts(tmp_path, share=0.03)
    assert (len(usual.held_out), len(less.held_out)) == (12, 3)
    assert names(less.held_out) < names(usual.held_out)
    assert names(less.test) == names(usual.test)
    everything = names(usual.training) | names(usual.held_out)
    assert names(less.training) == everything - names(less.held_out)
    assert less.digest == usual.digest


def test_images_to_train_on_are_known_by_their_names_whether_they_can_be_read_or_not(folder):
    write_images(folder / "train", n=20)

    def opened(share):
        parts = find_parts(folder, per_class=9, share=share)
        return open_folder(parts, 16, 1.0, tiny_recipe(), CPU, Storage.MEMORY)

    usual, less = opened(HELD_OUT), opened(0.05)
    assert len(usual.training) == len(less.training) and usual.digest == less.digest
    assert usual.training_digest != less.training_digest
    less.training.files[0].write_bytes(b"broken")
    assert opened(0.05).training_digest == less.training_digest


def test_too_little_to_hold_out_is_an_error(folder):
    with pytest.raises(DataError, match=r"too few images a class to hold 1\.0% of each out"):
        find_parts(folder, share=0.01)


def test_a_folder_is_known_again_by_the_names_in_it(folder, tmp_path):
    before = find_parts(folder).digest
    write_images(tmp_path / "copy/train")
    assert find_parts(tmp_path / "copy").digest == before
    (folder / "train/dark/000.png").rename(folder / "train/dark/new.png")
    assert find_parts(folder).digest != before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "train/empty").mkdir(), "class folder .*empty has no image"),
        (lambda root: write_images(root / "test", ("more",)), "test has other classes than"),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(folder, spoil, message):
    spoil(folder)
    with pytest.raises(DataError, match=message):
        find_parts(folder)


def test_hidden_files_and_folders_are_nobodys(folder):
    before = find_parts(folder)
    shutil.copytree(folder / "train" / CLASSES[0], folder / "train" / ".ipynb_checkpoints")
    (folder / "train" / CLASSES[0] / ".thumbs").mkdir()
    (folder / "train" / CLASSES[0] / "._000.png").write_bytes(b"of a file system")
    after = find_parts(folder)
    assert after.training.classes == CLASSES
    assert after.digest == before.digest


def test_what_may_not_be_looked_at_within_a_class_is_nobodys(folder, monkeypatch):
    before = find_parts(folder)
    (folder / "train/dark/originals").mkdir()
    is_dir = Path.is_dir

    def forbidden(path):
        if path.name == "originals":
            raise PermissionError
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", forbidden)
    assert find_parts(folder).digest == before.digest


def test_folders_within_classes_are_left_alone_which_is_said(folder, capsys):
    before = find_parts(folder)
    shutil.copytree(folder / "train/light", folder / "train/dark/day1")
    (folder / "train/light/day2").mkdir()
    assert find_parts(folder).digest == before.digest
    assert capsys.readouterr().err == (
        f"2 folders within classes are left alone, {folder}/train/dark/day1 first; "
        "images must be right in a class folder\n"
    )


@pytest.mark.parametrize(
    ("data", "out"),
    [
        *(("train", out) for out in ("train", "train/run", "train/run/first")),
        *((".", out) for out in ("train", "train/run", "test", "test/run/first")),
    ],
)
def test_a_run_cannot_be_where_it_would_make_a_class(folder, data, out):
    with pytest.raises(DataError, match="would be among the classes in"):
        check_apart(folder / data, folder / out)


@pytest.mark.parametrize("out", ["train/.runs/a", "train/dark/run", "run", "."])
def test_a_run_may_be_anywhere_else(folder, out):
    check_apart(folder / "train", folder / out)
    check_apart(folder, folder / out)


def test_a_file_may_have_a_name_that_is_no_utf_8_but_a_class_may_not(folder):
    image = next((folder / "train" / CLASSES[0]).iterdir())
    image.rename(os.fsdecode(os.fsencode(image.parent) + b"/caf\xe9.png"))
    assert len(find_parts(folder).training) > 0
    (folder / "train" / CLASSES[0]).rename(os.fsdecode(os.fsencode(folder) + b"/train/caf\xe9"))
    with pytest.raises(DataError, match=r"caf\\xe9' has a name that is not UTF-8; rename it"):
        find_parts(folder)


def test_a_single_class_is_said_before_it_is_read(folder):
    for part in ("train", "test"):
        for name in CLASSES[1:]:
            shutil.rmtree(folder / part / name)
    with pytest.raises(DataError, match=f"has one class only, {CLASSES[0]}; it takes several"):
        find_parts(folder)


def test_too_few_images_to_hold_any_out_is_said(tmp_path):
    write_images(tmp_path, n=3)
    with pytest.raises(DataError, match="too few images a class"):
        find_parts(tmp_path)


def test_a_missing_folder_is_said(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        find_parts(tmp_path / "nowhere")


def test_images_of_any_size_and_mode_become_squares(tmp_path):
    (tmp_path / "a").mkdir()
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (40, 20, 4), np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a/rgba.png")
    Image.fromarray(rgba[..., 0]).save(tmp_path / "a/grey.png")
    Image.fromarray(rgba[..., :3]).convert("P").save(tmp_path / "a/palette.gif")
    Image.fromarray(rgba[..., 0].astype(np.uint16) * 256).save(tmp_path / "a/deep.png")
    Image.fromarray(rgba[..., :3]).convert("CMYK").save(tmp_path / "a/print.jpg")
    images = load(list_folder(tmp_path), PLAIN)
    assert images.pixels.shape == (5, 16, 16, 3) and not images.unreadable


@pytest.mark.parametrize("storage", [Storage.MEMORY, Storage.DISK])
def test_an_unreadable_file_is_named_skipped_and_counted(folder, storage):
    files = find_parts(folder).training.files
    files[0].write_bytes(b"not an image")
    files[5].write_bytes(files[5].read_bytes()[:60])
    opened = open_folder(find_parts(folder), 16, 1.0, tiny_recipe(), CPU, storage)
    everything = torch.arange(len(opened.training)).split(8)
    for _ in range(2):
        assert sum(len(ids) for _, ids in opened.training.batches(everything)) == 31
    assert len(opened.unreadable) == 2
    assert all(str(files[i]) in " ".join(opened.unreadable) for i in (0, 5))


@pytest.mark.parametrize("storage", [Storage.MEMORY, Storage.DISK])
def test_a_class_that_cannot_be_read_at_all_is_an_error(folder, storage):
    for file in (folder / "train/light").iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(DataError, match="no training image of class light"):
        open_folder(find_parts(folder), 16, 1.0, tiny_recipe(), CPU, storage)


def half_broken(folder):
    """A stream of 36 files, of which only those of the class middle can be read."""
    listing = list_folder(folder / "train")
    for file in listing.files[:24]:
        file.write_bytes(b"broken")
    return Stream(listing, PLAIN)


def test_a_batch_of_nothing_readable_is_left_out_of_what_is_measured(folder):
    stream = half_broken(folder)
    read = [ids.tolist() for _, ids in stream.batches(torch.arange(36).split(12))]
    assert read == [[2] * 12] and len(stream.unreadable) == 24
    assert evaluate(tiny_net(), stream, PLAIN, CPU).images == 12


def test_a_batch_of_nothing_readable_cannot_be_trained_on(folder):
    batches = half_broken(folder).batches(torch.arange(36).split(12), draw=0)
    with pytest.raises(DataError, match=r"no image of a batch could be read; .*000\.png"):
        next(batches)


def test_nothing_readable_at_all_has_no_accuracy(folder):
    nothing = Stream(half_broken(folder).listing.pick(range(24)), PLAIN)
    with pytest.raises(DataError, match="none of 24 images could be read"):
        evaluate(tiny_net(), nothing, PLAIN, CPU)


def test_reading_into_memory_takes_little_more_than_the_images(tmp_path):
    listing = list_folder(write_images(tmp_path, side=200))
    tracemalloc.start()
    try:
        images = load(listing, Preprocess(size=200, mean=(0.5,) * 3, std=(0.25,) * 3))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert images.pixels.numel() <= peak < 1.6 * images.pixels.numel()


def test_reading_stops_at_once_where_it_is_interrupted(folder):
    class Interrupting:
        size = 16
        asked = 0

        def pixels(self, image):
            self.asked += 1
            raise KeyboardInterrupt

    preprocess = Interrupting()
    listing = list_folder(folder / "train")
    with pytest.raises(KeyboardInterrupt):
        load(listing.pick(list(range(36)) * 20), preprocess)
    assert preprocess.asked < 360


@pytest.mark.parametrize("storage", [Storage.MEMORY, Storage.DISK])
def test_images_are_cropped_outside_training_alone(folder, storage):
    opened = open_folder(find_parts(folder), 16, 0.5, tiny_recipe(), CPU, storage)
    every = [torch.arange(3)]
    parts = find_parts(folder)
    for images, listing, crop in (
        (opened.training, parts.training, 1.0),
        (opened.validation, parts.held_out, 0.5),
        (opened.test, parts.test, 0.5),
    ):
        expected = load(listing, PLAIN.model_copy(update={"crop": crop})).pixels[:3]
        assert torch.equal(next(images.batches(every))[0], expected)
    assert opened.preprocess.crop == 0.5


def test_images_stream_in_all_processes_where_one_has_no_room(folder):
    class Pair(Processes):
        def any(self, flag):
            return True

    opened = open_folder(find_parts(folder), 16, 1.0, tiny_recipe(), Pair(torch.device("cpu")))
    assert isinstance(opened.training, Stream) and isinstance(opened.validation, Stream)


@pytest.mark.parametrize("storage", [Storage.MEMORY, Storage.DISK])
def test_processes_that_have_other_images_to_train_on_do_not_begin(folder, storage):
    class Pair(Processes):
        """This one beside one that came before."""

        def gather(self, lines):
            told.extend(lines)
            return super().gather(told)

    told, pair = [], Pair(torch.device("cpu"))
    for _ in range(2):
        open_folder(find_parts(folder), 16, 1.0, tiny_recipe(), pair, storage)
    file = find_parts(folder).training.files[0]
    if storage is Storage.MEMORY:
        file.write_bytes(b"broken")
    else:
        file.unlink()
    with pytest.raises(DataError, match="the same training images"):
        open_folder(find_parts(folder), 16, 1.0, tiny_recipe(), pair, storage)


def test_a_batch_to_train_on_stays_whole_where_files_cannot_be_read(folder):
    """Else a process that lacks images would take fewer parts of a step than the others."""
    stream = half_broken(folder)
    read = [ids.tolist() for _, ids in stream.batches([torch.arange(20, 30)], draw=0)]
    assert read == [[2] * 10]
    with pytest.raises(DataError, match="no image of a batch"):
        list(stream.batches([torch.arange(10)], draw=0))


def test_a_class_is_looked_for_among_its_own_files_alone(folder):
    listing = list_folder(folder / "train")
    for file in (folder / "train/light").iterdir():
        file.write_bytes(b"broken")
    stream = Stream(listing, PLAIN)
    assert list(stream.readable_classes()) == [True, False, True]
    assert len(stream.unreadable) == 12


def test_images_asked_into_memory_are_counted_for_every_process(folder):
    many = Processes(torch.device("cpu"), count=10**10)
    with pytest.raises(DataError, match="--storage disk"):
        open_folder(find_parts(folder), 16, 1.0, tiny_recipe(), many, Storage.MEMORY)


def test_a_stream_reads_what_memory_holds(folder):
    listing = list_folder(folder / "train")
    stored, streamed = load(listing, PLAIN), Stream(listing, PLAIN)
    batches = torch.arange(36).split(10)
    pairs = zip(stored.batches(batches), streamed.batches(batches), strict=True)
    for (pixels, ids), (others, other_ids) in pairs:
        assert torch.equal(pixels, others) and torch.equal(ids, other_ids)


@pytest.mark.slow
def test_workers_leave_signals_to_the_run(folder):
    stream = Stream(list_folder(folder / "train"), PLAIN, workers=2)
    batches = stream.batches(torch.arange(36).split(2))
    read = len(next(batches)[1])
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for name in ("-TERM", "-INT"):  # as torchrun does, and a terminal
        subprocess.run(["kill", name, *(str(worker.pid) for worker in workers)], check=True)
    assert read + sum(len(ids) for _, ids in batches) == 36


@pytest.mark.slow
@pytest.mark.parametrize("leave", ["terminate", "kill the run"])
def test_workers_end_though_a_file_keeps_them_waiting(folder, leave):
    """A pipe that nobody writes to stands in for storage that does not answer."""
    run = multiprocessing.get_context("fork").Process(target=_stream_a_pipe, args=(folder,))
    run.start()
    until(lambda: len(_children(run.pid)) == 2, seconds=60)
    workers = _children(run.pid)
    if leave == "terminate":
        os.kill(run.pid, signal.SIGINT)  # it ends its workers as it leaves
    else:
        os.kill(run.pid, signal.SIGKILL)
    run.join(30)
    assert run.exitcode is not None
    until(lambda: not any(_is_running(w) for w in workers), seconds=60)


def _stream_a_pipe(folder):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    listing = list_folder(folder / "train")
    for file in listing.files:
        file.unlink()
        os.mkfifo(file)
    list(Stream(listing, PLAIN, workers=2).batches(torch.arange(36).split(2)))


def _children(process):
    return [int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def _is_running(process):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


@pytest.mark.slow
def test_workers_read_what_one_process_reads(folder):
    listing = list_folder(folder / "train")
    batches = torch.arange(36).split(10)
    alone, together = (
        [p for p, _ in Stream(listing, PLAIN, n, crop_area=0.3).batches(batches, draw=4)]
        for n in (0, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_random_crops_differ_by_epoch_and_repeat_by_seed(folder):
    stream = Stream(list_folder(folder / "train"), PLAIN, crop_area=0.2)

    def read(draw):
        return next(stream.batches([torch.arange(4)], draw))[0]

    assert torch.equal(read(1), read(1))
    assert not torch.equal(read(1), read(2))


def test_a_random_box_lies_within_its_image_and_keeps_its_share():
    for seed in range(50):
        box = random_box((50, 20), 0.3, generator_of(torch.device("cpu"), seed))
        left, top, right, bottom = box
        assert 0 <= left < right <= 50 and 0 <= top < bottom <= 20
        assert (right - left) * (bottom - top) <= 1000


def test_random_crops_of_images_in_memory_are_refused(folder):
    with pytest.raises(ValueError, match="--storage disk"):
        open_folder(find_parts(folder), 16, 1.0, tiny_recipe(crop_area=0.5), CPU, Storage.MEMORY)


@pytest.mark.parametrize(("side", "size"), [(16, 32), (64, 32), (100, 224)])
def test_the_input_size_suits_the_images(tmp_path, side, size):
    assert natural_size(list_folder(write_images(tmp_path, n=2, side=side))) == size


def test_normalisation_is_measured_from_the_images(folder):
    images = load(list_folder(folder / "train"), PLAIN)
    mean, std = measure(images)
    x = images.pixels.double() / 255
    torch.testing.assert_close(torch.tensor(mean).double(), x.mean((0, 1, 2)), atol=1e-3, rtol=0)
    expected = x.flatten(0, 2).std(0, correction=0)
    torch.testing.assert_close(torch.tensor(std).double(), expected, atol=1e-3, rtol=0)


def test_cifar_has_its_customary_normalisation(folder):
    class Named:
        def __init__(self, classes):
            self.classes = classes

    hundred = ("aquarium_fish", "sweet_pepper", *(f"c{i}" for i in range(98)))
    assert normalisation(Named(hundred), 32) == CIFAR100
    assert normalisation(Named(tuple(CIFAR10_CLASSES.split())), 32) == CIFAR10


def test_balanced_classes_count_the_same_together(folder):
    for file in list((folder / "train/dark").iterdir())[:6]:
        file.unlink()
    opened = open_folder(find_parts(folder), 16, 1.0, tiny_recipe(), CPU, Storage.MEMORY)
    weights = opened.class_weights("balanced", CPU.device)
    counts = torch.bincount(opened.training.class_ids)
    torch.testing.assert_close(weights * counts, torch.full((3,), counts.sum() / 3.0))
    assert opened.class_weights("none", CPU.device) is None
    assert opened.training.classes == CLASSES


def test_images_that_do_not_fit_are_refused_with_what_to_do():
    with pytest.raises(DataError, match=r"take 10 GB decoded, and 5 GB .*--storage disk"):
        room.check_memory(int(10.1e9), int(5e9), "add --storage disk")
    room.check_memory(int(1e9), int(5e9), "")
    room.check_memory(int(1e9), None, "")


def test_images_stream_by_themselves_from_half_of_memory_on():
    assert room.fits_in_memory(int(2e9), int(5e9))
    assert not room.fits_in_memory(int(3e9), int(5e9))


def test_a_full_disk_is_said_before_the_first_epoch(tmp_path):
    net = torch.nn.Linear(1000, 1000)
    with pytest.raises(DataError, match=r"take 0\.0\d+ GB, and .* has 0\.001 GB free"):
        room.check_disk(tmp_path, net, averaged=True, free=1_000_000)
    room.check_disk(tmp_path, net, averaged=True, free=100_000_000)
    with (tmp_path / CHECKPOINT).open("wb") as kept:
        kept.truncate(100_000_000)  # of a run that goes on, which needs room for one more
    room.check_disk(tmp_path, net, averaged=True, free=1_000_000)


def group(root, folder, **files):
    """A control group, `root` being that of the file system."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / folder / name.replace("__", ".")).write_text(text)


def test_files_that_a_container_has_read_are_no_memory_in_use(tmp_path):
    assert room._of_groups(tmp_path) is None
    group(tmp_path, "proc/self", cgroup="0::/\n")
    stat = "anon 300\nactive_file 100\ninactive_file 500\n"
    files = {"memory__max": "1000\n", "memory__current": "900\n", "memory__stat": stat}
    group(tmp_path, "sys/fs/cgroup", **files)
    assert room._of_groups(tmp_path) == 600
    group(tmp_path, "sys/fs/cgroup", memory__max="max\n")
    assert room._of_groups(tmp_path) is None


def test_the_least_that_any_group_of_a_batch_job_leaves_counts(tmp_path):
    group(tmp_path, "proc/self", cgroup="0::/system.slice/job_7/step_0\n")
    stat = {"memory__stat": "inactive_file 0\n"}
    job = "sys/fs/cgroup/system.slice/job_7"
    group(tmp_path, job, memory__max="1000\n", memory__current="300\n", **stat)
    group(tmp_path, f"{job}/step_0", memory__max="max\n", memory__current="300\n", **stat)
    assert room._of_groups(tmp_path) == 700


def test_groups_of_the_first_version_have_limits_too(tmp_path):
    group(tmp_path, "proc/self", cgroup="5:memory:/slurm/job_7\n4:cpu,cpuacct:/\n")
    group(
        tmp_path,
        "sys/fs/cgroup/memory/slurm/job_7",
        memory__limit_in_bytes="1000\n",
        memory__usage_in_bytes="800\n",
        memory__stat="inactive_file 1\ntotal_inactive_file 100\n",
    )
    assert room._of_groups(tmp_path) == 300


def test_memory_that_is_free_is_known_here():
    assert room.available_memory() > 50_000_000


def test_seeds_differ_by_purpose_and_repeat():
    assert seed_of(0, "a", 1) == seed_of(0, "a", 1)
    assert len({seed_of(s, p, i) for s in (0, 1) for p in "ab" for i in range(9)}) == 36
