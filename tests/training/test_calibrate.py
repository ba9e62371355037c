"""From a trained bundle and a folder of images to a policy, or to one clear sentence."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from model.bundle import load_bundle, load_servable, save_bundle, save_description
from model.numerics import likely_dtypes, name_of
from model.policy import NEVER, Calibration, Measure
from tests.training.bundles import CLASSES, PREPROCESS, write_bundle, write_noisy_images
from tests.training.worlds import judged, world
from training import data as folders
from training.__main__ import main
from training.calibrate import labels_of, load_images
from training.calibration import (
    MOST_SEARCHED,
    Options,
    budget_point,
    calibrate,
    search_part,
)
from training.data import DataError, list_folder
from training.eight_bits import find_ranges, price
from training.fit import fit_calibrations
from training.ladder import LOSSES, Certifier, Method
from training.logits import batch_size, cached_logits, compute_logits
from training.outcomes import outcomes_of
from training.reliability import calibration_error, exit_errors
from training.resample import _shows_more
from training.risk import paired_p_value
from training.search import PRICES
from training.seen import TRAINED, digests_of, save_digests
from training.timing import stage_seconds


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("trained") / "bundle")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_noisy_images(tmp_path_factory.mktemp("images"), 160)


@pytest.fixture
def bundle(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "bundle")


@pytest.fixture
def command(bundle, images, capsys, monkeypatch):
    """Runs `calibrate` on the bundle, with a coarse search; its exit status and what it said."""
    monkeypatch.setattr("training.search.PRICES", PRICES[::6])

    def run(*options, data=images, command="calibrate"):
        status = main([command, str(bundle), "--data", str(data), *map(str, options)])
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


def test_calibrating_makes_a_bundle_servable_and_says_what_it_did(command, bundle):
    status, said = command()
    assert status == 0
    policy = load_servable(bundle).policy
    assert [p.max_accuracy_loss for p in policy.operating_points] == list(LOSSES)
    assert (policy.calibration_images, policy.delta) == (480, 0.1)
    assert "it/s" not in said  # bars are for terminals
    assert policy.dtypes == tuple(map(name_of, likely_dtypes("cpu")))
    assert "480 images: thresholds chosen on 120, certified on 360" in said
    assert (
        "a loss of 0.10% cannot be certified, so the full network runs: it takes at least" in said
    )
    assert "bounds hold with probability 90% over calibration sets" in said
    assert said.count("calibration error") == 4


def with_copies(images, folder, share=1.0):
    """The same folder with copies of each class's first images, some of them in another class."""
    shutil.copytree(images, folder)
    listing = list_folder(images)
    for name, others in zip(CLASSES, (*CLASSES[1:], CLASSES[0]), strict=True):
        files = [f for f in listing.files if f.parent.name == name]
        for i, file in enumerate(files[: round(share * len(files))]):
            with Image.open(file) as image:  # other bytes for the same pixels
                image.save(folder / (others if i % 2 else name) / f"{name}-again-{i}.png")
    return folder


def test_copies_of_images_do_not_count_as_images(command, bundle, images, tmp_path):
    """Beside their originals they would certify what they had chosen, and count for two."""
    copied = with_copies(images, tmp_path / "copied")
    status, said = command("--dtype", "float32", data=copied)
    assert status == 0
    assert "left out 480 of 960 images, which have the same pixels as others" in said
    assert load_bundle(bundle).policy.calibration_images == 480
    status, said = command(command="evaluate", data=copied)
    assert (status, "was calibrated on all of these images" in said) == (2, True)


@pytest.mark.parametrize("name", ["resample", "evaluate"])
def test_copies_of_images_are_measured_once(command, images, tmp_path, name):
    if name == "evaluate":
        command("--dtype", "float32")
    fresh = write_noisy_images(tmp_path / "fresh", 80, seed=5)
    copied = with_copies(fresh, tmp_path / "copied", 0.5)
    options = ["--splits", "1"] if name == "resample" else []
    status, said = command(*options, command=name, data=copied)
    assert status == 0
    assert "left out 120 of 360 images, which have the same pixels as others" in said


