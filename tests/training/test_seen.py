"""No image that a bundle has seen calibrates or tests it, whatever became of its folder."""

import shutil

import numpy as np
import pytest

from model.bundle import REPORT, load_bundle
from tests.conftest import ROOT
from tests.training.bundles import write_noisy_images
from tests.training.conftest import CPU, write_images
from training.__main__ import main
from training.calibrate import calibration_listing
from training.data import DataError, list_folder
from training.distributed import Processes
from training.evaluate import test_listing as listing_to_test
from training.parts import find_parts
from training.seen import (
    CALIBRATED,
    FITTED,
    TRAINED,
    Seen,
    digests_of,
    hand_on,
    load_digests,
    save_calibrated,
    save_digests,
    save_trained,
    seen_by,
    shared_digests,
)

TINY = ["--architecture", "resnet10", "--width", "8", "--size", "16", "--batch-size", "16"]


@pytest.fixture
def single(tmp_path):
    """A single folder that is cut in three."""
    return write_images(tmp_path / "data", n=30)


@pytest.fixture
def seen(single, tmp_path):
    """What a bundle remembers that was trained on its part of that folder."""
    parts = find_parts(single)
    return Seen(tmp_path, parts.digest, sorted_digests(parts.training), None, None)


def sorted_digests(listing):
    return np.unique(digests_of(listing.files))


def contents(listing):
    return {f.read_bytes() for f in listing.files}


def add(folder):
    write_images(folder / "more", n=1)
    (folder / "more/dark/000.png").rename(folder / "dark/new.png")
    shutil.rmtree(folder / "more")


def delete(folder):
    find_parts(folder).training.files[0].unlink()


def rename(folder):
    file = find_parts(folder).training.files[0]
    file.rename(file.with_name("renamed.png"))


def rename_all(folder):
    for file in list_folder(folder).files:
        file.rename(file.with_name(f"other-{file.name}"))


@pytest.mark.parametrize("change", [lambda folder: None, add, delete, rename, rename_all])
def test_a_changed_folder_gives_no_image_that_was_trained_on(single, seen, change):
    trained = contents(find_parts(single).training)
    change(single)
    chosen, tested = calibration_listing(single, seen), listing_to_test(single, seen)
    assert not contents(chosen) & trained
    assert not contents(tested) & trained
    assert not contents(chosen) & contents(tested)


def test_a_folder_with_one_file_more_gives_about_what_it_gave(single, seen):
    before = len(calibration_listing(single, seen)), len(listing_to_test(single, seen))
    add(single)
    after = len(calibration_listing(single, seen)), len(listing_to_test(single, seen))
    assert before == (9, 9)
    assert min(after) >= 8


def test_a_train_part_that_changed_gives_no_image_that_was_trained_on(single, seen, tmp_path):
    trained = contents(find_parts(single).training)
    rename_all(single)
    (tmp_path / "parts").mkdir()
    single.rename(tmp_path / "parts/train")
    assert not contents(calibration_listing(tmp_path / "parts", seen)) & trained


