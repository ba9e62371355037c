"""Finite-sample tests of the accuracy that early exits lose.

Throughout, `n` independent images from the distribution that will be served are each answered
twice, early and by the full network. A *loss* is an image where only the full network is right, a
*gain* one where only the early answer is; with probabilities p+ and p-, the accuracy lost is
p+ - p-. No statement here is asymptotic; docs/calibration.md says which needs what.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
from scipy import stats

NUISANCE_SHARE = 0.05
"""Share of delta spent on bounding how often the two answers differ in being right."""
NEGLIGIBLE = 1e-13
"""Probability of the terms that a sum may leave out at either end; it is added back."""


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


def paired_p_value(losses: int, gains: int, n: int, bound: float, nuisance: float) -> float:
    """Exact p-value of "the accuracy lost, p+ - p-, exceeds `bound`".

    The statistic is s = losses - gains, a sum of n values in {-1, 0, +1}. Its law under
    p+ - p- = bound still depends on v = p+ + p-, which is bounded first (Berger and Boos, "P values
    maximized over a confidence set for the nuisance parameter", JASA 1994):

    1. v <= V except with probability `nuisance` (Clopper-Pearson on losses + gains).
    2. For v <= 1/2 each value plus one is a sum of two independent Bernoullis with means q, q' the
       roots of q + q' = 1 + bound, q q' = (v + bound) / 2. So n + s is Bin(n, q) + Bin(n, q').
    3. d/dv P(s' <= s) = n/2 (P(t = s + 1) - P(t = s)) with t the sum of n - 1 values. By 2., t is
       unimodal with a mode above its mean minus one (Darroch 1964), so P(s' <= s) rises in v as
       long as s <= (n - 1) bound - 2; beyond that we return 1. Its maximum is therefore at V.
    4. A larger p+ - p- only makes small s rarer. Hence p = P(s' <= s at V) + nuisance is valid.
       (Since v >= |p+ - p-|, V is raised to -bound where that is larger.)

    Args:
        losses, gains: counts among the `n` images.
        n: how many images.
        bound: accuracy lost under the hypothesis, in -1..1.
        nuisance: probability spent on step 1; the p-value is never below it.
    """
    s = losses - gains
    most = clopper_pearson_upper(losses + gains, n, nuisance)
    if max(most, -bound) > 0.5 or s > (n - 1) * bound - 2:
        return 1.0
    if most <= bound:  # answers that differ so rarely cannot lose as much
        return nuisance
    most = max(most, -bound)
    root = math.sqrt(1 + bound * bound - 2 * most)
    high, low = (1 + bound + root) / 2, (1 + bound - root) / 2
    first, last = stats.binom.ppf(NEGLIGIBLE, n, low), stats.binom.isf(NEGLIGIBLE, n, low)
    ones = np.arange(first, last + 1)
    tail = stats.binom.pmf(ones, n, low) @ stats.binom.cdf(n + s - ones, n, high)
    return min(1.0, float(tail) + 2 * NEGLIGIBLE + nuisance)


def clopper_pearson_upper(successes: int, n: int, delta: float) -> float:
    """The probability that exceeds the true one with probability at least 1 - `delta`."""
    return 1.0 if successes >= n else float(stats.beta.ppf(1 - delta, successes + 1, n - successes))


def upper_bound(p_value: Callable[[float], float], delta: float, low: float = 0.0) -> float:
    """The risk is at most this, with probability at least 1 - `delta`.

    Args:
        p_value: of "the risk exceeds this bound", falling in the bound.
        delta: the level at which bounds are rejected, by bisection to 1e-5.
        low: the least that the risk can be.
    """
    high = 1.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (low, middle) if p_value(middle) <= delta else (middle, high)
    return high


def fixed_sequence(p_values: Iterable[float], delta: float) -> int:
    """How many hypotheses are rejected from the start of a sequence fixed in advance.

    Each is tested at the whole `delta`, and testing ends at the first that is not rejected, so any
    false rejection has probability at most `delta` (Angelopoulos et al., "Learn then Test", 2021).
    """
    rejected = 0
    for p in p_values:
        if p > delta:
            break
        rejected += 1
    return rejected


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


def images_needed(p_value: Callable[[int], float], delta: float) -> int:
    """The fewest images at which a policy that never lost one would be certified.

    Args:
        p_value: of such a policy, by number of images; falling to 0.
        delta: the level.
    """
    high = 1
    while p_value(high) > delta:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if p_value(middle) <= delta else (middle, high)
    return high


def _entropy_term(a: float, b: float) -> float:
    return 0.0 if a == 0 else a * math.log(a / b)
