"""Finite-sample tests of the accuracy that early exits lose.

Throughout, `n` independent images from the distribution that will be served are each answered
twice, early and by the full network. A *loss* is an image where only the full network is right, a
*gain* one where only the early answer is; with probabilities p+ and p-, the accuracy lost is
p+ - p-. No statement here is asymptotic; docs/calibration.md says which needs what.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats
from scipy.special import xlog1py, xlogy

STEP = 0.5
"""Between shares of images with differing answers that a paired test looks at: standard deviations
of that share in a sample, on whose scale the test's level is smooth."""
NEGLIGIBLE = 7.0
"""Standard deviations beyond which a binomial's terms are left out; they sum to less than 1e-11."""
LOWEST_SCORE = -8.0
FIRST_STEP = 1e-4
GROWTH = 1.2
"""Of the bounds that are tried above the one where bisection ended."""
ROUNDING = 1e-9
"""By which equal scores may differ."""


def losses_and_gains(differences: np.ndarray) -> tuple[int, int]:
    """Counts of both among differences `[N]` in {-1, 0, +1}, where +1 is a loss."""
    return int((differences > 0).sum()), int((differences < 0).sum())


def binomial_p_value(failures: int, n: int, bound: float) -> float:
    """Exact p-value of "the failure probability exceeds `bound`" after `failures` in `n`."""
    return float(stats.binom.cdf(failures, n, bound))


def hoeffding_bentkus_p_value(mean: float, n: int, bound: float) -> float:
    """P-value of "the expected loss exceeds `bound`" for any loss in 0..1 with this sample mean.

    The smaller of Hoeffding's bound in its relative-entropy form and Bentkus' (2004) bound, after
    Bates et al., "Distribution-Free, Risk-Controlling Prediction Sets" (JACM 2021), section 3.1.
    """
    if bound >= 1 or mean >= bound:
        return float(bound < 1)
    entropy = _entropy_term(mean, bound) + _entropy_term(1 - mean, 1 - bound)
    bentkus = math.e * stats.binom.cdf(math.ceil(n * mean - 1e-9), n, bound)
    return float(min(1.0, math.exp(-n * entropy), bentkus))


def paired_p_value(losses: int, gains: int, n: int, bound: float) -> float:
    """P-value of "the accuracy lost, p+ - p-, exceeds `bound`", from exact probabilities.

    The statistic is the score Z of `paired_score`: how far losses - gains falls below n * bound, in
    standard deviations. Its law under p+ - p- = bound still depends on v = p+ + p-, the share of
    images where the two answers differ in being right, so the largest probability over all v
    counts, as in Barnard's test (Biometrika 1947):

    1. Of n images, m ~ Bin(n, v) differ, and of these Bin(m, (1 + bound / v) / 2) are losses.
    2. For a given m, Z rises with the losses. So Z <= z means "at most l(m) losses", and
       P(Z <= z) = sum over m of P(m) P(at most l(m) losses): the level at v.
    3. A larger p+ - p- at the same v only makes losses likelier, hence Z <= z rarer. So no
       distribution under the hypothesis has a higher level than the worst v at its edge. (One with
       v < -bound has no edge at its v; its level is below that of v = -bound, all gains.)
    4. Levels are computed on a grid of v from |bound| to 1, as dense as the width of Bin(n, v),
       which smooths them. Between neighbours they move little, since Z is scaled so that its law
       hardly depends on v; as much as they move is added.

    Args:
        losses, gains: counts among the `n` images.
        n: how many images.
        bound: accuracy lost under the hypothesis, in -1..1, both excluded.
    """
    return _worst_level(float(paired_score(losses, gains, n, bound)), n, bound)


def paired_upper_bound(losses: int, gains: int, n: int, delta: float) -> float:
    """The accuracy lost is at most this with probability 1 - delta; negative is a gain."""
    return upper_bound(lambda b: paired_p_value(losses, gains, n, b), delta, low=-1.0)


def paired_score(losses: ArrayLike, gains: ArrayLike, n: int, bound: float) -> np.ndarray:
    """Tango's score for paired proportions (Statistics in Medicine 1998): float64, shaped alike.

    losses - gains - n * bound over its standard deviation, for the likeliest p- given that
    p+ - p- = bound: the larger root of 2n p-^2 - b p- - gains * bound * (1 - bound) = 0.
    """
    losses, gains = np.asarray(losses, dtype=float), np.asarray(gains, dtype=float)
    b = losses * (1 + bound) + gains * (1 - bound) - 2 * n * bound
    minus = (b + np.sqrt(np.maximum(0.0, b * b + 8 * n * gains * bound * (1 - bound)))) / (4 * n)
    variance = 2 * np.maximum(minus, max(0.0, -bound)) + bound - bound * bound
    return (losses - gains - n * bound) / np.sqrt(n * np.maximum(variance, 1 / n**2))


@lru_cache(maxsize=256)
def critical_score(n: int, bound: float, delta: float) -> float:
    """Scores up to this are rejected at `delta`: the p-value rises with the score.

    Found once, to 0.002 below, so that a long path of thresholds is tested by comparing scores.
    """
    low, high = LOWEST_SCORE, 0.0
    while high - low > 2e-3:
        middle = (low + high) / 2
        rejected = _worst_level(middle, n, bound) <= delta
        low, high = (middle, high) if rejected else (low, middle)
    return low if low > LOWEST_SCORE else -math.inf


