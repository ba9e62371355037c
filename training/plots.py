"""The report's plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.evaluation import CurvePoint, PointResult, Report

PUBLISHED = {
    "BoostNet (2023)": [(25, 70.0), (52, 74.2), (74, 75.9), (100, 76.5)],
    "self-distilled ResNet-18 (reproduced)": [(165, 75.5), (308, 78.5), (448, 80.5), (582, 80.7)],
}
"""CIFAR-100 accuracy in % by mean MACs in millions, as published or reproduced by others."""

DPI = 120

CLASSES_SHOWN = 12
"""Of those that leave earliest, and of those that leave latest."""

NEAR = 1.1
"""Two labels abreast meet where the compute of their operating points differs by less than this."""


def draw_all(report: Report, published: bool, folder: Path) -> list[str]:
    """Write every plot, returning the file names.

    Args:
        report: what to draw.
        published: whether the data is the one that `PUBLISHED` speaks of.
        folder: where to write.
    """
    plots: dict[str, Callable[[], Figure]] = {
        "accuracy_over_cost.png": lambda: accuracy_over_cost(report, published),
        "reliability.png": lambda: reliability(report),
        "exit_shares.png": lambda: exit_shares(report),
        "class_shares.png": lambda: class_shares(report),
    }
    for name, draw in plots.items():
        draw().savefig(folder / name, dpi=DPI)
    return list(plots)


def colours(exits: int) -> list[tuple[float, float, float, float]]:
    """One colour for each exit, light to dark from shallow to deep."""
    return [colormaps["viridis"](x) for x in np.linspace(0.9, 0.15, exits)]


def accuracy_over_cost(report: Report, published: bool) -> Figure:
    """Static exits, the ladder, the searched and the budgeted curve, and what others published."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    full = report.exits[-1].macs / 1e6
    _curve(axes, report.budgeted, full, color="0.6", ls="--", label="budgeted, as MSDNet")
    _curve(axes, report.path, full, color="tab:blue", label="Offramp, searched thresholds")
    axes.plot(
        [p.mean_macs * full for p in report.operating_points],
        [100 * p.accuracy for p in report.operating_points],
        "o",
        color="tab:blue",
        label="Offramp, operating points (points of accuracy lost at most)",
    )
    _name_points(axes, [p for p in report.operating_points if p.mean_macs < 1], full)
    static = [(e.macs / 1e6, 100 * e.accuracy) for e in report.exits]
    axes.plot(*zip(*static, strict=True), "s:", color="tab:orange", label="every image at one exit")
    if published:
        draw_published(axes)
    axes.axhline(100 * report.exits[-1].accuracy, color="0.8", lw=1, zorder=0)
    shown, whole = report.point_shown, report.exits[-1].accuracy
    axes.set_title(
        f"{shown.accuracy:.1%} right with {shown.mean_macs:.0%} of the compute; "
        f"{whole:.1%} with all of it",
        fontsize=11,
    )
    if published:
        axes.set_xscale("log")
        ticks = [25, 50, 100, 200, 400]
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
    axes.set(xlabel="mean multiply-accumulates an image, millions", ylabel="test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    return figure


def draw_published(axes: Axes) -> None:
    """The curves of `PUBLISHED`, each with a marker of its own."""
    for (name, points), marker in zip(PUBLISHED.items(), "^v", strict=True):
        axes.plot(*zip(*points, strict=True), f"{marker}-", color="0.4", lw=1, label=name)


def _name_points(axes: Axes, points: Sequence[PointResult], full: float) -> None:
    """Write each bound above the curve; where it would meet the last, higher or below the curve."""
    cheaper, below = 0.0, False
    for p in sorted(points, key=lambda p: p.mean_macs):
        apart = p.mean_macs / cheaper if cheaper else math.inf
        high = NEAR <= apart < NEAR**1.5 and not below
        below = apart < NEAR and not below
        cheaper = p.mean_macs
        axes.annotate(
            f"≤ {100 * p.max_accuracy_loss:g}",
            (p.mean_macs * full, 100 * p.accuracy),
            (5, -11) if below else (-4, 12 if high else 5),
            textcoords="offset points",
            ha="left" if below else "right",
            fontsize=7,
        )


def _curve(axes: Axes, points: Sequence[CurvePoint], full: float, **style: Any) -> None:
    ordered = sorted((p.mean_macs * full, 100 * p.accuracy) for p in points)
    if ordered:
        axes.plot(*zip(*ordered, strict=True), lw=1.5, **style)


def reliability(report: Report) -> Figure:
    """A reliability diagram for each exit, with the images in each bin below."""
    exits = len(report.exits)
    figure = Figure(figsize=(2.9 * exits + 0.6, 3.7), layout="constrained")
    grid = figure.subplots(2, exits, sharex=True, sharey="row", squeeze=False, height_ratios=[3, 1])
    for e, colour, top, bottom in zip(report.exits, colours(exits), *grid, strict=True):
        bins = e.reliability
        top.plot([0, 1], [0, 1], color="0.7", lw=1)
        top.plot(bins.confidence, bins.accuracy, "o-", color=colour, ms=4)
        bottom.bar(bins.confidence, np.divide(bins.images, report.images), 0.05, color=colour)
        top.set_title(
            f"exit {e.exit}: error {e.error_before:.1%} → {e.error_after:.1%}", fontsize=10
        )
        top.grid(alpha=0.3)
        bottom.set_xlabel("confidence")
    grid[0][0].set_ylabel("share that is right")
    grid[1][0].set_ylabel("images")
    return figure


def exit_shares(report: Report) -> Figure:
    """Where images leave at each operating point, with the compute that it takes."""
    points = report.operating_points
    figure = Figure(figsize=(8, 0.45 * len(points) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = [f"loss ≤ {p.max_accuracy_loss:.2%}" for p in points]
    _stack(axes, names, [p.exit_shares for p in points])
    for row, p in enumerate(points):
        text = f"{p.mean_macs:.0%} of MACs, {p.accuracy:.1%} right"
        axes.text(1.01, row, text, va="center", fontsize=9)
    axes.set_xlabel("share of test images that leave at each exit")
    return figure


def class_shares(report: Report) -> Figure:
    """Where the classes that leave earliest and latest do so."""
    macs = np.array([e.macs for e in report.exits])
    ordered = sorted(report.class_shares.items(), key=lambda item: float(item[1] @ macs))
    shown = ordered
    if len(ordered) > 2 * CLASSES_SHOWN:
        gap = ("…", (0.0,) * len(macs))
        shown = [*ordered[:CLASSES_SHOWN], gap, *ordered[-CLASSES_SHOWN:]]
    figure = Figure(figsize=(7, 0.24 * len(shown) + 1.2), layout="constrained")
    axes = figure.subplots()
    _stack(axes, [label for label, _ in shown], [share for _, share in shown])
    axes.set_xlabel(f"share of each class, at a loss of at most {100 * report.shown_loss:g}%")
    return figure


def _stack(axes: Axes, names: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
    table = np.array(rows)
    left = np.zeros(len(table))
    for k, colour in enumerate(colours(table.shape[1])):
        axes.barh(range(len(table)), table[:, k], left=left, color=colour, label=f"exit {k + 1}")
        left += table[:, k]
    axes.set_yticks(range(len(table)), names, parse_math=False)  # a class may hold two dollars
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=table.shape[1], loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
