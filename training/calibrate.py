"""The calibrate command: a trained bundle to one that may be served."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.bundle import Bundle, load_bundle, save_policy
from model.policy import Measure, OperatingPoint, Policy
from training import data as folders
from training.data import DataError
from training.fit import fit_calibrations
from training.ladder import Certifier, Method, ladder, uncertifiable
from training.logits import cached_logits
from training.outcomes import outcomes_of
from training.search import nested_path

HELD_OUT = 0.1
"""Share of each class of train/ that training leaves out; `training.train` holds out the same."""
LEAST_IMAGES = 100


@dataclass(frozen=True, slots=True)
class Options:
    """What decides a calibration, besides bundle and images."""

    measure: Measure = Measure.PROBABILITY
    ensemble: bool = True
    method: Method = Method.PAIRED
    delta: float = 0.1
    search_share: float = 0.4
    seed: int = 0


def add_command(commands: Any) -> None:
    """Add `calibrate` to the command line."""
    command = commands.add_parser(
        "calibrate",
        help="choose thresholds with a guarantee, on images the network never saw",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("bundle", type=Path, help="folder that train wrote")
    command.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder with CLASS/*.png, or with train/CLASS/*.png, whose held-out part is taken",
    )
    command.add_argument("--delta", type=float, default=0.1, help="chance that a bound fails")
    command.set_defaults(run=_calibrate)


def _calibrate(arguments: argparse.Namespace) -> None:
    bundle = load_bundle(arguments.bundle)
    images = folders.load(calibration_listing(arguments.data), bundle.description.preprocess)
    check_classes(bundle, images.classes)
    cache = arguments.bundle.parent / ".cache"
    logits = cached_logits(bundle, images, torch.float32, cache)
    options = Options(delta=arguments.delta)
    policy, certifier = calibrate(bundle, logits, images.class_ids, options)
    save_policy(arguments.bundle, policy)
    print(table(policy.operating_points))
    for point, needed in uncertifiable(certifier, policy.operating_points):
        print(f"{point.max_accuracy_loss:.2%} cannot be certified; needs {needed} test images")


def calibration_listing(root: Path) -> folders.Listing:
    """The images to calibrate on: `root` itself, or what training held out of `root/train`."""
    if (root / "train").is_dir():
        return folders.split_by_hash(folders.list_folder(root / "train"), HELD_OUT)[1]
    return folders.list_folder(root)


def check_classes(bundle: Bundle, classes: Sequence[str]) -> None:
    """Raise DataError unless the data's classes are the bundle's, in its order."""
    expected = bundle.description.classes
    if tuple(classes) != expected:
        odd = sorted(set(classes) ^ set(expected))[:3]
        raise DataError(
            f"the data has {len(classes)} classes, the bundle {len(expected)}, and they differ "
            f"(in {', '.join(odd)}); calibrate on images of the classes it was trained on"
        )


def calibrate(
    bundle: Bundle, logits: Tensor, class_ids: Tensor, options: Options
) -> tuple[Policy, Certifier]:
    """Fit and search on one part of the images, certify on the other.

    Args:
        bundle: what the logits came from.
        logits: fp32 `[N, exits, classes]`.
        class_ids: int64 `[N]`.
        options: what to calibrate.

    Raises:
        DataError: too few images.
    """
    n = len(class_ids)
    if n < LEAST_IMAGES:
        raise DataError(f"{n} images are too few to calibrate on; take at least {LEAST_IMAGES}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(options.seed))
    found, tested = order.split(
        [round(options.search_share * n), n - round(options.search_share * n)]
    )
    calibrations = fit_calibrations(
        logits[found], class_ids[found], options.measure, options.ensemble
    )
    everything = outcomes_of(logits, class_ids, calibrations, options.measure)
    macs = np.array([e.macs for e in bundle.description.exits], dtype=float)
    macs /= macs[-1]
    path = nested_path(everything.pick(found.numpy()), macs)
    certifier = Certifier(everything.pick(tested.numpy()), options.delta, options.method)
    policy = Policy(
        weights_sha256=bundle.description.weights_sha256,
        method=options.method,
        delta=options.delta,
        calibration_images=n,
        measure=options.measure,
        calibrations=tuple(calibrations),
        operating_points=ladder(certifier, path, everything, macs),
    )
    return policy, certifier


def table(points: Sequence[OperatingPoint]) -> str:
    """The operating points for people."""
    lines = ["loss at most   measured   mean MACs   leaving at each exit"]
    for p in points:
        leaving = " ".join(f"{s:6.1%}" for s in p.exit_shares)
        lines.append(
            f"{p.max_accuracy_loss:12.2%} {p.measured_accuracy_loss:10.2%} "
            f"{p.mean_macs:11.1%}   {leaving}"
        )
    return "\n".join(lines)
