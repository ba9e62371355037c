"""Recipes by name, their options, the command from folder to bundle."""

import argparse
import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from model.bundle import DESCRIPTION, POLICY, load_bundle
from tests.conftest import ROOT
from tests.training.conftest import tiny_net, write_images
from training import loop
from training import train as train_command
from training.__main__ import main
from training.calibrate import calibration_listing, is_labelled
from training.data import DataError, list_folder
from training.distributed import Processes
from training.evaluate import test_listing as listing_to_test
from training.interrupt import Interrupted
from training.log import read_log
from training.options import add_options, given
from training.parts import find_parts, names_digest
from training.presets import PRESETS, Shape
from training.recipe import ENSEMBLE, NEXT, Recipe
from training.report import Trained, names, published_at, write_report
from training.seen import Seen, seen_by
from training.shapes import build_net
from training.train import bundle_name

MORE_PRESETS = sorted(PRESETS.keys() - {"paper", "best"})
ABLATIONS = {
    "plain network": "--method plain",
    "labels alone": "--method deep-supervision",
    "no feature term": "--feature-weight 0",
    "taught by all exits": f"--distill-from {ENSEMBLE}",
    "taught by the next deeper exit": f"--distill-from {NEXT}",
    "no attention": "--no-attention",
    "two exits": "--keep 2,4",
    "an exit after every block": "--exits blocks",
    "a separate teacher alone": "--teacher BUNDLE --distillation-weight 0 --feature-weight 0",
    "a separate teacher on top": "--teacher BUNDLE",
}
"""What the papers take apart, each as options on top of a preset."""
TINY = ["--architecture", "resnet10", "--width", "8", "--size", "16", "--batch-size", "16"]


@pytest.fixture
def drawn():
    """For a test of what is drawn, which takes longer than a tiny network's training."""


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Elsewhere curves are left out of their picture."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("training.curves.training_curves", lambda runs: Figure())


def parse(words):
    parser = argparse.ArgumentParser()
    add_options(parser, Shape, "network")
    add_options(parser, Recipe, "recipe")
    arguments = parser.parse_args(words)
    return given(arguments, Shape) | given(arguments, Recipe)


def train(*words):
    return main(["train", *map(str, words)])


def test_the_paper_preset_is_what_the_authors_ran():
    recipe, shape = PRESETS["paper"].recipe, PRESETS["paper"].shape
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate) == (250, 128, 0.1)
    assert (recipe.momentum, recipe.nesterov, recipe.weight_decay) == (0.9, False, 5e-4)
    assert (recipe.distillation_weight, recipe.temperature, recipe.feature_weight) == (0.3, 3, 0.03)
    assert (recipe.distort, recipe.cutout, recipe.pad, recipe.mirror) == ("auto", 16, 4, True)
    assert (shape.head, shape.attention, shape.architecture) == ("paper", True, "resnet18")
    assert not PRESETS["paper-2019"].shape.attention


def test_the_fast_preset_is_the_defaults():
    assert PRESETS["fast"].recipe == Recipe() and PRESETS["fast"].shape == Shape()


def test_options_change_what_the_preset_says_and_nothing_else():
    changed = PRESETS["paper"].with_options(parse(["--epochs", "3", "--no-mirror", "--width", "8"]))
    assert changed.recipe == dataclasses.replace(PRESETS["paper"].recipe, epochs=3, mirror=False)
    assert changed.shape == dataclasses.replace(PRESETS["paper"].shape, width=8)


@pytest.mark.parametrize("name", PRESETS)
def test_every_field_of_a_preset_can_be_typed(name):
    words = []
    for part in (PRESETS[name].recipe, PRESETS[name].shape):
        for field, value in dataclasses.asdict(part).items():
            flag = field.replace("_", "-")
            if isinstance(value, bool):
                words += [f"--{flag}" if value else f"--no-{flag}"]
            elif value is not None:
                words += [f"--{flag}", str(value)]
    typed = PRESETS["fast"].with_options(parse(words))
    assert (typed.recipe, typed.shape) == (PRESETS[name].recipe, PRESETS[name].shape)