@pytest.mark.slow
def test_a_small_chance_of_failing_is_not_rounded_away(command):
    assert "bounds hold with probability 99.9% over" in command("--delta", 0.001)[1]


def test_an_expectation_is_said_to_hold_on_average(command):
    said = command("--method", "expectation", "--delta", 0.001)[1]
    assert "bounds hold on average over calibration sets" in said
    assert "unless" not in said, "gains do not count here"
    assert "a loss of 0.10% cannot be kept on average" in said
    assert "certified" not in said and "probability" not in said and "delta" not in said


@pytest.mark.slow
def test_the_same_command_makes_the_same_policy_from_cached_logits(command, bundle, monkeypatch):
    command()
    first = (bundle / "policy.json").read_bytes()
    monkeypatch.setattr("training.logits.compute_logits", None)
    assert command()[0] == 0
    assert (bundle / "policy.json").read_bytes() == first


@pytest.mark.slow
def test_logits_are_computed_again_for_other_numerics(command, bundle):
    command("--dtype", "float32")
    command("--dtype", "bfloat16", "float32")
    assert len(list((bundle.parent / ".cache").iterdir())) == 2
    assert load_bundle(bundle).policy.dtypes == ("bfloat16", "float32")


@pytest.mark.slow
def test_logits_do_not_depend_on_the_numerics_computed_before(bundle, images):
    loaded = load_bundle(bundle)
    pixels = load_images(loaded, list_folder(images))
    expected = compute_logits(loaded, pixels, torch.float32)
    compute_logits(loaded, pixels, torch.bfloat16)
    stage_seconds(loaded, torch.bfloat16)
    torch.testing.assert_close(compute_logits(loaded, pixels, torch.float32), expected)


@pytest.mark.slow
def test_int8_is_certified_with_what_it_costs_by_itself(command, bundle, tmp_path):
    status, said = command("--dtype", "auto", "int8")
    assert status == 0
    assert "in float32 and" in said and "and int8" in said
    policy = load_bundle(bundle).policy
    cost = policy.quantisation
    assert policy.dtypes[-1] == "int8"
    assert len(cost.ranges) == 4 and all(cost.ranges)
    assert -0.05 < cost.measured_accuracy_loss < cost.accuracy_loss_bound < 0.1
    assert (
        f"int8 loses {cost.measured_accuracy_loss:.2%} at full depth against float32, at most "
        f"{cost.accuracy_loss_bound:.2%}" in said
    )
    fresh = write_noisy_images(tmp_path / "fresh", 20, seed=1)
    assert command("--dtype", "int8", command="evaluate", data=fresh)[0] == 0


def test_the_images_that_certify_int8_have_no_part_in_its_ranges(bundle, images):
    loaded = load_images(load_bundle(bundle), list_folder(images))
    chosen = search_part(len(loaded), Options())
    ranges = find_ranges(load_bundle(bundle), loaded, chosen)
    others = np.setdiff1d(np.arange(len(loaded)), chosen)
    loaded.pixels[torch.from_numpy(others)] = 0
    assert find_ranges(load_bundle(bundle), loaded, chosen) == ranges


def test_the_ranges_of_int8_are_seen_on_all_classes(bundle):
    """Listed by class, the first few hundred images may be of one class alone."""
    loaded = load_bundle(bundle)
    pixels = torch.full((2000, 16, 16, 3), 20, dtype=torch.uint8)
    pixels[1000:] = 250
    images = SimpleNamespace(pixels=pixels)
    stages = find_ranges(loaded, images, np.arange(2000))
    low, high = next(iter(stages[0].values()))
    seen = loaded.description.preprocess.normalise(pixels[[0, -1]])
    assert (low, high) == pytest.approx((float(seen.min()), float(seen.max())))


