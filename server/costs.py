"""What a stage batch costs, measured at warm-up and kept up to date."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from functools import cache

PACE_RATE = 0.1
"""Weight of one batch in how fast the machine is now."""
LEARNING_RATE = 0.03
"""Weight of one batch in what its own size costs."""
OUTLIER = 3.0
"""A measurement counts for at most this many times what was expected, and at least the inverse."""


class CostTable:
    """Expected seconds of a batch, by stage and batch size.

    What else runs on the machine slows all stages and sizes alike. So a batch tells much about all
    of them, and little about its own alone: one that has not run since the machine was idle would
    else look cheap.

    Args:
        seconds: for each stage (1..E), measured seconds by batch size.
    """

    def __init__(self, seconds: Mapping[int, Mapping[int, float]]) -> None:
        self._rows: dict[int, tuple[list[int], list[float]]] = {}
        """By stage, sizes and their seconds: together, since other threads read them meanwhile."""
        self._teams: dict[int, float] = {}
        """By stage, what a lone image takes with a team of threads, as a share of the above."""
        self._pace = 1.0
        """What batches take now, as a multiple of what they were measured at."""
        for stage, row in seconds.items():
            self.replace(stage, row)

    @property
    def stages(self) -> int:
        """How many stages the table knows."""
        return len(self._rows)

    def seconds(self, stage: int, size: float, alone: bool = False) -> float:
        """Expected seconds of a batch of `size` images, which may be an expectation itself.

        Linear between measured sizes, proportional beyond the largest, constant below one.

        Args:
            stage: 1..E.
            size: how many images.
            alone: whether it is a lone image, which has a team of threads where there is one.
        """
        share = self._teams.get(stage, 1.0) if alone else 1.0
        return share * self._pace * self._measured(stage, size)

    def replace(self, stage: int, row: Mapping[int, float]) -> None:
        """Take new measurements of a stage: seconds by batch size."""
        sizes = sorted(row)
        self._rows[stage] = sizes, [row[size] for size in sizes]

    def use_team(self, stage: int, share: float) -> None:
        """Expect a lone image to take this share of what it takes with one thread."""
        self._teams[stage] = share

    def observe(self, stage: int, size: int, seconds: float, alone: bool = False) -> None:
        """Learn from a batch how fast the machine is, and what the sizes on both sides cost."""
        sizes, measured = self._rows[stage]
        ratio = seconds / self.seconds(stage, size, alone)
        ratio = min(OUTLIER, max(1 / OUTLIER, ratio))
        if alone and stage in self._teams:  # the machine is as likely to differ as the team
            half = 1 + PACE_RATE / 2 * (ratio - 1)
            self._teams[stage] *= half
            self._pace *= half
            return
        self._pace *= 1 + PACE_RATE * (ratio - 1)
        above = min(bisect_left(sizes, size), len(sizes) - 1)
        below = above if sizes[above] <= size else max(0, above - 1)
        for i in {below, above}:
            measured[i] *= 1 + LEARNING_RATE * (ratio - 1)

    def believe(self, stage: int, seconds: float) -> None:
        """Take a lone image's seconds for how fast the machine is by now, where it was faster than
        expected: what is expected was learned long ago."""
        self._pace *= min(1.0, seconds / self.seconds(stage, 1, alone=True))

    def as_rows(self) -> dict[int, dict[int, float]]:
        """The table as it stands: seconds by stage, then by batch size."""
        return {
            stage: {size: self._pace * seconds for size, seconds in zip(*row, strict=True)}
            for stage, row in self._rows.items()
        }

    def teams(self) -> dict[int, float]:
        """By stage, the shares that `use_team` was given, as they are by now."""
        return dict(self._teams)

    def _measured(self, stage: int, size: float) -> float:
        sizes, seconds = self._rows[stage]
        i = bisect_left(sizes, size)
        if i == 0:
            return seconds[0]
        if i == len(sizes):
            return seconds[-1] * size / sizes[-1]
        share = (size - sizes[i - 1]) / (sizes[i] - sizes[i - 1])
        return seconds[i - 1] + share * (seconds[i] - seconds[i - 1])


@cache
def batch_sizes(max_batch: int) -> tuple[int, ...]:
    """The sizes that are warmed, measured, compiled and offered, small to large.

    Powers of two, the sizes halfway between, and the largest: so a batch is padded by less than
    half, and by a fifth on average, where powers of two alone pad by twice as much.
    """
    powers = [2**i for i in range(max_batch.bit_length())]
    halfway = (3 * power // 2 for power in powers[1:])
    return tuple(sorted({s for s in (*powers, *halfway, max_batch) if s <= max_batch}))