@pytest.mark.parametrize("words", ABLATIONS.values())
def test_every_ablation_is_options_on_top_of_a_preset(words):
    own = words.replace("--teacher BUNDLE", "").split()
    changed = PRESETS["paper"].with_options(parse(own))
    assert "--teacher BUNDLE" in words or changed != PRESETS["paper"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "epochs must be at least 1"),
        ("distillation_weight", 1.5, "between 0 and 1"),
        ("ema", 1.0, "at least 0, below 1"),
        ("temperature", 0.0, "above 0"),
        ("weight_decay", -1.0, "at least 0"),
        ("schedule", "linear", "schedule must be one of cosine, one-cycle"),
        ("accumulate", 200, "128 images cannot be run in 200 parts"),
        ("momentum", 0.0, "nesterov needs a momentum"),
        ("learning_rate", float("nan"), "above 0"),
    ],
)
def test_a_recipe_that_means_nothing_says_why(field, value, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{field: value})


def test_shares_of_mixed_images_cannot_exceed_all():
    with pytest.raises(ValueError, match="together at most 1"):
        Recipe(mixup=0.6, cutmix=0.6)


@pytest.mark.parametrize(
    ("shape", "plain", "kept", "stem"),
    [
        ({}, False, (1, 2, 3, 4), 32),
        ({"keep": "1,3"}, False, (1, 3), 32),
        ({}, True, (4,), 32),
        ({"keep": "1,3"}, True, (3,), 32),
        ({"stem": 224}, False, (1, 2, 3, 4), 224),
    ],
)
def test_a_shape_builds_the_exits_that_it_says(shape, plain, kept, stem):
    net, arguments = build_net(Shape("resnet10", width=8, **shape), 3, 32, plain)
    assert net.kept == kept and arguments["stem"] == stem


def test_large_images_get_the_stem_for_large_images():
    assert build_net(Shape("resnet10", width=8), 3, 224, False)[1]["stem"] == 224


def test_a_plain_network_has_no_heads_but_its_own_classifier():
    net, _ = build_net(Shape("resnet10", width=8), 3, 32, plain=True)
    assert [n for n, _ in net.heads.named_parameters()] == ["3.fc.weight", "3.fc.bias"]


@pytest.mark.parametrize(
    "name", ["paper", "best", *(pytest.param(n, marks=pytest.mark.slow) for n in MORE_PRESETS)]
)
def test_every_preset_takes_two_steps_to_a_bundle(folder, tmp_path, name, capsys):
    out = tmp_path / "run"
    assert train("--data", folder, "--out", out, "--preset", name, *TINY, "--epochs", 1) == 0
    bundle = load_bundle(out / "bundle")
    facts = bundle.description.training
    assert facts["recipe"] == json.loads(
        json.dumps(
            dataclasses.asdict(dataclasses.replace(PRESETS[name].recipe, epochs=1, batch_size=16))
        )
    )
    assert len(facts["test_accuracy"]) == 4 and facts["test_images"] == 12
    assert read_log(out) == read_log(out / "bundle/report")
    assert "33 images to train on, 3 held out, 12 to test on" in capsys.readouterr().out


@pytest.mark.slow
def test_every_ablation_trains(folder, tmp_path):
    common = ["--data", folder, "--preset", "paper", *TINY, "--epochs", 1, "--cutout", 4]
    assert train(*common, "--out", tmp_path / "teacher") == 0
    for i, words in enumerate(ABLATIONS.values()):
        own = words.replace("BUNDLE", str(tmp_path / "teacher/bundle")).split()
        assert train(*common, "--out", tmp_path / str(i), *own) == 0, words
    runs = [str(tmp_path / str(i)) for i in range(len(ABLATIONS))]
    assert main(["report", *runs, "--out", str(tmp_path / "report")]) == 0


@pytest.mark.slow
def test_the_report_shows_runs_side_by_side(drawn, folder, tmp_path, capsys):
    for name, words in {"whole": ["--feature-weight", 0.1], "alone": ["--method", "plain"]}.items():
        out = tmp_path / name
        assert train("--data", folder, "--out", out, *TINY, "--epochs", 1, *words) == 0
    capsys.readouterr()
    report = tmp_path / "report"
    assert (
        main(["report", *(str(tmp_path / n) for n in ("whole", "alone")), "--out", str(report)])
        == 0
    )
    page = (report / "report.md").read_text()
    first = {line.split("|")[1].strip(): line for line in page.split("\n\n")[2].splitlines()}
    assert "--feature-weight 0.1" in first["whole"] and "--method plain" in first["alone"]
    assert "Accuracy on test images, after the last epoch" in page
    for name in ("accuracy_over_macs.png", "training_curves.png"):
        assert f"({name})" in page
        Image.open(report / name).verify()
    for name in ("training_curves.png", "training.md"):
        assert (tmp_path / "whole/bundle/report" / name).stat().st_size > 500