@pytest.mark.parametrize("labelled", [True, False])
def test_the_cost_of_int8_is_counted_by_changed_answers(labelled):
    """Of 400 images 10 are answered wrong only in int8, and 4 only in float32."""
    calibrations = (Calibration(temperature=1.0),) * 4
    policy = SimpleNamespace(calibrations=calibrations, measure=Measure.MARGIN, delta=0.1)
    right, wrong = torch.tensor([8.0, 0.0, 0.0]), torch.tensor([0.0, 8.0, 0.0])
    exact, rounded = right.repeat(400, 4, 1), right.repeat(400, 4, 1)
    rounded[:10], exact[10:14] = wrong, wrong
    class_ids = torch.zeros(400, dtype=torch.int64) if labelled else None
    cost = price((), exact, rounded, class_ids, policy)
    losses, gains = (10, 4) if labelled else (14, 0)
    assert cost.measured_accuracy_loss == pytest.approx((losses - gains) / 400)
    assert paired_p_value(losses, gains, 400, cost.accuracy_loss_bound) <= policy.delta
    assert paired_p_value(losses, gains, 400, cost.accuracy_loss_bound - 0.001) > policy.delta


@pytest.mark.slow
@pytest.mark.parametrize("method", Method)
def test_every_method_names_itself_in_the_policy(command, bundle, method):
    assert command("--method", method)[0] == 0
    policy = load_bundle(bundle).policy
    assert policy.method == method
    early = [p for p in policy.operating_points if p.mean_macs < 1]
    assert early
    assert {p.certified for p in early} == {method is not Method.EXPECTATION}


def test_measured_costs_can_replace_macs(command, bundle, monkeypatch):
    measured = []

    def seconds(*arguments):
        measured.append(arguments)
        return np.array([1.0, 2.0, 3.0, 4.0])

    monkeypatch.setattr("training.calibrate.stage_seconds", seconds)
    assert command("--cost", "measured")[0] == 0
    assert measured


@pytest.mark.slow
def test_a_budget_adds_the_most_careful_point_that_keeps_it(command, bundle):
    assert command("--mean-macs", 0.7)[0] == 0
    points = load_bundle(bundle).policy.operating_points
    added = [p for p in points if p.max_accuracy_loss not in LOSSES]
    assert len(added) == 1
    assert added[0].budget == 0.7
    assert added[0].mean_macs == pytest.approx(0.7, abs=0.08)
    assert added[0].certified


@pytest.mark.slow
def test_budgets_above_half_give_different_points(command, bundle):
    costs = []
    for budget in (0.95, 0.9, 0.8):
        assert command("--mean-macs", budget)[0] == 0
        points = load_bundle(bundle).policy.operating_points
        costs += [p.mean_macs for p in points if p.max_accuracy_loss not in LOSSES]
    assert costs == pytest.approx([0.95, 0.9, 0.8], abs=0.06)


def test_a_budget_never_takes_the_place_of_a_row_of_the_ladder():
    """Its bound is by another test: a row by either would fail as often as both together."""
    images = judged(3000)
    macs = np.array([0.25, 0.5, 0.75, 1.0])
    certifiers = [Certifier(images, 0.1, Method.PAIRED)]
    alone = budget_point(certifiers, (0.9, 0.9, 0.9), images, macs)
    bound = alone.max_accuracy_loss
    beside = budget_point(certifiers, (0.9, 0.9, 0.9), images, macs, taken=[bound])
    assert bound < beside.max_accuracy_loss == pytest.approx(bound + 1e-4)
    assert beside.thresholds == alone.thresholds


@pytest.mark.slow
def test_what_is_measured_is_accuracy_whatever_is_certified(bundle):
    logits, class_ids = world(2000, seed=2, classes=3)
    loaded = load_bundle(bundle)
    options = Options(method=Method.DISAGREEMENT)
    policy = calibrate(loaded, logits, class_ids, options).policy
    outcomes = outcomes_of(logits, class_ids, policy.calibrations, policy.measure)
    point = policy.operating_points[-1]
    lost = outcomes.differences(outcomes.taken(point.thresholds)).mean()
    assert point.measured_accuracy_loss == pytest.approx(lost)


