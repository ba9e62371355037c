"""Draws dashboards with matplotlib from what a real Prometheus answers, for documents.

python -m deploy.grafana.plot http://localhost:9090 docs/images --minutes 5
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from deploy.grafana.__main__ import DASHBOARDS
from deploy.grafana.panels import Dashboard, Kind, Panel
from deploy.reply import reply

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MultipleLocator

POINTS = 120
COLUMNS = 3
EXIT = "1"
"""Whose row is drawn, of the rows that repeat."""
UNITS = {
    "percentunit": (100, " %"),
    "s": (1000, " ms"),
    "bytes": (2**-20, " MiB"),
    "reqps": (1, "/s"),
}
"""Grafana's unit: by how much to multiply it, and what to call it then."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its name, its labels, its values at the asked times (NaN where there is none)."""

    name: str
    labels: dict[str, str]
    values: np.ndarray


@dataclass(frozen=True, slots=True)
class Source:
    """A Prometheus, and the span of time that is drawn."""

    url: str
    end: float
    seconds: float

    @property
    def step(self) -> float:
        """Seconds between two points."""
        return self.seconds / POINTS

    def series(self, expression: str, legend: str) -> list[Series]:
        """Ask for one query over the span."""
        asked = {"start": self.end - self.seconds, "end": self.end, "step": self.step}
        query = urllib.parse.urlencode({"query": concrete(expression), **asked})
        said = json.loads(reply(f"{self.url}/api/v1/query_range?{query}", timeout=30))
        result = said["data"]["result"]
        return [self._series(one, legend) for one in result]

    def _series(self, result: dict[str, Any], legend: str) -> Series:
        values = np.full(POINTS + 1, math.nan)
        for at, value in result["values"]:
            values[round((at - self.end + self.seconds) / self.step)] = float(value)
        labels = result["metric"]
        name = re.sub(r"\{\{(\w+)\}\}", lambda m: labels.get(m[1], ""), legend)
        return Series(name, labels, values)


def concrete(expression: str, window: str = "20s") -> str:
    """An expression with Grafana's variables filled in: all, but of the exits one."""
    expression = expression.replace("$__rate_interval", window).replace("$exit", EXIT)
    return re.sub(r"\$(instance|model)\b", ".+", expression.replace("$job", "offramp.*"))


def draw(dashboard: Dashboard, source: Source, file: Path) -> None:
    """Draw every panel of a dashboard into one picture."""
    rows = math.ceil(len(dashboard.panels) / COLUMNS)
    figure, grid = plt.subplots(
        rows, COLUMNS, figsize=(4.4 * COLUMNS, 2.7 * rows), layout="constrained"
    )
    for axes, panel in zip(grid.flat, dashboard.panels, strict=False):
        _draw(axes, panel, source)
    for axes in grid.flat[len(dashboard.panels) :]:
        axes.axis("off")
    figure.suptitle(dashboard.title, fontsize=11)
    figure.savefig(file, dpi=80)
    plt.close(figure)


def _draw(axes: Axes, panel: Panel, source: Source) -> None:
    factor, unit = UNITS.get(panel.unit, (1, ""))
    times = np.linspace(-source.seconds, 0, POINTS + 1)
    series = [s for q in panel.queries for s in source.series(q.expression, q.legend)]
    axes.set_title(panel.title.replace("$exit", EXIT), fontsize=9, loc="left")
    axes.tick_params(labelsize=7)
    axes.xaxis.set_major_locator(MultipleLocator(max(60, 60 * round(source.seconds / 300))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 60:g} min"))
    if panel.kind is Kind.HEAT:
        _draw_heat(axes, series, times, factor, unit)
        return
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.4g}{unit}"))
    _draw_lines(axes, panel.kind, series, times, factor)
    if panel.limit is not None:
        axes.axhline(factor * panel.limit, color="red", linestyle="--", linewidth=0.8)
    axes.set_ylim(0, factor * panel.top if panel.top else max(1.05 * axes.get_ylim()[1], 1e-3))
    if series:
        axes.legend(fontsize=6, loc="upper left", ncols=2, framealpha=0.6)


def _draw_lines(
    axes: Axes, kind: Kind, series: Sequence[Series], times: np.ndarray, factor: float
) -> None:
    if kind in (Kind.STACK, Kind.SHARES) and series:
        # Where a scrape saw the sum of an observation but not its count, a mean is infinite.
        values = factor * np.nan_to_num([s.values for s in series], posinf=0.0, neginf=0.0)
        if kind is Kind.SHARES:
            values = factor * values / np.maximum(values.sum(axis=0), 1e-12)
        axes.stackplot(times, values, labels=[s.name for s in series], alpha=0.7)
        return
    style = "steps-post" if kind is Kind.STEPS else "default"
    for one in series:
        axes.plot(times, factor * one.values, label=one.name, linewidth=1, drawstyle=style)


def _draw_heat(
    axes: Axes, series: Sequence[Series], times: np.ndarray, factor: float, unit: str
) -> None:
    if not series:
        return
    ordered = sorted(series, key=lambda s: float(s.labels["le"]))
    cumulative = np.nan_to_num([s.values for s in ordered])
    counts = np.maximum(np.diff(cumulative, axis=0, prepend=0), 0)
    used = [i for i, row in enumerate(counts) if row.max() > 0]
    rows = range(min(used, default=0), max(used, default=0) + 1)
    shown = np.sqrt(counts[list(rows)])  # so that rare ones show beside common ones
    axes.imshow(
        shown,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(times[0], times[-1], -0.5, len(rows) - 0.5),
    )
    names = [f"{factor * float(ordered[i].labels['le']):.4g}{unit}" for i in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=6)


def main(argv: list[str] | None = None) -> int:
    """Draw every dashboard."""
    arguments = _parser().parse_args(argv)
    source = Source(arguments.url.rstrip("/"), time.time(), 60 * arguments.minutes)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for dashboard in DASHBOARDS:
        try:
            draw(dashboard, source, arguments.folder / f"{dashboard.name}.png")
        except OSError as error:
            print(f"error: {source.url}: {error}", file=sys.stderr)
            return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deploy.grafana.plot", description=__doc__)
    parser.add_argument("url", help="of Prometheus")
    parser.add_argument("folder", type=Path, help="where DASHBOARD.png go")
    parser.add_argument("--minutes", type=float, default=5.0, help="how far back to look")
    return parser


if __name__ == "__main__":
    sys.exit(main())