def test_images_without_labels_that_were_trained_on_are_left_out(single, seen, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, file in enumerate(list_folder(single).files):
        shutil.copy(file, flat / f"{i}.png")
    assert len(calibration_listing(flat, seen)) == 90 - len(find_parts(single).training)


def test_how_many_are_left_out_is_said(single, seen, capsys):
    (single / "light/copy.png").write_bytes(find_parts(single).training.files[0].read_bytes())
    listing = seen.left_by_training(list_folder(single), known=True)
    assert len(listing) == 18
    assert "left out 73 of 91 images, which" in capsys.readouterr().out


def test_images_of_the_same_names_are_other_images(seen, tmp_path, capsys):
    other = write_noisy_images(tmp_path / "other", 20, ("dark", "light", "middle"))
    assert len(calibration_listing(other, seen)) == 60
    assert "none of these images is known from the training of" in capsys.readouterr().out


def test_another_folder_may_hold_a_few_of_the_same_images(single, seen, tmp_path):
    other = write_noisy_images(tmp_path / "other", 20, ("dark", "light", "middle"))
    for i, file in enumerate(find_parts(single).training.files[:5]):
        shutil.copy(file, other / f"dark/{i}-again.png")
    assert len(calibration_listing(other, seen)) == len(listing_to_test(other, seen)) == 60


def test_a_bundle_that_says_nothing_is_warned_of(single, tmp_path, capsys):
    silent = Seen(tmp_path, None, None, None, None)
    assert len(calibration_listing(single, silent)) == 90
    assert "does not say which images it was trained on" in capsys.readouterr().out


def test_of_the_folder_that_was_trained_on_it_is_said_that_a_part_is_taken(single, seen, capsys):
    calibration_listing(single, seen)
    listing_to_test(single, seen)
    assert capsys.readouterr().out.splitlines() == [
        f"of 90 images in {single} took the 9 that training holds out",
        f"of 90 images in {single} took the 9 kept to be tested on",
    ]


def test_of_the_folder_that_is_tested_on_it_is_said_once_what_is_left_alone(single, seen, capsys):
    (single / "dark/day1").mkdir()
    listing_to_test(single, seen)
    assert capsys.readouterr().err.count("folders within classes are left alone") == 1


def test_a_folder_with_fresh_images_among_those_trained_on_gives_all_but_its_test_part(
    single, seen, tmp_path, capsys
):
    other = write_noisy_images(tmp_path / "other", 100, ("dark", "light", "middle"))
    trained = find_parts(single).training
    for file in trained.files:
        shutil.copy(file, other / file.parent.name / f"again-{file.name}")
    chosen = calibration_listing(other, seen)
    said = capsys.readouterr().out
    assert "of 372 images in" in said and "that are not kept to be tested on" in said
    assert "which" in said and "was trained on" in said
    tested = listing_to_test(other, seen)
    assert "kept to be tested on" in capsys.readouterr().out
    fresh = {f for f in list_folder(other).files if not f.name.startswith("again-")}
    assert {*chosen.files} | {*tested.files} == fresh
    assert not {*chosen.files} & {*tested.files}
    assert len(chosen) > 0.9 * len(fresh)


def test_a_folder_too_small_for_a_test_part_gives_all_fresh_images(single, seen, tmp_path):
    other = write_noisy_images(tmp_path / "other", 4, ("dark", "light", "middle"))
    for name in ("dark", "light"):
        file = next(f for f in find_parts(single).training.files if f.parent.name == name)
        shutil.copy(file, other / name / "again.png")
    assert len(calibration_listing(other, seen)) == 12
    with pytest.raises(DataError, match="too few images a class"):
        listing_to_test(other, seen)


def test_images_that_calibrated_are_not_tested_on(single, seen, tmp_path):
    other = write_noisy_images(tmp_path / "other", 20, ("dark", "light", "middle"))
    calibrated = sorted_digests(list_folder(other))
    again = Seen(tmp_path, None, seen.trained, calibrated, None)
    with pytest.raises(DataError, match="was calibrated on all of these images; take others"):
        listing_to_test(other, again)
    (other / "dark/new.png").write_bytes((single / "dark/000.png").read_bytes())
    half = Seen(tmp_path, None, None, calibrated, None)
    assert [f.name for f in listing_to_test(other, half).files] == ["new.png"]


@pytest.mark.slow
def test_training_records_its_images_and_those_that_its_parents_saw(tmp_path, capsys):
    first, second = (write_images(tmp_path / n, n=k) for n, k in (("first", 12), ("second", 14)))
    for file in list_folder(first).files[:3]:
        file.unlink()
    words = ["--epochs", "1", *TINY]
    run = ["train", "--data", str(first), "--out", str(tmp_path / "a"), *words]
    assert main(run) == 0
    parent = tmp_path / "a/bundle"
    on_first = sorted_digests(find_parts(first).training)
    np.testing.assert_array_equal(load_digests(parent, TRAINED), on_first)
    run = ["train", "--data", str(second), "--out", str(tmp_path / "b"), *words]
    assert main([*run, "--teacher", str(parent)]) == 0
    both = np.union1d(on_first, sorted_digests(find_parts(second).training))
    np.testing.assert_array_equal(load_digests(tmp_path / "b/bundle", TRAINED), both)
    assert "does not say" not in capsys.readouterr().out


def test_processes_read_their_shares_of_the_files_alone(single):
    class Part(Processes):
        """One of two whose sum is taken below."""

        def sum(self, values):
            return values

    files = find_parts(single).training.files
    files[1].unlink()
    first, second = (shared_digests(files, Part(CPU.device, rank, 2)) for rank in (0, 1))
    assert not first[1::2].any() and not second[::2].any()
    assert second[1] == -1
    assert np.array_equal(first + second, digests_of(files))


def test_a_parent_that_says_nothing_is_told(single, tmp_path):
    (told,) = save_trained(
        tmp_path, digests_of(find_parts(single).training.files), [tmp_path / "parent"]
    )
    assert told.endswith("does not say which images it was trained on; they are not known again")
    assert len(load_digests(tmp_path, TRAINED)) == len(find_parts(single).training)


def test_a_file_that_is_gone_is_told_and_not_recorded(single, tmp_path):
    files = find_parts(single).training.files
    files[0].unlink()
    (told,) = save_trained(tmp_path, digests_of(files), [])
    assert told.startswith("1 of 72 training images cannot be read")
    assert len(load_digests(tmp_path, TRAINED)) == 71


def test_records_go_with_what_is_made_of_a_bundle(tmp_path):
    save_digests(tmp_path / "a", TRAINED, np.array([3, 1, 3]))
    save_digests(tmp_path / "b", CALIBRATED, np.array([2]))
    hand_on(tmp_path / "a", tmp_path / "b")
    assert load_digests(tmp_path / "b", TRAINED).tolist() == [1, 3]
    assert load_digests(tmp_path / "b", CALIBRATED) is None


@pytest.mark.parametrize("content", [b"", b"not an array", b"\x93NUMPY\x01\x00", b"PK\x03\x04"])
def test_a_damaged_record_is_said(tmp_path, content):
    (tmp_path / REPORT).mkdir()
    (tmp_path / REPORT / TRAINED).write_bytes(content)
    with pytest.raises(DataError, match="is damaged"):
        load_digests(tmp_path, TRAINED)


def test_a_backbone_in_a_file_has_no_record(tmp_path):
    (tmp_path / "backbone.pt").write_bytes(b"weights")
    assert load_digests(tmp_path / "backbone.pt", TRAINED) is None


def test_a_folder_that_little_of_was_trained_on_is_known_by_what_was(tmp_path):
    listing = list_folder(write_noisy_images(tmp_path / "data", 30))
    few = sorted_digests(listing.pick([0, 31, 62]))
    assert Seen(tmp_path, None, few, None, None).knows(listing)
    others = np.arange(10, dtype=np.uint32)
    assert not Seen(tmp_path, None, np.concatenate([few, others]), None, None).knows(listing)


def test_what_confidences_come_from_outlives_a_calibration_without_labels(tmp_path):
    listing = list_folder(write_noisy_images(tmp_path / "data", 4))
    labelled, bare = listing.pick([0, 5]), listing.pick([2, 3, 6])
    path = tmp_path / "bundle"

    def seen():
        records = (load_digests(path, name) for name in (TRAINED, CALIBRATED, FITTED))
        return Seen(path, None, *records)

    def but(*indices):
        return listing.pick([i for i in range(len(listing)) if i not in indices]).files

    save_calibrated(seen(), digests_of(labelled.files), labelled=True)
    assert seen().left_by_confidences(listing).files == but(0, 5)
    for _ in range(2):
        save_calibrated(seen(), digests_of(bare.files), labelled=False)
        assert seen().left_by_confidences(bare).files == bare.files
        assert seen().left_by_calibration(listing).files == but(0, 5, 2, 3, 6)
    save_calibrated(seen(), digests_of(bare.files), labelled=True)
    assert seen().left_by_confidences(listing).files == but(2, 3, 6)


def test_no_image_at_all_is_not_all_of_them(tmp_path):
    listing = list_folder(write_noisy_images(tmp_path / "data", 1)).pick([])
    seen = Seen(tmp_path, None, np.arange(3, dtype=np.uint32), None, None)
    assert len(seen.left_by_training(listing, known=True)) == 0
    assert not seen.knows(listing)


def test_an_array_of_something_else_is_no_record(tmp_path):
    (tmp_path / REPORT).mkdir()
    np.save(tmp_path / REPORT / TRAINED, np.zeros((2, 2)))
    with pytest.raises(DataError, match="holds no digests of files"):
        load_digests(tmp_path, TRAINED)


def test_the_bundle_that_is_served_says_what_it_has_seen():
    bundle = load_bundle(ROOT / "model/default")
    seen, trained = seen_by(bundle), bundle.description.training["training_images"]
    assert 0.999 * trained < len(seen.trained) <= trained  # CIFAR-100 has some images twice
    assert bundle.policy.calibration_images == len(seen.calibrated)
    assert np.isin(seen.calibrated, seen.trained).sum() <= 3