def test_a_budget_below_the_first_exit_is_out_of_reach(command):
    status, said = command("--mean-macs", 0.01)
    assert status == 2
    assert "mean MACs of 0.01 are out of reach" in said


@pytest.mark.slow
def test_images_without_labels_calibrate_disagreement_with_the_confidences_there_are(
    command, bundle, images, tmp_path
):
    command()
    before = load_bundle(bundle).policy
    same, fresh = (tmp_path / name for name in ("same", "fresh"))
    sources = {same: images, fresh: write_noisy_images(tmp_path / "more", 160, seed=7)}
    for flat, source in sources.items():
        flat.mkdir()
        for i, file in enumerate(source.rglob("*.png")):
            shutil.copy(file, flat / f"{i}.png")
    disagreement = ("--method", "disagreement")
    status, said = command(*disagreement, data=same)
    assert (status, "was calibrated on all of these images" in said) == (2, True)
    for _ in range(2):  # the confidences are still those of the images with labels
        status, said = command(*disagreement, data=fresh)
        assert status == 0
        assert "without labels: confidences are those of the policy there was (margin)" in said
    after = load_bundle(bundle).policy
    assert (after.method, after.calibrations) == ("disagreement", before.calibrations)
    status, said = command(*disagreement, data=same)
    assert (status, "was calibrated on all of these images" in said) == (2, True)
    status, said = command(data=fresh)
    assert status == 2
    assert "images without labels can only be calibrated with --method disagreement" in said
    status, said = command(
        *disagreement, "--measure", "entropy", "--no-ensemble", "--compare", data=fresh
    )
    assert status == 2
    assert "drop --measure entropy and --no-ensemble and --compare" in said
    (bundle / "policy.json").unlink()
    status, said = command(*disagreement, data=fresh)
    assert status == 2
    assert "calibrate it on labelled images once" in said


def test_a_folder_with_a_train_part_gives_its_held_out_images(command, bundle, images, tmp_path):
    shutil.copytree(images, tmp_path / "data/train")
    status, said = command(data=tmp_path / "data")
    assert status == 2
    assert "48 images are too few to calibrate on; take at least 100" in said


def test_other_classes_are_refused(command, tmp_path):
    other = write_noisy_images(tmp_path / "other", 2, ("bright", "dark", "purple"))
    status, said = command(data=other)
    assert status == 2
    assert "the data has 3 classes, the bundle 3, and they differ (in middle, purple)" in said


def test_classes_without_an_image_to_calibrate_on_are_named(images, capsys):
    listing = list_folder(images)
    assert len(labels_of(folders.load(listing.pick(range(4)), PREPROCESS))) == 4
    said = capsys.readouterr().err
    assert "2 of 3 classes have no image to calibrate on" in said
    assert ", ".join(listing.classes[1:]) in said
    labels_of(folders.load(listing, PREPROCESS))
    assert capsys.readouterr().err == ""


def test_images_that_memory_cannot_hold_are_refused_before_they_are_read(command, monkeypatch):
    monkeypatch.setattr("training.calibrate.available_memory", lambda: 1000)
    status, said = command()
    assert status == 2
    assert "decoded, and 1e-06 GB of memory is free; take fewer" in said


def test_large_images_run_in_smaller_batches(bundle):
    one = load_bundle(bundle)
    assert batch_size(one) == 250
    preprocess = one.description.preprocess.model_copy(update={"size": 512})
    large = one.description.model_copy(update={"preprocess": preprocess})
    assert batch_size(replace(one, description=large)) == 3


def test_one_class_is_refused(command, tmp_path):
    status, said = command(data=write_noisy_images(tmp_path / "one", 2, ("bright",)))
    assert status == 2
    assert "there is one class only, bright" in said


def test_a_bundle_without_weights_is_refused(command, bundle):
    (bundle / "weights.safetensors").unlink()
    status, said = command()
    assert status == 2
    assert "cannot read weights.safetensors" in said


