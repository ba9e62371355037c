"""When requests are sent."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

BURST_SECONDS = 1.0
"""Length of a burst, and of the calm before it."""
SWING_SECONDS = 2 * BURST_SECONDS
"""Of both together, over which the mean rate is kept."""
PEAK = 1.8
"""Rate in a burst, over the mean."""


def poisson(rate: float, seconds: float, seed: int = 0) -> list[float]:
    """Send times of a Poisson process of `rate` requests a second."""
    return list(_poisson(random.Random(seed), rate, 0.0, seconds))


def bursts(rate: float, seconds: float, peak: float = PEAK, seed: int = 0) -> list[float]:
    """Poisson sends whose rate swings between `peak` and 2 - `peak` times the mean `rate`.

    Over whole swings, of two seconds, the mean is kept; so `peak` is from 1 to 2.
    """
    chance, start, high = random.Random(seed), 0.0, False
    times: list[float] = []
    while start < seconds:
        end = min(seconds, start + BURST_SECONDS)
        factor = peak if high else 2 - peak
        times += _poisson(chance, factor * rate, start, end)
        start, high = end, not high
    return times


KINDS: dict[str, Callable[[float, float], list[float]]] = {"poisson": poisson, "bursts": bursts}
"""By name: a mean rate and a length to send times."""


def check_swings(seconds: float) -> None:
    """Raise ValueError unless a load of bursts keeps its mean rate."""
    if seconds < SWING_SECONDS or seconds % SWING_SECONDS:
        raise ValueError(
            f"--seconds must be a multiple of {SWING_SECONDS:g}, for bursts to keep their mean rate"
        )


def of_kind(kind: str, rate: float, seconds: float) -> list[float]:
    """Send times of the kind that has this name.

    Raises:
        ValueError: there would be none, or not so many a second.
    """
    if kind == "bursts":
        check_swings(seconds)
    times = KINDS[kind](rate, seconds)
    if not times:
        raise ValueError(
            f"at {rate:.3g} a second no request comes within {seconds:g} s; ask for longer loads "
            "with --seconds"
        )
    return times


def recorded(file: Path) -> list[float]:
    """Send times from a file with one a line, in seconds; shifted to start at zero.

    Raises:
        ValueError: a line is no such time, or there is none.
    """
    lines = enumerate(file.read_text().splitlines(), 1)
    times = sorted(_recorded(file, number, line.strip()) for number, line in lines if line.strip())
    if not times:
        raise ValueError(f"{file} has no send time")
    return [t - times[0] for t in times]


def length(times: Sequence[float]) -> float | None:
    """How long a recorded load lasts, in seconds: one mean gap longer than to its last request.

    So that the rate is that of the gaps. None where all requests come at once.
    """
    return times[-1] * len(times) / (len(times) - 1) if times[-1] else None


def _recorded(file: Path, number: int, line: str) -> float:
    try:
        time = float(line)
    except ValueError:
        time = math.nan
    if not 0 <= time < math.inf:
        raise ValueError(f"{file}, line {number}: {line[:40]!r} is no time in seconds")
    return time


def _poisson(chance: random.Random, rate: float, start: float, end: float) -> Iterator[float]:
    time = start
    while rate > 0:
        time += chance.expovariate(rate)
        if time >= end:
            return
        yield time
