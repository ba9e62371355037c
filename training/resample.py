"""The resample command: whether certified bounds hold, calibrating again and again."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model.bundle import Bundle, load_bundle
from training import risk
from training.calibrate import (
    add_numerics,
    cache_folder,
    calibration_listing,
    check_classes,
    chosen_dtype,
    is_labelled,
    load_images,
    share,
)
from training.calibration import LEAST_PART, Options, calibrate, relative_macs
from training.data import DataError
from training.ladder import LOSSES, promise
from training.logits import cached_logits
from training.outcomes import outcomes_of, shares
from training.seen import seen_by


@dataclass(frozen=True, slots=True)
class Splits:
    """What calibrations on random parts of one set of images did on the rest of it."""

    loss: np.ndarray
    """float64 `[splits, bounds]`: accuracy lost on the images measured."""
    mean_macs: np.ndarray
    """float64 `[splits, bounds]`: on the same, as a share of the full network's."""
    beyond_chance: np.ndarray
    """bool `[splits, bounds]`: whether the images measured refute the bound, at delta."""

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
    command.add_argument(
        "--as-population",
        action="store_true",
        help="draw the images to calibrate on with replacement and measure on all images: these "
        "then are all there is, so that the measure has no error",
    )
    command.add_argument("--delta", type=share, default=Options().delta, help="chance of failing")
    add_numerics(command)
    command.set_defaults(run=_resample)


def _resample(arguments: argparse.Namespace) -> None:
    if not is_labelled(arguments.data) or arguments.splits < 1:
        raise DataError("resampling needs labelled images in class folders, and --splits above 0")
    bundle = load_bundle(arguments.bundle, with_policy=False)
    listing = calibration_listing(arguments.data, seen_by(bundle))
    check_classes(bundle, listing.classes)
    images = load_images(bundle, listing)
    dtype = chosen_dtype(arguments.dtype)
    if dtype is torch.int8:
        raise DataError("resampling cannot be done in int8, whose ranges are a calibration's own")
    n, options = len(images), Options(delta=arguments.delta)
    used = round(arguments.calibrate_share * n)
    if n - used < LEAST_PART and not arguments.as_population:
        raise DataError(
            f"--calibrate-share {arguments.calibrate_share:g} leaves {n - used} of {n} images to "
            f"measure on; it takes at least {LEAST_PART}"
        )
    logits = cached_logits(bundle, images, dtype, cache_folder(arguments))
    drawn = draw(n, used, arguments.splits, arguments.as_population)
    splits = resample(bundle, logits, images.class_ids, options, drawn)
    print(f"as calibrate does by itself: method {options.method}, measure {options.measure}")
    for line in table(splits, used, len(drawn[0][1]), not arguments.as_population):
        print(line)
    if not arguments.as_population:
        print(
            "the bound is on the accuracy lost over all images, "
            f"{promise(options.method, options.delta)}; the images that measure it add an error of "
            "their own, which counts here as well (--as-population leaves it out); beyond chance "
            "are those whose loss that error does not explain"
        )


def draw(
    n: int, used: int, splits: int, as_population: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each split, the images to calibrate on with those to measure on.

    Args:
        n: how many images there are.
        used: how many each calibration sees.
        splits: how many calibrations.
        as_population: draw with replacement and measure on all, instead of on the rest.
    """
    drawn = []
    for seed in range(splits):
        rng = np.random.default_rng([1, seed])  # not what each calibration chooses its parts by
        if as_population:
            drawn.append((rng.integers(0, n, used), np.arange(n)))
        else:
            order = rng.permutation(n)
            drawn.append((order[:used], order[used:]))
    return drawn


def resample(
    bundle: Bundle,
    logits: Tensor,
    class_ids: Tensor,
    options: Options,
    drawn: Sequence[tuple[np.ndarray, np.ndarray]],
) -> Splits:
    """Calibrate and measure for each split.

    Args:
        bundle: what the logits came from.
        logits: fp32 `[N, exits, classes]`.
        class_ids: int64 `[N]`.
        options: of every calibration; the seed differs.
        drawn: what `draw` returned.
    """
    macs = relative_macs(bundle)
    losses, costs, beyond = [], [], []
    for seed, (part, rest) in enumerate(
        tqdm(drawn, "calibrating again", leave=False, disable=None)
    ):
        result = calibrate(bundle, logits[part], class_ids[part], replace(options, seed=seed))
        policy = result.policy
        fresh = outcomes_of(logits[rest], class_ids[rest], policy.calibrations, policy.measure)
        taken = [fresh.taken(point.thresholds) for point in policy.operating_points]
        losses.append([fresh.differences(t).mean() for t in taken])
        costs.append([shares(t, fresh.exits) @ macs for t in taken])
        beyond.append(
            [
                _shows_more(fresh.differences(t), bound, options.delta)
                for t, bound in zip(taken, LOSSES, strict=True)
            ]
        )
    return Splits(np.array(losses), np.array(costs), np.array(beyond))


def _shows_more(differences: np.ndarray, bound: float, delta: float) -> bool:
    """Whether differences `[N]` in {-1, 0, +1} refute "at most `bound` is lost" at `delta`."""
    (losses, gains), n = risk.losses_and_gains(differences), len(differences)
    gained = risk.paired_score(gains, losses, n, -bound)
    return bool(gained <= risk.critical_score(n, -bound, delta))


def table(splits: Splits, used: int, measured: int, sampled: bool) -> Iterator[str]:
    """The splits for people; `sampled` where the images that measure are not all there are."""
    count = len(splits.loss)
    yield f"{count} splits: calibrated on {used} images, measured on {measured}"
    heads = "loss at most   mean loss   largest   mean MACs   splits over the bound"
    yield heads + "   beyond chance" * sampled
    rows = zip(LOSSES, splits.violations(), splits.beyond_chance.sum(axis=0), strict=True)
    for i, (bound, over, beyond) in enumerate(rows):
        loss, cost = splits.loss[:, i], splits.mean_macs[:, i]
        said = f"{bound:12.2%} {loss.mean():11.2%} {loss.max():9.2%} {cost.mean():11.1%}   "
        said += f"{f'{over} of {count}':21}"
        yield (said + f"   {beyond} of {count}" * sampled).rstrip()