def test_logits_that_are_not_numbers_are_refused(command, bundle):
    loaded = load_bundle(bundle)
    with torch.no_grad():
        loaded.net.head(2).fc.bias[0] = torch.nan
    description = loaded.description.model_dump(exclude={"exits", "weights_sha256"})
    save_bundle(bundle, loaded.net, **description | {"preprocess": loaded.description.preprocess})
    status, said = command()
    assert status == 2
    assert "logits are not finite on 480 of 480 images" in said
    assert not list(bundle.parent.glob(".cache/*"))


@pytest.mark.slow
def test_a_policy_for_other_weights_is_replaced_by_calibrating_and_refused_elsewhere(
    command, bundle
):
    command()
    policy = json.loads((bundle / "policy.json").read_text())
    (bundle / "policy.json").write_text(json.dumps(policy | {"weights_sha256": "other"}))
    status, said = command(command="evaluate")
    assert status == 2
    assert "policy.json was made for other weights; run: python -m training calibrate" in said
    assert command()[0] == 0
    assert load_servable(bundle)


def test_a_loss_is_beyond_chance_where_the_images_leave_no_doubt():
    differences = np.repeat([1, -1, 0], [60, 30, 910])  # 3 points lost
    assert not _shows_more(differences, 0.03, 0.1)
    assert not _shows_more(differences, 0.025, 0.1)
    assert _shows_more(differences, 0.01, 0.1)


@pytest.mark.parametrize("spoil", [lambda whole: whole[:-7], lambda whole: b""])
def test_damaged_logits_are_computed_again(bundle, images, tmp_path, spoil):
    loaded = load_bundle(bundle)
    pixels = load_images(loaded, list_folder(images).pick(range(10)))
    expected = cached_logits(loaded, pixels, torch.float32, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    file.write_bytes(spoil(whole))
    again = cached_logits(loaded, pixels, torch.float32, tmp_path / "cache")
    torch.testing.assert_close(again, expected)
    assert len(file.read_bytes()) == len(whole)


@pytest.mark.slow
def test_calibrating_again_forgets_what_was_measured_with_another_policy(command, bundle):
    described = load_bundle(bundle).description
    exits = tuple(e.model_copy(update={"accuracy": 0.9, "alone": 0.8}) for e in described.exits)
    save_description(bundle, described.model_copy(update={"exits": exits}))
    status, said = command("--dtype", "float32")
    assert status == 0
    after = load_bundle(bundle).description
    assert {(e.accuracy, e.alone) for e in after.exits} == {(None, 0.8)}
    assert f"run: python -m training evaluate {bundle} --data DIR" in said


@pytest.mark.slow
def test_the_images_that_calibrated_are_not_tested_on(command):
    command("--dtype", "float32")
    status, said = command(command="evaluate")
    assert status == 2
    assert "was calibrated on all of these images; take others" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["calibrate", "resample", "evaluate"])
def test_no_command_takes_images_that_were_trained_on(command, bundle, images, name):
    if name == "evaluate":
        command("--dtype", "float32")
    save_digests(bundle, TRAINED, digests_of(list_folder(images).files))
    status, said = command(command=name)
    assert status == 2
    assert "was trained on all of these images; take others" in said


@pytest.mark.parametrize("share", [0.0001, 0.02, 0.97, 0.9999])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_parts_too_small_to_choose_or_certify_on_are_refused(command, bundle, share, dtype):
    status, said = command("--search-share", share, "--dtype", dtype, "--compare")
    assert status == 2
    assert f"a search share of {share:g} leaves" in said
    assert "each takes at least 25" in said
    assert not (bundle / "policy.json").exists()


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (0.9999, "--calibrate-share 0.9999 leaves 0 of 480 images to measure on"),
        (0.0001, "0 images are too few to calibrate on"),
    ],
)
def test_parts_too_small_to_resample_are_refused(command, share, message):
    status, said = command("--calibrate-share", share, command="resample")
    assert status == 2
    assert message in said


