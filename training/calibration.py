"""Calibration: fit and search on one part of the images, certify on the other."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.bundle import Bundle
from model.policy import Calibration, Measure, OperatingPoint, Policy
from training.data import DataError
from training.fit import fit_calibrations
from training.ladder import Certifier, Method, Thresholds, ladder, operating_point
from training.outcomes import Outcomes, outcomes_of, shares
from training.search import budgeted_path, fill, nested_path
from training.start import first_steps

LEAST_IMAGES = 100
LEAST_PART = 25
"""Of these, to choose on and to certify on."""
MOST_SEARCHED = 20_000
"""Thresholds hardly improve beyond; the images serve the certificate better."""


@dataclass(frozen=True, slots=True)
class Options:
    """What decides a calibration, besides bundle and images."""

    measure: Measure = Measure.MARGIN
    ensemble: bool = True
    method: Method = Method.PAIRED
    delta: float = 0.1
    search_share: float = 0.25
    mean_macs: float | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A policy with what led to it."""

    policy: Policy
    certifier: Certifier
    """Of the first numerics."""
    tested: np.ndarray
    """Indices of the images that had no part in choosing anything."""
    path: list[Thresholds]
    """The nested thresholds that were tested, full network first."""
    budgeted: list[Thresholds]
    """Thresholds of the classical budgeted curve, for comparison."""
    labelled: bool
    """Whether the images had labels; without them what is measured is disagreement."""


def calibrate(
    bundle: Bundle,
    logits: Tensor,
    class_ids: Tensor | None,
    options: Options,
    costs: np.ndarray | None = None,
    others: Sequence[Tensor] = (),
) -> Calibrated:
    """Make a policy.

    Args:
        bundle: what the logits came from; without labels, its policy gives the confidences.
        logits: fp32 `[N, exits, classes]`.
        class_ids: int64 `[N]`, or None where there are no labels.
        options: what to calibrate.
        costs: `[exits]`, what the search saves; MACs by default.
        others: the same images' logits in other numerics that may serve. Thresholds are chosen
            without them; every bound is certified for each of them as well.

    Raises:
        DataError: too few images, or a label-free calibration that is impossible.
    """
    n = len(logits)
    found = search_part(n, options)
    tested = np.setdiff1d(np.arange(n), found)
    calibrations, measure = _confidences(bundle, logits, class_ids, found, options)
    outcomes, *elsewhere = (
        _outcomes(each, class_ids, calibrations, measure, options) for each in (logits, *others)
    )
    macs = relative_macs(bundle)
    searched = outcomes.pick(found)
    nested = nested_path(searched, macs if costs is None else costs / costs[-1])
    path = fill(nested, searched.confidence)
    first = first_steps(path, searched, len(tested), options.method, options.delta)
    certifiers = [
        Certifier(each.pick(tested), options.delta, options.method)
        for each in (outcomes, *elsewhere)
    ]
    everything = outcomes
    if class_ids is not None:  # what is measured is accuracy, whatever is certified
        everything = outcomes_of(logits, class_ids, calibrations, measure)
    points = ladder(certifiers, path, everything, macs, first)
    if (budget := options.mean_macs) is not None:
        thresholds = within_budget(searched, path, macs, budget)
        points = _with_budget(points, certifiers, thresholds, everything, macs, budget)
    policy = Policy(
        weights_sha256=bundle.description.weights_sha256,
        method=options.method,
        delta=options.delta,
        calibration_images=n,
        measure=measure,
        calibrations=tuple(calibrations),
        operating_points=points,
    )
    return Calibrated(
        policy, certifiers[0], tested, path, budgeted_path(searched), class_ids is not None
    )


def relative_macs(bundle: Bundle) -> np.ndarray:
    """MACs to leave at each exit, as shares of the full network's: float64 `[exits]`."""
    macs = np.array([e.macs for e in bundle.description.exits], dtype=float)
    return macs / macs[-1]


def search_part(n: int, options: Options) -> np.ndarray:
    """Which of `n` images everything is chosen on; all others certify it.

    Raises:
        DataError: there are too few images, or too few for one of the two.
    """
    if n < LEAST_IMAGES:
        raise DataError(f"{n} images are too few to calibrate on; take at least {LEAST_IMAGES}")
    count = min(round(options.search_share * n), MOST_SEARCHED)
    if min(count, n - count) < LEAST_PART:
        raise DataError(
            f"a search share of {options.search_share:g} leaves {count} of {n} images to choose on "
            f"and {n - count} to certify on; each takes at least {LEAST_PART}"
        )
    return np.sort(np.random.default_rng(options.seed).permutation(n)[:count])


def within_budget(
    outcomes: Outcomes, path: list[Thresholds], macs: np.ndarray, budget: float
) -> Thresholds:
    """The most careful thresholds on the path whose mean MACs are at most this share.

    Raises:
        DataError: even the boldest cost more.
    """
    for thresholds in path:
        cost = shares(outcomes.taken(thresholds), outcomes.exits) @ macs
        if cost <= budget:
            return thresholds
    raise DataError(f"mean MACs of {budget:g} are out of reach; {cost:.3f} is the least")


def budget_point(
    certifiers: Sequence[Certifier],
    thresholds: Thresholds,
    outcomes: Outcomes,
    macs: np.ndarray,
    taken: Container[float] = (),
) -> OperatingPoint:
    """Thresholds fixed by their cost, with the smallest loss that can be certified for them.

    Where that is one of the bounds `taken`, the next free one, 0.01 points up: other thresholds
    were certified for it, and a bound that either of two tests may give fails with either.
    """
    bound = math.ceil(1e4 * max(c.upper_bound(thresholds) for c in certifiers)) / 1e4
    while bound in taken:
        bound = round(bound + 1e-4, 4)
    return operating_point(bound, thresholds, outcomes, macs, certifiers[0].in_probability)


def _with_budget(
    points: tuple[OperatingPoint, ...],
    certifiers: Sequence[Certifier],
    thresholds: Thresholds,
    outcomes: Outcomes,
    macs: np.ndarray,
    budget: float,
) -> tuple[OperatingPoint, ...]:
    """The ladder with the point of a budget at its place, under a bound of its own."""
    taken = [p.max_accuracy_loss for p in points]
    added = budget_point(certifiers, thresholds, outcomes, macs, taken)
    added = added.model_copy(update={"budget": budget})
    return tuple(sorted((*points, added), key=lambda p: p.max_accuracy_loss))


def _outcomes(
    logits: Tensor,
    class_ids: Tensor | None,
    calibrations: list[Calibration],
    measure: Measure,
    options: Options,
) -> Outcomes:
    labels = torch.zeros(len(logits), dtype=torch.int64) if class_ids is None else class_ids
    outcomes = outcomes_of(logits, labels, calibrations, measure)
    by_agreement = options.method is Method.DISAGREEMENT
    return outcomes.against_full_network() if by_agreement else outcomes


def _confidences(
    bundle: Bundle,
    logits: Tensor,
    class_ids: Tensor | None,
    found: np.ndarray,
    options: Options,
) -> tuple[list[Calibration], Measure]:
    if class_ids is not None:
        fitted = fit_calibrations(
            logits[found], class_ids[found], options.measure, options.ensemble
        )
        return fitted, options.measure
    if options.method is not Method.DISAGREEMENT:
        raise DataError("images without labels can only be calibrated with --method disagreement")
    if bundle.policy is None:
        raise DataError(
            f"{bundle.path} has no policy to take confidences from; calibrate it on labelled "
            "images once, then on images without labels"
        )
    return list(bundle.policy.calibrations), bundle.policy.measure
