"""Confidence measures side by side."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor
from tqdm import tqdm

from model.bundle import Bundle
from model.policy import Measure
from training.calibration import Options, relative_macs, search_part
from training.fit import fit_calibrations
from training.outcomes import outcomes_of, shares
from training.search import nested_path

FOLDS = 5
BOUNDS = (0.005, 0.01, 0.02)


def compare_measures(bundle: Bundle, logits: Tensor, class_ids: Tensor, options: Options) -> str:
    """Cross-validate every measure, with and without the ensemble, for people.

    Only the images that thresholds are chosen on take part, so picking a measure from this table
    leaves the certificate valid.
    """
    found = search_part(len(logits), options)
    logits, class_ids = logits[found], class_ids[found]
    macs = relative_macs(bundle)
    lines = ["measure       ensemble   full accuracy   mean MACs at a loss of 0.5, 1, 2 points"]
    variants = [(m, e) for m in Measure for e in (False, True)]
    for measure, ensemble in tqdm(variants, "comparing", leave=False, disable=None):
        variant = replace(options, measure=measure, ensemble=ensemble)
        accuracy, costs = _cross_validate(logits, class_ids, macs, variant)
        shown = "  ".join(f"{c:6.1%}" for c in costs)
        lines.append(f"{measure:14}{'yes' if ensemble else 'no':9}{accuracy:15.2%}   {shown}")
    return "\n".join(lines)


def _cross_validate(
    logits: Tensor, class_ids: Tensor, macs: np.ndarray, options: Options
) -> tuple[float, list[float]]:
    """Accuracy of the full network, and mean MACs at each loss, on images left out in turn."""
    right, lost, spent = [], [], []
    folds = np.array_split(np.random.default_rng(options.seed).permutation(len(logits)), FOLDS)
    for held in folds:
        kept = np.setdiff1d(np.arange(len(logits)), held)
        calibrations = fit_calibrations(
            logits[kept], class_ids[kept], options.measure, options.ensemble
        )
        judged = outcomes_of(logits, class_ids, calibrations, options.measure)
        path = nested_path(judged.pick(kept), macs)
        fresh = judged.pick(held)
        taken = [fresh.taken(thresholds) for thresholds in path]
        right.append(fresh.right[:, -1].mean())
        lost.append([fresh.differences(t).mean() for t in taken])
        spent.append([shares(t, fresh.exits) @ macs for t in taken])
    loss, cost = np.mean(lost, axis=0), np.mean(spent, axis=0)
    return float(np.mean(right)), [float(cost[loss <= bound].min()) for bound in BOUNDS]