@pytest.mark.slow
def test_resampling_reports_every_bound_and_leaves_the_bundle_as_it_was(command, bundle):
    before = sorted(p.name for p in bundle.iterdir())
    status, said = command("--splits", 2, command="resample")
    assert status == 0
    assert "2 splits: calibrated on 240 images, measured on 240" in said
    assert said.count(" of 2\n") == len(LOSSES)
    assert sorted(p.name for p in bundle.iterdir()) == before
    said = command("--splits", 2, "--as-population", command="resample")[1]
    assert "calibrated on 240 images, measured on 480" in said
    assert "beyond chance" not in said  # these are all images, so there is no chance in it
    assert "--splits above 0" in command("--splits", 0, command="resample")[1]


@pytest.mark.parametrize("measure", Measure)
def test_confidences_are_calibrated_on_fresh_images(measure):
    logits, class_ids = world(6000, seed=3)
    calibrations = fit_calibrations(logits[:3000], class_ids[:3000], measure, ensemble=True)
    fresh = outcomes_of(logits[3000:], class_ids[3000:], calibrations, measure)
    taken = fresh.taken((0.9, 0.9, 0.9))
    for errors in exit_errors(fresh, 3 * logits[3000:], class_ids[3000:], taken):
        assert errors.after < 0.06 < errors.before


def test_the_ensemble_of_passed_exits_is_right_more_often_than_exits_alone():
    logits, class_ids = world(6000, seed=3)
    fits = [fit_calibrations(logits, class_ids, Measure.MARGIN, e) for e in (True, False)]
    ensemble, alone = (outcomes_of(logits, class_ids, f, Measure.MARGIN) for f in fits)
    assert (ensemble.right.mean(axis=0)[1:] > alone.right.mean(axis=0)[1:]).all()


def test_calibration_error_is_the_mean_gap_between_sureness_and_being_right():
    confidence = np.array([0.95, 0.95, 0.55, 0.55])
    right = np.array([True, True, True, False])
    assert calibration_error(confidence, right) == pytest.approx(0.05)


@pytest.mark.slow
def test_the_images_that_choose_and_that_certify_are_disjoint(bundle):
    logits, class_ids = world(1000, seed=2, classes=3)
    result = calibrate(load_bundle(bundle), logits, class_ids, Options())
    found = search_part(1000, Options())
    assert sorted([*found, *result.tested]) == list(range(1000))
    assert len(found) == 250


@pytest.mark.slow
def test_labels_of_the_certifying_images_change_no_threshold_on_the_path(bundle):
    logits, class_ids = world(1000, seed=2, classes=3)
    loaded = load_bundle(bundle)
    result = calibrate(loaded, logits, class_ids, Options())
    scrambled = class_ids.clone()
    scrambled[result.tested] = scrambled[result.tested].flip(0)
    again = calibrate(loaded, logits, scrambled, Options())
    assert again.path == result.path
    assert again.policy.operating_points != result.policy.operating_points


def test_too_few_images_to_calibrate_at_all_are_refused(bundle):
    logits, class_ids = world(99, classes=3)
    with pytest.raises(DataError, match="99 images are too few"):
        calibrate(load_bundle(bundle), logits, class_ids, Options())


@pytest.mark.slow
def test_all_measures_can_be_compared_without_touching_the_images_that_certify(command):
    status, said = command("--compare")
    assert status == 0
    assert all(measure in said for measure in Measure)


@pytest.mark.slow
def test_a_hundred_thousand_images_calibrate_and_certify_nearly_every_loss(bundle):
    logits, class_ids = world(100_000, seed=5, classes=3)
    result = calibrate(load_bundle(bundle), logits, class_ids, Options())
    assert len(result.tested) == 100_000 - MOST_SEARCHED
    tightest = [p for p in result.policy.operating_points if p.max_accuracy_loss == 0.0025]
    assert tightest[0].thresholds != (NEVER,) * 3


def test_classes_are_named_in_order():
    assert tuple(sorted(CLASSES)) == CLASSES