def paired_powers(
    losses: np.ndarray, gains: np.ndarray, n: int, bound: float, delta: float
) -> np.ndarray:
    """How likely n images reject "more than `bound` is lost" at delta, by the paired test.

    Args:
        losses, gains: float64 `[K]`, the probabilities p+ and p- of K answers.
        n: how many images.
        bound: accuracy lost under the hypothesis.
        delta: the level of the test.
    """
    most = _most_losses(critical_score(n, bound, delta), n, bound)
    pairs = zip((losses + gains).tolist(), losses.tolist(), strict=True)
    return np.array([_rejected(most, n, v, p / v if v else 0.5) for v, p in pairs])


def _worst_level(score: float, n: int, bound: float) -> float:
    """The largest P(Z <= score) over the shares v that a bound leaves possible."""
    most = _most_losses(score, n, bound)
    angles = np.append(np.arange(0.0, math.pi / 2, STEP / (2 * math.sqrt(n))), math.pi / 2)
    shares = np.minimum(1.0, abs(bound) + (1 - abs(bound)) * np.sin(angles) ** 2)
    levels = np.array([_rejected(most, n, v, (1 + bound / v) / 2 if v else 0.5) for v in shares])
    between = np.maximum(levels[1:], levels[:-1]) + np.abs(np.diff(levels))
    return float(min(1.0, between.max()))


def _most_losses(score: float, n: int, bound: float) -> np.ndarray:
    """For each m = 0..n, the most losses among m differing images with Z <= score, or -1."""
    m = np.arange(n + 1)
    low, high = np.full(n + 1, -1), m.copy()  # Z at `low` is at most the score, or low is -1
    while (low < high).any():
        middle = (low + high + 1) // 2
        tried = np.maximum(middle, 0)
        below = paired_score(tried, m - tried, n, bound) <= score + ROUNDING
        low, high = np.where(below, middle, low), np.where(below, high, middle - 1)
    return low


def _rejected(most: np.ndarray, n: int, v: float, lost: float) -> float:
    """P(at most `most[m]` losses), summed over the likely m of n images that differ.

    Args:
        most: of `_most_losses`.
        n: how many images.
        v: probability that an image differs.
        lost: probability that one which differs is a loss.
    """
    spread = NEGLIGIBLE * math.sqrt(n * v * max(0.0, 1 - v)) + NEGLIGIBLE**2
    m = np.arange(max(0, math.floor(n * v - spread)), min(n, math.ceil(n * v + spread)) + 1)
    at_most = np.where(most[m] < 0, 0.0, special.bdtr(np.maximum(most[m], 0), m, lost))
    return float(np.exp(_log_choose(n)[m] + xlogy(m, v) + xlog1py(n - m, -v)) @ at_most)


@lru_cache(maxsize=4)
def _log_choose(n: int) -> np.ndarray:
    m = np.arange(n + 1)
    return special.gammaln(n + 1) - special.gammaln(m + 1) - special.gammaln(n - m + 1)


def upper_bound(p_value: Callable[[float], float], delta: float, low: float = 0.0) -> float:
    """The risk is at most this with probability 1 - delta: a bound above all that are not rejected.

    P-values fall as the bound rises, but for bumps, mostly where it is about 0 and images are few.
    So bisection, to 1e-5, may end below a bound that is not rejected; from there bounds are tried
    upwards until a p-value is half of delta, and the answer is the one after the last that is not
    rejected. A bump that lies wholly between two of those that are tried would go unnoticed.

    Args:
        p_value: of "the risk exceeds this bound".
        delta: the level of the test.
        low: the least that the risk can be.
    """
    high = 1.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (low, middle) if p_value(middle) <= delta else (middle, high)
    tried = list(_upwards(p_value, delta / 2, high))
    beyond = 1 + max((i for i, (_, p) in enumerate(tried) if p > delta), default=-1)
    return tried[beyond][0]


def _upwards(
    p_value: Callable[[float], float], least: float, bound: float
) -> Iterator[tuple[float, float]]:
    """Bounds with their p-values, until one is at most `least`, as that of 1 is."""
    step = FIRST_STEP
    while bound < 1:
        p = p_value(bound)
        yield bound, p
        if p <= least:
            return
        bound, step = bound + step, step * GROWTH
    yield 1.0, 0.0


def fixed_sequence(rejected: Iterable[bool]) -> int:
    """How many hypotheses are rejected from the start of a sequence fixed in advance.

    Each is tested at the whole delta, and testing ends at the first that is not rejected, so any
    false rejection has probability at most delta (Angelopoulos et al., "Learn then Test", 2021).
    """
    return sum(1 for _ in itertools.takewhile(bool, rejected))


def conformal_risk_control(ever_lost: np.ndarray, n: int, bound: float) -> int:
    """The last step of a nested sequence that keeps the *expected* loss at or under `bound`.

    The theorem demands a loss that never falls along the sequence (Angelopoulos et al., "Conformal
    Risk Control", ICLR 2024), so an image counts from the first step that loses it, even where a
    bolder step would answer it right; what is really lost is at most that. The expectation is over
    calibration sets as well, so this is weaker than, and not to be confused with, a statement that
    holds with probability 1 - delta.

    Args:
        ever_lost: `[steps]`, how many images a step or a safer one lost; step 0 is the full
            network and loses none.
        n: how many images.
        bound: on the expected loss, in 0..1.

    Returns:
        0 where no step can be allowed.
    """
    allowed = np.count_nonzero((ever_lost + 1) / (n + 1) <= bound)
    return max(0, int(allowed) - 1)


def images_needed(rejects: Callable[[int], bool]) -> int:
    """The fewest images at which a policy that never lost one would be certified.

    Args:
        rejects: the hypothesis for such a policy, by number of images; from some number on always.
    """
    high = 1
    while not rejects(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if rejects(middle) else (middle, high)
    return high


def _entropy_term(a: float, b: float) -> float:
    return 0.0 if a == 0 else a * math.log(a / b)
