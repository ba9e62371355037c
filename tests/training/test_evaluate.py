"""The report of a calibrated bundle holds what happened to every test image."""

import dataclasses
import json
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model.bundle import load_bundle
from model.policy import NEVER, OperatingPoint
from tests.training.bundles import CLASSES, write_bundle, write_noisy_images
from training import curves, plots, risk, sheets
from training.__main__ import main
from training.data import DataError, ImageSet
from training.evaluation import Report, loss_interval, point_results
from training.markdown import CAPTIONS, headline, render
from training.outcomes import Outcomes
from training.record import load_record

pytestmark = pytest.mark.slow  # a report has many pictures


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A bundle calibrated and evaluated on other images: its folder."""
    root = tmp_path_factory.mktemp("evaluated")
    bundle = write_bundle(root / "bundle")
    data = write_noisy_images(root / "data", 150)
    test = write_noisy_images(root / "test", 60, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        times = np.array([1.0, 2.0, 3.0, 4.0])
        patch.setattr("training.evaluate.stage_seconds", lambda *_: times / 1e3)
        assert main(["calibrate", str(bundle), "--data", str(data)]) == 0
        assert main(["evaluate", str(bundle), "--data", str(test)]) == 0
    return bundle


@pytest.fixture(scope="module")
def report(evaluated):
    return json.loads((evaluated / "report/report.json").read_text())


def test_every_exit_has_its_accuracy_cost_and_calibration(evaluated, report):
    described = load_bundle(evaluated).description.exits
    assert [e["exit"] for e in report["exits"]] == [1, 2, 3, 4]
    for e, d in zip(report["exits"], described, strict=True):
        assert (e["macs"], e["parameters"], e["accuracy"]) == (d.macs, d.parameters, d.accuracy)
        assert 0.6 < e["accuracy"] <= 1
        assert e["milliseconds"] == pytest.approx(e["exit"])
        assert 0 < e["error_after"] < 0.2
        assert 0 < e["error_before"] < 0.2
        assert sum(e["reliability"]["images"]) == 180
    full = report["exits"][-1]["accuracy"]
    for e in report["exits"]:
        net = e["only_full_network_right"] - e["only_this_exit_right"]
        assert net / 180 == pytest.approx(full - e["accuracy"])


def test_every_operating_point_has_its_accuracy_loss_cost_and_speed(report):
    full = report["exits"][-1]
    macs = np.array([e["macs"] for e in report["exits"]])
    for p in report["operating_points"]:
        shares = np.array(p["exit_shares"])
        assert shares.sum() == pytest.approx(1)
        assert p["mean_macs"] == pytest.approx(shares @ macs / full["macs"])
        assert p["speedup_macs"] == pytest.approx(1 / p["mean_macs"])
        assert p["speedup_measured"] == pytest.approx(4 / (shares @ [1, 2, 3, 4]))
        assert p["loss"] == pytest.approx(full["accuracy"] - p["accuracy"])
        assert p["loss_interval"][0] <= p["loss"] <= p["loss_interval"][1]


def test_a_report_speaks_of_the_point_that_a_loss_of_one_percent_is_served_from(evaluated, report):
    served = load_bundle(evaluated).policy.point_for(0.01).max_accuracy_loss
    assert report["shown_loss"] == served
    for point in report["operating_points"]:
        other = report | {"shown_loss": point["max_accuracy_loss"]}
        assert Report.model_validate(other).point_shown.model_dump(mode="json") == point


def test_classes_are_shown_by_where_their_images_leave(report):
    assert list(report["class_shares"]) == list(CLASSES)
    point = next(p for p in report["operating_points"] if p["max_accuracy_loss"] == 0.01)
    mean = np.mean(list(report["class_shares"].values()), axis=0)
    assert mean == pytest.approx(point["exit_shares"])


def test_the_report_shows_every_picture_it_made(evaluated):
    text = (evaluated / "report/report.md").read_text()
    pictures = {p.name for p in (evaluated / "report").glob("*.png")}
    always = {"accuracy_over_cost.png", "reliability.png", "exit_shares.png", "class_shares.png"}
    assert always <= pictures <= set(CAPTIONS)
    for name in pictures:
        assert f"]({name})" in text
        assert CAPTIONS[name] in text
        assert (evaluated / "report" / name).stat().st_size > 5000


def test_the_report_begins_with_what_early_exit_buys(evaluated, report):
    text = (evaluated / "report/report.md").read_text()
    assert text.startswith("# brightness 1: what early exit buys")
    assert "On 180 test images the full network is right on" in text
    assert text.count("x |") >= 2 * len(report["operating_points"])


@pytest.mark.parametrize(
    ("changes", "bound", "sentence"),
    [
        ({}, "at a guaranteed loss", "Bounds hold with probability 90% over calibration sets"),
        ({"delta": 0.001}, "at a guaranteed loss", "Bounds hold with probability 99.9% over"),
        (
            {"dtype": "bfloat16", "certified_dtypes": ["float32"]},
            "by thresholds for a loss",
            "Bounds hold for float32; in bfloat16 none was certified",
        ),
        (
            {"method": "expectation"},
            "on average over calibration sets, it is right",
            "Bounds hold on average over calibration sets",
        ),
    ],
)
def test_the_report_promises_no_more_than_was_proved(report, changes, bound, sentence):
    changed = json.loads(json.dumps(report | changes))
    for point in changed["operating_points"]:
        point["certified"] = changed["method"] != "expectation"
    read = Report.model_validate(changed)
    assert bound in headline(read)
    assert sentence in render(read, [], None)
    assert ("guaranteed" in render(read, [], None)) == ("guaranteed" in bound)
    assert f"Everything is measured in {read.dtype}" in render(read, [], None)


def test_evaluating_says_which_numerics_it_measured(report, evaluated):
    assert (
        report["dtype"] == report["certified_dtypes"][0] == load_bundle(evaluated).policy.dtypes[0]
    )


def test_names_with_dollars_are_drawn_as_they_are(report, tmp_path):
    name = r"$\frac and $"
    shares = dict(report["class_shares"]) | {name: (0.25,) * 4}
    plots.class_shares(Report.model_validate(report | {"class_shares": shares})).savefig(
        tmp_path / "shares.png"
    )
    right = np.ones((1, 1), bool)
    outcomes = Outcomes(np.ones((1, 1)), np.zeros((1, 1), int), right, np.ones((1, 1)))
    measured = SimpleNamespace(taken=np.array([1]), outcomes=outcomes)
    pixels = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    images = ImageSet((name,), pixels, torch.zeros(1, dtype=torch.int64), (tmp_path,))
    sheets._sheet(measured, images, np.array([0]), "one").savefig(tmp_path / "sheet.png")
    curves.accuracy_over_cost({name: [(1, 50), (2, 60)]}, "tests", False).savefig(
        tmp_path / "cost.png"
    )


def test_bounds_of_near_operating_points_can_be_read():
    report = Report.model_validate_json(Path("model/default/report/report.json").read_text())
    figure = plots.accuracy_over_cost(report, True)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 7
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


@pytest.mark.parametrize(("teacher", "scale"), [(3.0, "linear"), (100.0, "log")])
def test_small_losses_are_seen_beside_large_ones(teacher, scale):
    entry = {
        "epoch": 1,
        "validation_accuracy": [0.5],
        "loss": {"label/1": 1.0, "teacher/1": teacher},
    }
    figure = curves.training_curves({"": [entry]})
    assert figure.axes[1].get_yscale() == scale


def test_a_bundle_without_a_policy_is_not_evaluated(tmp_path, capsys):
    bundle = write_bundle(tmp_path / "bundle")
    assert main(["evaluate", str(bundle), "--data", str(tmp_path)]) == 2
    assert "has no policy.json; run: python -m training calibrate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b"[]", "the file"),
        (b"{}", "weights_sha256"),
        (b"not JSON", "the file"),
        (b"\xff", "the file"),
        (b'{"weights_sha256": "", "path": [["x"]]}', "path.0.0"),
    ],
)
def test_a_malformed_record_of_the_calibration_is_said(tmp_path, content, where):
    (tmp_path / "report").mkdir()
    (tmp_path / "report/calibration.json").write_bytes(content)
    bundle = SimpleNamespace(path=tmp_path, description=SimpleNamespace(weights_sha256=""))
    with pytest.raises(DataError, match=f"is malformed at {where}: .*; calibrate the bundle again"):
        load_record(bundle)


def test_the_record_of_a_calibration_is_that_of_its_own_weights_alone(evaluated):
    bundle = load_bundle(evaluated)
    assert len(load_record(bundle).path) > 1
    other = bundle.description.model_copy(update={"weights_sha256": "other"})
    assert load_record(dataclasses.replace(bundle, description=other)) is None
    assert load_record(dataclasses.replace(bundle, path=evaluated / "nowhere")) is None


def interval(threshold):
    """Of the loss by a threshold for the first of two exits, measured on 100 unsure images."""
    every = np.full((100, 2), 0.5)
    outcomes = Outcomes(every, np.zeros((100, 2), int), np.ones((100, 2), bool), every)
    shares, costs = (0.0, 1.0), np.array([1.0, 2.0])
    point = OperatingPoint(
        max_accuracy_loss=0.01,
        thresholds=(threshold,),
        certified=True,
        measured_accuracy_loss=0.0,
        mean_macs=1.0,
        exit_shares=shares,
    )
    policy = SimpleNamespace(operating_points=(point,))
    measured = SimpleNamespace(policy=policy, outcomes=outcomes, macs=costs, seconds=costs)
    (result,) = point_results(measured)
    assert result.exit_shares == shares
    return result.loss_interval


def test_a_loss_that_a_few_images_did_not_show_may_be_there():
    low, high = interval(0.9)
    assert -0.05 < low < -0.02 and 0.02 < high < 0.05
    assert interval(NEVER) == (0.0, 0.0), "with no early exit nothing can be lost"


def test_an_interval_for_the_loss_holds_it_and_narrows_with_more_images():
    few = np.repeat([1, -1, 0], [6, 3, 191])
    low, high = loss_interval(few)
    assert low < few.mean() < high
    many_low, many_high = loss_interval(np.tile(few, 10))
    assert low < many_low < few.mean() < many_high < high
    assert risk.paired_p_value(6, 3, 200, high) <= 0.05
