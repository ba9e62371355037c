"""The words that dashboards are described in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

WINDOW = "$__rate_interval"
HERE = 'job=~"$job",instance=~"$instance"'
HERE_MODEL = HERE + ',model=~"$model"'


class Kind(StrEnum):
    """How a panel draws its series."""

    LINES = "lines"
    STACK = "stack"
    SHARES = "shares"
    """Stacked to a whole."""
    STEPS = "steps"
    HEAT = "heat"
    """Histogram buckets over time, colour for how many."""


@dataclass(frozen=True, slots=True)
class Query:
    """One expression, and what its series are called; `{{label}}` is filled in."""

    expression: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture.

    Args:
        title: two or three words.
        description: what it shows, then what to do when it looks wrong.
        unit: as Grafana names them.
        queries: what is drawn.
        limit: a value worth a dashed line.
        top: where the axis ends, if that is known.
        runbook: the alert that watches this.
    """

    title: str
    description: str
    unit: str
    queries: Sequence[Query]
    kind: Kind = Kind.LINES
    limit: float | None = None
    top: float | None = None
    runbook: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Panels side by side under one title.

    Args:
        title: of the row; `$exit` is filled in where it repeats.
        panels: left to right, all of the same width.
        repeat: the variable for each of whose values the row is shown.
    """

    title: str
    panels: Sequence[Panel]
    repeat: str | None = None


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One page.

    Args:
        name: of its file and its address.
        title: what people see.
        description: in one sentence.
        rows: top to bottom.
    """

    name: str
    title: str
    description: str
    rows: Sequence[Row]

    @property
    def panels(self) -> list[Panel]:
        """All of them, in reading order."""
        return [panel for row in self.rows for panel in row.panels]


def rate(
    metric: str,
    by: str = "",
    where: str = "",
    selector: str = HERE_MODEL,
) -> str:
    """How fast a counter grows, summed over all series but for the labels in `by`."""
    labels = f"{selector},{where}" if where else selector
    return f"sum by ({by}) (rate({metric}{{{labels}}}[{WINDOW}]))"


def quantile(q: float, histogram: str, by: str = "", selector: str = HERE_MODEL) -> str:
    """A quantile of a histogram, for each value of the labels in `by`."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, {rate(histogram + '_bucket', labels, selector=selector)})"
