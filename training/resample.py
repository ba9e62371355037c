"""The resample command: whether certified bounds hold, calibrating again and again."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import trange

from model.bundle import Bundle, load_bundle
from training.calibrate import (
    add_numerics,
    cache_folder,
    calibration_listing,
    check_classes,
    chosen_dtype,
    load_images,
    share,
)
from training.calibration import Calibrated, Options, calibrate, relative_macs
from training.data import DataError
from training.ladder import LOSSES
from training.logits import cached_logits
from training.outcomes import outcomes_of, shares


@dataclass(frozen=True, slots=True)
class Splits:
    """What calibrations on random parts of one set of images did on the rest of it."""

    loss: np.ndarray
    """float64 `[splits, bounds]`: accuracy lost on the rest."""
    mean_macs: np.ndarray
    """float64 `[splits, bounds]`: on the rest, as a share of the full network's."""

    def violations(self) -> np.ndarray:
        """How many splits lost more than each bound: int64 `[bounds]`."""
        return (self.loss > np.array(LOSSES)).sum(axis=0)


def add_command(commands: Any) -> None:
    """Add `resample` to the command line."""
    command = commands.add_parser(
        "resample",
        help="calibrate on many random parts of the images and check the bounds on the rest",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("bundle", type=Path, help="folder that train wrote; it is left as it is")
    command.add_argument(
        "--data", type=Path, required=True, help="labelled images, as calibrate takes them"
    )
    command.add_argument("--splits", type=int, default=20, help="how many random splits")
    command.add_argument(
        "--calibrate-share", type=share, default=0.5, help="share to calibrate on in each split"
    )
    command.add_argument("--delta", type=share, default=Options().delta, help="chance of failing")
    add_numerics(command)
    command.set_defaults(run=_resample)


def _resample(arguments: argparse.Namespace) -> None:
    listing, labelled = calibration_listing(arguments.data)
    if not labelled or arguments.splits < 1:
        raise DataError("resampling needs labelled images in class folders, and --splits above 0")
    bundle = load_bundle(arguments.bundle, with_policy=False)
    check_classes(bundle, listing.classes)
    images = load_images(bundle, listing)
    dtype = chosen_dtype(arguments.dtype)
    logits = cached_logits(bundle, images, dtype, cache_folder(arguments))
    options = Options(delta=arguments.delta)
    used = round(arguments.calibrate_share * len(logits))
    splits = resample(bundle, logits, images.class_ids, options, used, arguments.splits)
    for line in table(splits, options.delta, used, len(logits) - used):
        print(line)


def resample(
    bundle: Bundle, logits: Tensor, class_ids: Tensor, options: Options, used: int, splits: int
) -> Splits:
    """Calibrate on `used` random images, measure on all others, and repeat.

    Args:
        bundle: what the logits came from.
        logits: fp32 `[N, exits, classes]`.
        class_ids: int64 `[N]`.
        options: of every calibration; the seed differs.
        used: how many of the images each calibration sees.
        splits: how many calibrations.
    """
    macs = relative_macs(bundle)
    losses, costs = [], []
    for seed in trange(splits, desc="calibrating again", leave=False):
        order = np.random.default_rng(seed).permutation(len(logits))
        part, rest = order[:used], order[used:]
        result = calibrate(bundle, logits[part], class_ids[part], replace(options, seed=seed))
        loss, cost = _measure(result, logits[rest], class_ids[rest], macs)
        losses.append(loss)
        costs.append(cost)
    return Splits(np.array(losses), np.array(costs))


def _measure(
    result: Calibrated, logits: Tensor, class_ids: Tensor, macs: np.ndarray
) -> tuple[list[float], list[float]]:
    policy = result.policy
    fresh = outcomes_of(logits, class_ids, policy.calibrations, policy.measure)
    taken = [fresh.taken(point.thresholds) for point in policy.operating_points]
    return (
        [float(fresh.differences(t).mean()) for t in taken],
        [float(shares(t, fresh.exits) @ macs) for t in taken],
    )


def table(splits: Splits, delta: float, used: int, rest: int) -> Iterator[str]:
    """The splits for people."""
    count = len(splits.loss)
    yield f"{count} splits: calibrated on {used} images, measured on the other {rest}"
    yield "loss at most   mean loss   largest   mean MACs   splits over the bound"
    for i, (bound, over) in enumerate(zip(LOSSES, splits.violations(), strict=True)):
        loss, cost = splits.loss[:, i], splits.mean_macs[:, i]
        yield (
            f"{bound:12.2%} {loss.mean():11.2%} {loss.max():9.2%} {cost.mean():11.1%}   "
            f"{over} of {count}"
        )
    yield (
        f"the bound is on the accuracy lost over all images, with probability {1 - delta:.0%}; "
        f"{rest} images measure it with an error of their own, which counts here as well"
    )
