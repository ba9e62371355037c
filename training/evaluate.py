"""The evaluate command: what early exit buys, measured on test images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from model.bundle import REPORT, Bundle, load_servable, save_description
from model.files import write_atomically
from model.numerics import name_of
from training import evaluation, markdown, plots, sheets
from training.bundling import PAGE
from training.calibrate import (
    SHOWN_LOSS,
    add_numerics,
    cache_folder,
    check_classes,
    chosen_dtype,
    load_images,
)
from training.data import DataError, ImageSet, Listing, list_folder
from training.evaluation import Measured, Report
from training.logits import cached_logits
from training.normalisation import is_cifar100
from training.outcomes import outcomes_of
from training.parts import left_to_test, part_of
from training.record import load_record
from training.seen import Seen, seen_by
from training.timing import stage_seconds


def add_command(commands: Any) -> None:
    """Add `evaluate` to the command line."""
    command = commands.add_parser(
        "evaluate",
        help="measure a calibrated bundle on test images and write its report",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("bundle", type=Path, help="a calibrated bundle")
    command.add_argument(
        "--data", type=Path, required=True, help="folder with test/CLASS/*.png, or CLASS/*.png"
    )
    command.add_argument(
        "--out", type=Path, help="folder to write; by default the bundle's own report"
    )
    add_numerics(command)
    command.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    bundle = load_servable(arguments.bundle)
    listing = test_listing(arguments.data, seen_by(bundle))
    check_classes(bundle, listing.classes)
    images = load_images(bundle, listing)
    policy = bundle.calibrated
    certified = policy.dtypes if arguments.dtype == "auto" else ()
    dtype = chosen_dtype(certified[0] if certified else arguments.dtype)
    ranges = policy.for_int8().ranges if dtype is torch.int8 else None
    logits = cached_logits(bundle, images, dtype, cache_folder(arguments), ranges)
    measured = measure(bundle, images, logits, dtype)
    report = make_report(measured, dtype)
    out = arguments.out or arguments.bundle / REPORT
    write_report(report, measured, images, out)
    if arguments.out is None:
        record_accuracy(bundle, report)
    print(markdown.headline(report), markdown.exit_table(report), sep="\n\n", end="\n\n")
    print(markdown.point_table(report), markdown.guarantee(report), sep="\n\n", end="\n\n")
    print(f"wrote {out / 'report.md'}")


def test_listing(root: Path, seen: Seen) -> Listing:
    """The images to measure on, none of which the bundle was trained or calibrated on.

    They are those of `root/test`, or those of a `root/CLASS` that training left to be tested on,
    which is said; all of any other `root/CLASS`.

    Raises:
        DataError: there are none.
    """
    tested = part_of(root, "test")
    if tested is None and part_of(root, "train"):
        raise DataError(f"{root} has images to train on and none to test on; it has no folder test")
    listing = list_folder(tested or root)
    known = tested is not None or seen.knows(listing)
    if known and tested is None:
        test = left_to_test(listing)
        if not len(test):
            raise DataError(f"{root} has too few images a class for any to be left to test on")
        tqdm.write(f"of {len(listing)} images in {root} took the {len(test)} kept to be tested on")
        listing = test
    return seen.left_by_calibration(seen.left_by_training(listing, known))


def measure(bundle: Bundle, images: ImageSet, logits: torch.Tensor, dtype: torch.dtype) -> Measured:
    """Judge the logits `[N, exits, classes]` of test images, and time the stages."""
    policy = bundle.calibrated
    return Measured(
        bundle=bundle,
        outcomes=outcomes_of(logits, images.class_ids, policy.calibrations, policy.measure),
        logits=logits,
        class_ids=images.class_ids,
        seconds=stage_seconds(bundle, dtype),
        shown=policy.point_for(SHOWN_LOSS),
    )


def make_report(m: Measured, dtype: torch.dtype) -> Report:
    """Compute all of report.json, measured in these numerics."""
    description, policy = m.bundle.description, m.policy
    record = load_record(m.bundle)
    return Report(
        bundle=description.name,
        version=description.version,
        weights_sha256=description.weights_sha256,
        images=len(m.outcomes),
        device=device_name(),
        dtype=name_of(dtype),
        certified_dtypes=policy.dtypes or (name_of(torch.float32),),
        method=policy.method,
        delta=policy.delta,
        measure=policy.measure,
        ensemble=policy.ensemble,
        calibration_images=policy.calibration_images,
        shown_loss=m.shown.max_accuracy_loss,
        exits=evaluation.exit_results(m),
        operating_points=evaluation.point_results(m),
        path=evaluation.curve(m, record.path if record else ()),
        budgeted=evaluation.curve(m, record.budgeted if record else ()),
        class_shares=evaluation.class_shares(m),
    )


def device_name() -> str:
    """The device that times were measured on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{names[0] if names else 'CPU'}, {threads} thread{'' if threads == 1 else 's'}"


def write_report(report: Report, m: Measured, images: ImageSet, out: Path) -> None:
    """Write report.json, report.md, plots and contact sheets."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "report.json", report.model_dump_json(indent=1).encode() + b"\n")
    files = plots.draw_all(report, is_cifar100(images.classes), out)
    files += sheets.draw_all(m, images, out)
    trained = PAGE if (out / PAGE).exists() else None
    write_atomically(out / "report.md", markdown.render(report, files, trained).encode())


def record_accuracy(bundle: Bundle, report: Report) -> None:
    """Write each exit's measured accuracy into bundle.json."""
    exits = tuple(
        described.model_copy(update={"accuracy": measured.accuracy, "alone": measured.alone})
        for described, measured in zip(bundle.description.exits, report.exits, strict=True)
    )
    save_description(bundle.path, bundle.description.model_copy(update={"exits": exits}))
