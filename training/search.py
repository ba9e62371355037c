"""Threshold vectors from the most careful to the boldest, each the cheapest for its loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from model.policy import NEVER, suffices
from training.outcomes import Outcomes

PRICES = np.geomspace(100, 0.3, 600)
"""What one lost answer is worth, in whole passes through the network."""
SWEEPS = 8
BETWEEN = 5
AT_FIRST = 50
"""Steps between an exit where no image leaves and the first thresholds found for it."""


def nested_path(outcomes: Outcomes, costs: np.ndarray) -> list[tuple[float, ...]]:
    """Search thresholds for a sequence of prices and nest them.

    For a price, thresholds minimise mean cost + price * mean loss by exact coordinate descent,
    from the vector before and from the full network: with the others fixed, an exit's best
    threshold is found by sorting the images that reach it.
    Falling prices give ever bolder vectors; a running minimum makes them nested, so that an image
    never leaves later further down the path. The first vector is the full network's.

    Args:
        outcomes: of the images set aside for the search.
        costs: float64 `[exits]`: cost of leaving at each exit, 1 at the deepest.

    Returns:
        The full network's thresholds, then one vector for each price.
    """
    loss = expected_loss(outcomes)
    order = np.argsort(-outcomes.confidence, axis=0, kind="stable")
    thresholds = np.full(outcomes.exits - 1, NEVER)
    path = [tuple(thresholds.tolist())]
    if outcomes.exits == 1:
        return path
    for price in tqdm(PRICES, "searching", leave=False, disable=None):
        values = costs + price * loss
        starts = (thresholds, np.full_like(thresholds, NEVER))
        ends = [_descend(outcomes.confidence, order, values, start) for start in starts]
        found = min(ends, key=lambda end: _mean_value(outcomes.confidence, values, end))
        thresholds = np.minimum(thresholds, found)
        path.append(tuple(thresholds.tolist()))
    return path


def fill(path: list[tuple[float, ...]], confidence: np.ndarray) -> list[tuple[float, ...]]:
    """Put thresholds between those that differ, so that bounds are met closely.

    With finitely many images, ever lower prices move the best thresholds in jumps. The first is the
    largest: the best thresholds of the highest price let many images leave already. So where an
    exit comes into use, ever more of the images that will leave there do, the surest first.

    Args:
        path: of `nested_path`.
        confidence: `[N, exits]`, of the images that the path was searched on.
    """
    filled = path[:1]
    for careful, bold in itertools.pairwise(dict.fromkeys(path)):
        new = (np.array(careful) == NEVER) & (np.array(bold) != NEVER)
        steps = AT_FIRST if new.any() else BETWEEN
        between = [
            _by_rank(confidence[:, k], bold[k], steps)
            if new[k]
            else np.linspace(careful[k], bold[k], steps + 1)[1:]
            for k in range(len(bold))
        ]
        filled += [tuple(step) for step in np.stack(between, axis=1).tolist()]
    return list(dict.fromkeys(filled))


def _by_rank(confidence: np.ndarray, threshold: float, steps: int) -> np.ndarray:
    """Falling thresholds down to this one, each of which as many more confidences reach."""
    reaching = -np.sort(-confidence[suffices(confidence, threshold)])
    ranks = np.ceil(np.arange(1, steps) / steps * len(reaching)).astype(int)
    return np.append(reaching[np.maximum(ranks, 1) - 1], threshold)


def budgeted_path(outcomes: Outcomes) -> list[tuple[float, ...]]:
    """Thresholds of the classical budgeted curve, from bold to careful.

    A share proportional to q**(k - 1) of the images is meant to leave at exit k, for a range of q,
    each exit taking the surest of those that reach it (Huang et al., "Multi-Scale Dense Networks",
    ICLR 2018, section 4). No loss is looked at.
    """
    path = []
    for q in np.geomspace(0.05, 20, 40):
        wanted = q ** np.arange(outcomes.exits)
        path.append(_quantiles(outcomes.confidence, wanted / wanted.sum()))
    return path


def _quantiles(confidence: np.ndarray, wanted: np.ndarray) -> tuple[float, ...]:
    thresholds: list[float] = []
    left = np.ones(len(confidence), dtype=bool)
    for k, share in enumerate(wanted[:-1]):
        reaching = np.sort(confidence[left, k])
        count = min(round(share * len(confidence)), len(reaching))
        thresholds.append(float(reaching[-count]) if count else NEVER)
        left &= ~suffices(confidence[:, k], thresholds[-1])
    return tuple(thresholds)


def expected_loss(outcomes: Outcomes) -> np.ndarray:
    """Expected accuracy lost by each image at each exit: float64 `[N, exits]`.

    By the full network's calibrated probabilities rather than by the labels: the same mean with
    less noise, so that fewer images suffice for the search.
    """
    return outcomes.belief[:, -1:] - outcomes.belief


def _descend(
    confidence: np.ndarray, order: np.ndarray, values: np.ndarray, start: np.ndarray
) -> np.ndarray:
    """Coordinate descent over thresholds until a sweep changes nothing."""
    thresholds = start.copy()
    for _ in range(SWEEPS):
        before = thresholds.copy()
        for k, staying in _downstream(confidence, values, thresholds):
            reached = ~suffices(confidence[:, :k], thresholds[:k]).any(axis=1)
            ranked = order[reached[order[:, k]], k]
            regret = values[ranked, k] - staying[ranked]
            thresholds[k] = _best_cut(confidence[ranked, k], regret)
        if (thresholds == before).all():
            break
    return thresholds


def _mean_value(confidence: np.ndarray, values: np.ndarray, thresholds: np.ndarray) -> float:
    *_, (_, below) = _downstream(confidence, values, thresholds)
    return float(np.where(suffices(confidence[:, 0], thresholds[0]), values[:, 0], below).mean())


def _downstream(
    confidence: np.ndarray, values: np.ndarray, thresholds: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Each exit but the deepest, deep to shallow, with the value `[N]` of not leaving there."""
    staying = values[:, -1]
    for k in range(len(thresholds) - 1, -1, -1):
        yield k, staying
        staying = np.where(suffices(confidence[:, k], thresholds[k]), values[:, k], staying)


def _best_cut(ranked: np.ndarray, regret: np.ndarray) -> float:
    """The threshold above which regrets of leaving sum to the least; surest first, both `[N]`."""
    if len(ranked) == 0:
        return NEVER
    total = np.cumsum(regret)
    ends = np.append(ranked[1:] < ranked[:-1], True)  # equal confidences leave together
    total[~ends] = np.inf
    best = int(np.argmin(total))
    if total[best] >= 0:
        return NEVER
    if best == len(ranked) - 1:
        return 0.0
    return float(ranked[best] + ranked[best + 1]) / 2
