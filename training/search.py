"""Threshold vectors from the most careful to the boldest, each the cheapest for its loss."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from model.policy import NEVER
from training.outcomes import Outcomes

PRICES = np.geomspace(300, 0.3, 120)
"""What one lost answer is worth, in whole passes through the network."""
SWEEPS = 8


def nested_path(outcomes: Outcomes, costs: np.ndarray) -> list[tuple[float, ...]]:
    """Search thresholds for a sequence of prices and nest them.

    For a price, thresholds minimise mean cost + price * mean loss by exact coordinate descent:
    with the others fixed, an exit's best threshold is found by sorting the images that reach it.
    Falling prices give ever bolder vectors; a running minimum makes them nested, so that an image
    never leaves later further down the path. The first vector is the full network's.

    Args:
        outcomes: of the images set aside for the search.
        costs: float64 `[exits]`: cost of leaving at each exit, 1 at the deepest.
    """
    loss = expected_loss(outcomes)
    thresholds = np.full(outcomes.exits - 1, NEVER)
    path = [tuple(thresholds.tolist())]
    for price in tqdm(PRICES, "searching", leave=False):
        found = _descend(outcomes.confidence, costs + price * loss, thresholds)
        thresholds = np.minimum(thresholds, found)
        if tuple(thresholds.tolist()) != path[-1]:
            path.append(tuple(thresholds.tolist()))
    return path


def expected_loss(outcomes: Outcomes) -> np.ndarray:
    """Expected accuracy lost by each image at each exit: float64 `[N, exits]`."""
    return outcomes.right[:, -1:].astype(float) - outcomes.right


def _descend(confidence: np.ndarray, values: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Coordinate descent over thresholds until a sweep changes nothing."""
    thresholds = start.copy()
    for _ in range(SWEEPS):
        before = thresholds.copy()
        for k, staying in _downstream(confidence, values, thresholds):
            reached = (confidence[:, :k] < thresholds[:k]).all(axis=1)
            regret = values[reached, k] - staying[reached]
            thresholds[k] = _best_cut(confidence[reached, k], regret)
        if (thresholds == before).all():
            break
    return thresholds


def _downstream(
    confidence: np.ndarray, values: np.ndarray, thresholds: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Each exit but the deepest, deep to shallow, with the value `[N]` of not leaving there."""
    staying = values[:, -1]
    for k in range(len(thresholds) - 1, -1, -1):
        yield k, staying
        staying = np.where(confidence[:, k] >= thresholds[k], values[:, k], staying)


def _best_cut(confidence: np.ndarray, regret: np.ndarray) -> float:
    """The threshold above which the regrets `[N]` of leaving sum to the least."""
    if len(confidence) == 0:
        return NEVER
    order = np.argsort(-confidence, kind="stable")
    ranked, total = confidence[order], np.cumsum(regret[order])
    ends = np.append(ranked[1:] < ranked[:-1], True)  # equal confidences leave together
    total[~ends] = np.inf
    best = int(np.argmin(total))
    if total[best] >= 0:
        return NEVER
    if best == len(ranked) - 1:
        return 0.0
    return float(ranked[best] + ranked[best + 1]) / 2