def test_runs_of_one_name_are_told_apart(tmp_path, monkeypatch):
    paths = [tmp_path / p for p in ("a/x/run", "b/x/run", "b/y/run", "other")]
    for path in paths:
        (path / "bundle").mkdir(parents=True)
        (path / "bundle/bundle.json").write_text("{}")
    monkeypatch.chdir(paths[0])
    own = [Path(), paths[1], paths[2] / "bundle", paths[3]]
    assert names(own) == ["a/x/run", "b/x/run", "y/run", "other"]
    assert names([Path()]) == ["run"]
    with pytest.raises(ValueError, match="a/x/run is given twice"):
        names([Path(), paths[0] / "bundle"])


def test_a_folder_without_a_finished_run_is_said(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "has no finished training to report" in capsys.readouterr().err


@pytest.mark.parametrize("tested", [True, False])
def test_what_was_published_of_test_images_stands_beside_those_alone(tmp_path, tested):
    described = load_bundle(ROOT / "model/default").description
    facts = dict(described.training)
    if tested:
        facts |= {f"test_{k}": facts[f"validation_{k}"] for k in ("accuracy", "ensemble_accuracy")}
    run = Trained("run", described.model_copy(update={"training": facts}), [])
    assert run.tested == tested
    write_report([run], tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert ("Accuracy on test images" in page, "against BoostNet" in page) == (tested, tested)


def test_the_published_curve_is_read_between_its_points():
    assert published_at(25) == 70.0 and published_at(100) == 76.5
    assert published_at(63) == pytest.approx(75.05)
    assert published_at(10) is None and published_at(500) is None


def by_names(digest):
    """What a bundle has seen that tells of nothing but the names in its folder."""
    return Seen(Path("bundle"), digest, None, None, None)


def test_a_single_folder_keeps_its_parts_apart_to_the_end(tmp_path):
    data = write_images(tmp_path / "data", n=20)
    trained_on = find_parts(data).digest
    parts = find_parts(data)
    assert trained_on == names_digest(list_folder(data).files)
    assert is_labelled(data)
    assert calibration_listing(data, by_names(trained_on)).files == parts.held_out.files
    assert len(calibration_listing(data, by_names("of other files"))) == 60
    assert listing_to_test(data, by_names(trained_on)).files == parts.test.files
    assert len(listing_to_test(data, by_names(None))) == 60


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "5"], "kept exits must rise within 1..4"),
        (["--batch-size", "4096"], "fewer than one batch of 4096"),
        (["--resume"], "leave --resume out"),
        (["--teacher", "nowhere"], "is not a bundle"),
        (["--pretrained", "nowhere.pth"], "cannot read nowhere.pth"),
        (["--crop", "2"], "crop must be above 0"),
        (["--images-per-class", "0"], "at least 1 image a class"),
        (["--size", "0"], "size must be between 8 and 1024 pixels, not 0"),
        (["--size", "2000"], "size must be between 8 and 1024"),
        (["--seed", str(2**64)], "seed must be at least 0, below 2"),
        (["--size", "8", "--batch-size", "1"], "leaves a part of one image"),
        (["--size", "8", "--architecture", "vgg19-bn"], "vgg19-bn cannot take images of 8x8: "),
        (
            ["--size", "8", "--batch-size", "5", "--accumulate", "3"],
            "5 in 3 parts of each of 1 processes leaves",
        ),
        (["--distillation-weight", "0.8", "--teacher", "any"], "0.8 and teacher_weight 0.3 are"),
    ],
)
def test_what_the_command_cannot_do_is_one_sentence(folder, tmp_path, capsys, words, message):
    assert train("--data", folder, "--out", tmp_path / "run", *TINY, *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error: ") == 1 and "Traceback" not in error


def test_numbers_of_workers_below_nothing_are_refused(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train("--data", folder, "--out", tmp_path / "run", "--workers", "-1")
    assert "argument --workers: -1 is below 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("batch", "parts", "count"), [(5, 2, 1), (16, 5, 1), (16, 4, 2), (15, 4, 1), (128, 1, 8)]
)
def test_parts_of_several_images_can_be_trained_on(batch, parts, count):
    recipe = Recipe(batch_size=batch, accumulate=parts)
    train_command.check_parts(tiny_net(), 8, recipe, count)


@pytest.mark.parametrize(("batch", "parts", "count"), [(16, 8, 2), (13, 4, 1), (1, 1, 1)])
def test_parts_of_one_image_can_where_its_deepest_map_is_large_enough(batch, parts, count):
    recipe, net = Recipe(batch_size=batch, accumulate=parts), tiny_net()
    before = net.backbone.bn1.running_mean.clone()
    train_command.check_parts(net, 16, recipe, count)
    assert torch.equal(net.backbone.bn1.running_mean, before)
    with pytest.raises(ValueError, match="leaves a part of one image"):
        train_command.check_parts(net, 8, recipe, count)


def test_a_batch_that_processes_cannot_share_is_refused(folder, tmp_path):
    arguments = argparse.Namespace(teacher=None, out=tmp_path)
    preset = PRESETS["fast"].with_options({"batch_size": 9})
    with pytest.raises(ValueError, match="2 processes cannot share a batch of 9"):
        train_command._train_with(arguments, preset, Processes(torch.device("cpu"), count=2))


def test_determinism_is_asked_of_torch(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(loop, "fit", lambda run, work: asked.append(determinism()))
    asked = []

    def determinism():
        return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic

    for words in (["--deterministic"], []):
        with pytest.raises(AttributeError):  # nothing was trained that could be written
            train("--data", folder, "--out", tmp_path / "run", *TINY, *words)
    assert asked == [(True, True), (False, False)]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_test_images_that_cannot_be_read_are_said_before_training(folder, tmp_path, capsys):
    for file in (folder / "test").glob("*/*"):
        file.write_bytes(b"broken")
    assert train("--data", folder, "--out", tmp_path / "run", *TINY) == 2
    assert capsys.readouterr().err == "error: none of 12 test images could be read\n"


@pytest.mark.slow
def test_a_run_goes_on_with_what_it_began_with(folder, tmp_path, capsys):
    write_images(folder / "train", n=20)  # of which a twentieth is one, a tenth two
    common = ["--data", folder, *TINY, "--epochs", 1]
    assert train(*common, "--out", tmp_path / "teacher", "--size", 8) == 0
    bundle = tmp_path / "teacher/bundle"
    words = ["--crop", 0.9, "--images-per-class", 9, "--teacher", bundle, "--out", tmp_path / "run"]
    assert train(*common, *words) == 0
    assert train(*common, *words, "--resume") == 0
    for changed, name in (
        (["--size", 24], "preprocess"),
        (["--crop", 0.8], "preprocess"),
        (["--images-per-class", 8], "training_images 27 and not 24"),
        (["--held-out", 0.05], "training_files"),
        (["--teacher", tmp_path / "run/bundle"], "teacher"),
    ):
        capsys.readouterr()
        assert train(*common, *words, *changed, "--resume") == 2
        error = capsys.readouterr().err
        assert f"was written with {name}" in error and "resume with the same options" in error


@pytest.mark.slow
def test_a_run_goes_on_from_the_whole_of_a_bundle(folder, tmp_path):
    common = ["--data", folder, *TINY, "--epochs", 1]
    assert train(*common, "--out", tmp_path / "first") == 0
    words = ["--pretrained", tmp_path / "first/bundle", "--learning-rate", 1e-9]
    assert train(*common, "--out", tmp_path / "second", *words) == 0
    first, second = (load_bundle(tmp_path / n / "bundle").net for n in ("first", "second"))
    for name, weight in first.named_parameters():
        torch.testing.assert_close(second.get_parameter(name), weight, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_run_that_goes_on_still_knows_what_it_started_from(folder, tmp_path, capsys):
    """Else its bundle would not say which images its parent saw, and calibrate on them."""
    common = ["--data", folder, *TINY, "--epochs", 1]
    assert train(*common, "--out", tmp_path / "first") == 0
    words = [*common, "--out", tmp_path / "second"]
    assert train(*words, "--pretrained", tmp_path / "first/bundle") == 0
    assert train(*words, "--resume") == 2
    assert "was written with pretrained" in capsys.readouterr().err
    assert train(*words, "--pretrained", tmp_path / "first/bundle", "--resume") == 0


@pytest.mark.slow
def test_a_finished_run_that_is_started_again_keeps_its_calibration(folder, tmp_path, capsys):
    words = ["--data", folder, *TINY, "--epochs", 1, "--out", tmp_path / "run"]
    assert train(*words) == 0
    bundle = tmp_path / "run/bundle"
    before = (bundle / DESCRIPTION).read_bytes()
    (bundle / POLICY).write_text("calibrated")
    assert train(*words, "--resume") == 0
    assert (bundle / POLICY).read_text() == "calibrated"
    assert (bundle / DESCRIPTION).read_bytes() == before
    assert "it stays as it is" in capsys.readouterr().out
    (bundle / POLICY).unlink()
    assert train(*words, "--resume") == 0
    assert f"wrote {bundle}" in capsys.readouterr().out


@pytest.mark.slow
def test_classes_are_weighed_where_that_is_asked_for(folder, tmp_path):
    for file in list((folder / "train/dark").iterdir())[:8]:
        file.unlink()
    losses = []
    for kind in ("none", "balanced"):
        words = ["--class-weights", kind, "--epochs", 1, "--out", tmp_path / kind]
        assert train("--data", folder, *TINY, *words) == 0
        losses.append(read_log(tmp_path / kind)[0]["loss"]["label/4"])
    assert losses[0] != losses[1]


def test_a_full_disk_is_said_by_the_command(folder, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert train("--data", folder, "--out", tmp_path / "run", *TINY) == 2
    assert "checkpoints and the bundle take" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_one_sentence(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train("--data", folder, "--out", tmp_path / "file", *TINY) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'file'}: File exists\n"


def test_a_run_among_classes_is_refused_before_anything_is_made(folder, capsys):
    assert train("--data", folder / "train", "--out", folder / "train/runs/mine", *TINY) == 2
    assert "would be among the classes in" in capsys.readouterr().err
    assert not (folder / "train/runs").exists()


def test_a_run_in_a_class_that_would_then_be_a_part_is_refused(folder, tmp_path, capsys):
    shutil.copytree(folder / "train", tmp_path / "boats")
    shutil.move(tmp_path / "boats/light", tmp_path / "boats/train")
    out = tmp_path / "boats/train/run"
    assert train("--data", tmp_path / "boats", "--out", out, *TINY) == 2
    assert "would be among the classes in" in capsys.readouterr().err


def test_data_that_cannot_be_used_leave_no_folder_for_the_run(folder, tmp_path, capsys):
    (folder / "train/empty").mkdir()
    assert train("--data", folder, "--out", tmp_path / "run", *TINY) == 2
    assert "empty has no image right in it" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words", [["--name", "acme/pets"], ["--name", ""], ["--bundle-version", "1/2"]]
)
def test_a_name_that_no_path_can_hold_is_refused(folder, tmp_path, capsys, words):
    with pytest.raises(SystemExit) as left:
        train("--data", folder, "--out", tmp_path / "run", *TINY, *words)
    assert left.value.code == 2
    assert f"argument {words[0]}: {words[1]!r} cannot be a part of a" in capsys.readouterr().err


def test_a_bundle_cannot_be_called_as_every_folder_can(folder, tmp_path, capsys):
    assert train("--data", folder, "--out", tmp_path / "two\nlines", *TINY) == 2
    assert r"error: 'two\nlines' cannot be a part of a" in capsys.readouterr().err


def test_a_run_in_a_folder_that_tensorboard_cannot_take_is_refused(folder, tmp_path, capsys):
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    assert train("--data", folder, "--out", out, *TINY) == 2
    assert r"caf\udce9 is not UTF-8, all that TensorBoard takes" in capsys.readouterr().err
    assert not out.exists()
    assert bundle_name(argparse.Namespace(name=None, out=out)) == r"caf\udce9"


def test_a_card_that_is_full_is_one_sentence(folder, tmp_path, capsys, monkeypatch):
    def full(run, work):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.\nGPU 0…")

    monkeypatch.setattr(loop, "fit", full)
    assert train("--data", folder, "--out", tmp_path / "run", *TINY) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: the card's memory is full; ") and "--accumulate" in said


def test_ctrl_c_before_training_leaves_without_a_traceback(folder, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_command, "open_folder", interrupted)
    assert train("--data", folder, "--out", tmp_path / "run", *TINY) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.slow
def test_a_single_folder_of_six_images_a_class_becomes_a_bundle(tmp_path, capsys):
    data = write_images(tmp_path / "data", n=6)
    words = ["--batch-size", 15, "--epochs", 1]
    assert train("--data", data, "--out", tmp_path / "run", *TINY, *words) == 0
    bundle = load_bundle(tmp_path / "run/bundle")
    facts = bundle.description.training
    assert (bundle.description.name, bundle.description.version) == ("run", "1")
    assert facts["training_images"] == 15 and "test_accuracy" not in facts
    with pytest.raises(DataError, match="too few images a class for any to be left to test on"):
        listing_to_test(data, seen_by(bundle))


def test_a_stray_image_beside_class_folders_is_not_what_is_calibrated_on(tmp_path):
    data = write_images(tmp_path, n=20)
    (data / "montage.png").write_bytes((data / "dark/000.png").read_bytes())
    assert is_labelled(data)
    assert len(calibration_listing(data, by_names(None))) == 60


def test_a_class_called_train_is_trained_calibrated_tested(tmp_path):
    data = write_images(tmp_path, ("bus", "test", "train"), n=20)
    parts = find_parts(data)
    assert is_labelled(data)
    assert len(calibration_listing(data, by_names(None))) == 60
    known = by_names(parts.digest)
    assert calibration_listing(data, known).files == parts.held_out.files
    assert listing_to_test(data, known).files == parts.test.files


@pytest.mark.slow
@pytest.mark.parametrize("storage", [pytest.param("memory", marks=pytest.mark.slow), "disk"])
def test_every_unreadable_file_is_told_once(folder, tmp_path, capsys, storage):
    parts = find_parts(folder)
    spoiled = [parts.training.files[0], parts.held_out.files[0], parts.test.files[0]]
    for file in spoiled:
        file.write_bytes(b"broken")
    words = ["--storage", storage, "--epochs", 1, "--out", tmp_path / "run"]
    words += ["--name", "mine", "--bundle-version", "7"]
    assert train("--data", folder, *TINY, *words) == 0
    error = capsys.readouterr().err
    assert all(error.count(str(file)) == 1 for file in spoiled)
    described = load_bundle(tmp_path / "run/bundle").description
    assert described.training["unreadable_files"] == 3
    assert (described.name, described.version) == ("mine", "7")


def test_unreadable_files_are_told_of_a_run_that_was_stopped(folder, tmp_path, capsys, monkeypatch):
    spoiled = find_parts(folder).training.files[0]

    def stopped(run, work):
        spoiled.write_bytes(b"broken")
        list(work.training.batches([torch.arange(len(work.training))], draw=0))
        raise Interrupted("stopped", 143)

    monkeypatch.setattr(loop, "fit", stopped)
    assert train("--data", folder, "--storage", "disk", "--out", tmp_path / "run", *TINY) == 143
    error = capsys.readouterr().err
    assert error.count(str(spoiled)) == 1 and error.endswith("stopped\n")


@pytest.mark.slow
def test_unreadable_files_are_named_up_to_a_limit(folder, tmp_path, capsys):
    spoiled = find_parts(folder).training.files[:8]
    for file in spoiled:
        file.write_bytes(b"broken")
    assert train("--data", folder, "--out", tmp_path / "run", *TINY, "--epochs", 1) == 0
    error = capsys.readouterr().err
    assert "skipped 8 unreadable files" in error and str(spoiled[0]) in error
    assert "and 3 more" in error and str(spoiled[7]) not in error


@pytest.mark.slow
def test_the_kept_weights_are_the_averaged_ones(folder, tmp_path):
    out = tmp_path / "run"
    assert train("--data", folder, "--out", out, *TINY, "--epochs", 1, "--ema", 0.9) == 0
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    kept = load_bundle(out / "bundle").net.state_dict()["backbone.conv1.weight"]
    averaged = state["average"]["state"]["backbone.conv1.weight"]
    assert torch.equal(kept, averaged.half().float())
    assert not torch.equal(averaged, state["net"]["backbone.conv1.weight"])


def test_a_run_is_not_written_over_by_a_new_one(folder, tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes(b"hours of work")
    assert train("--data", folder, "--out", tmp_path, *TINY) == 2
    assert "holds a run already; go on with --resume" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"hours of work"


def test_the_documentation_names_no_option_that_is_not_there():
    text = (ROOT / "docs/training.md").read_text()
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    parser = argparse.ArgumentParser()
    train_command.add_command(parser.add_subparsers())
    subparser = next(a for a in parser._actions if a.choices).choices["train"]
    known = {flag for action in subparser._actions for flag in action.option_strings}
    assert named - known == {"--nproc-per-node", "--logdir"}
    assert set(PRESETS) <= set(re.findall(r"`([\w-]+)`", text))
